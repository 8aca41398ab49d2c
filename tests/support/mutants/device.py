"""Faults of the kernels and of their launch sequences, which the host runs thread by thread (tests/support/simt)."""

from __future__ import annotations

from . import Build, Mutant

INPUTS = "tests/cuda/test_simt_inputs.py"
RESIDENT_INPUTS = "tests/cuda/test_simt_persistent_inputs.py"
FUSED = "tests/cuda/test_simt_fused.py"

# Selections that need the plain build alone.
ROWS = (INPUTS, "-m", "not slow", "-k", "every_number_of_windows")
STREAMING = ("tests/cuda/test_simt.py", "-m", "not slow", "-k", "blocks_and_chunks or (seeds and plain)")
WHOLE = ("tests/cuda/test_simt_full_vectors.py", "-k", "plain and (float64 or bfloat16)")
SETTINGS = (INPUTS, "-k", "missing or cumulative")
OVERFLOW = (INPUTS, "-k", "adversarial and (float32 or bfloat16)")
RESIDENT = ("tests/cuda/test_simt_persistent.py", "-m", "not slow", "-k", "every_kind_of_plan")
RESIDENT_SEEDS = ("tests/cuda/test_simt_persistent.py", "-k", "plain and (seeds or warps)")
RESIDENT_SETTINGS = (RESIDENT_INPUTS, "-k", "(tails or cumulative) and not tsan")
RESIDENT_OVERFLOW = (RESIDENT_INPUTS, "-k", "overflow")
GROUPS = ("tests/cuda/test_simt_groups.py", "-k", "not tsan")
FUSED_VALUES = (FUSED, "-k", "values_and_weights and not resident and (float64 or bfloat16)")
FUSED_ALIGNMENTS = (FUSED, "-k", "resident_alignments and bfloat16")
INTERVALS = ("tests/cuda/test_simt_relu_bounds.py",)
RANKS = ("tests/cuda/test_simt_ranks.py", "-k", "not asan and not tsan")
QUOTIENT = ("tests/cuda/test_simt_quotient.py", "-k", "all_divisors")
TRAFFIC = ("tests/plan/test_traffic.py", "-k", "plan_predicted")


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(fault, f"csrc/{file}", old, new, tests, Build.SIMT)


WALKS = [  # which elements a thread visits, and how it reaches them
    mutant(
        "quotient: one that is too small is left as it is",
        "cuda/device/vector_access.cuh",
        "  while ((result + 1) * b.value <= a) ++result;\n",
        "",
        QUOTIENT,
    ),
    mutant(
        "loads: a vector that begins inside the tensor is taken for one that ends there too",
        "cuda/device/vector_access.cuh",
        "static_cast<uint64_t>(view.elements - kVectorElements<T>);",
        "static_cast<uint64_t>(view.elements - 1);",
        STREAMING,
    ),
    mutant(
        "loads: vectors are loaded whole from a tensor that is not aligned",
        "cuda/device/vector_access.cuh",
        "if (view.wide && access.size() > 0 && is_inside(view, access)) return loads.vector(start);",
        "if (access.size() > 0 && is_inside(view, access)) return loads.vector(start);",
        STREAMING,
    ),
    mutant(
        "loads: the first element behind a row is taken for one of it",
        "cuda/device/vector_access.cuh",
        "if (i < access.begin || i >= access.end) out[i] = 0;",
        "if (i < access.begin || i > access.end) out[i] = 0;",
        RANKS,
    ),
    mutant(
        "stores: the first element behind a row is written with it",
        "cuda/device/vector_access.cuh",
        "if (i >= access.begin && i < access.end) store<CacheOp::kStreaming>",
        "if (i >= access.begin && i <= access.end) store<CacheOp::kStreaming>",
        STREAMING,
    ),
    mutant(
        "channels-first: a thread goes on one window behind its row's end",
        "cuda/device/tile_iterator.cuh",
        "if (row_vector_ >= static_cast<InRow>(partition_.row_vectors.value)) {",
        "if (row_vector_ > static_cast<InRow>(partition_.row_vectors.value)) {",
        ROWS,
    ),
    mutant(
        "channels-first: of whole windows, too, a thread goes on one behind its row's end",
        "cuda/device/tile_iterator.cuh",
        "if (row_vector >= static_cast<int>(partition.row_vectors.value)) {",
        "if (row_vector > static_cast<int>(partition.row_vectors.value)) {",
        ROWS,
    ),
    mutant(
        "channels-first: the jump behind a whole row's end is a row too long",
        "cuda/device/tile_iterator.cuh",
        "partition_.step_vectors * kElements, row - partition_.inner,",
        "partition_.step_vectors * kElements, row,",
        WHOLE,
    ),
    mutant(
        "channels-first: a tensor smaller than a vector is loaded by vectors",
        "cuda/device/tile_iterator.cuh",
        "return phase_of(data) == phase_of(lead) && elements_of(partition) >= kElements;",
        "return phase_of(data) == phase_of(lead);",
        RESIDENT_SETTINGS,
    ),
    mutant(
        "channels-first: a share that begins with a cut window counts the elements before the row",
        "cuda/device/tile_iterator.cuh",
        "(in_row < 0 ? 0 : in_row < partition_.inner ? in_row : partition_.inner);",
        "(in_row < partition_.inner ? in_row : partition_.inner);",
        RESIDENT,
    ),
    mutant(
        "columns: with several slabs, channels are counted from the slab's vectors",
        "cuda/device/tile_iterator.cuh",
        "return channel_tile_ * partition_.tile_channels + local(column);",
        "return channel_tile_ * partition_.threads_c + local(column);",
        STREAMING,
    ),
    mutant(
        "packed: a vector's first element of the next channel is taken for one of this channel",
        "cuda/device/tile_iterator.cuh",
        "return column < boundary_ ? local_ : local_ + 1;",
        "return column <= boundary_ ? local_ : local_ + 1;",
        RESIDENT,
    ),
    mutant(
        "packed: the elements of the kept rows are counted as one a row",
        "cuda/device/tile_iterator.cuh",
        "return (vectors * step_ < rows_ ? vectors * step_ : rows_) * partition_.inner;",
        "return vectors * step_ < rows_ ? vectors * step_ : rows_;",
        RESIDENT,
    ),
    mutant(
        "inference, channels-last: only the first lane leaves the statistics that were used",
        "cuda/device/tile_iterator.cuh",
        "return static_cast<int>(thread_rank()) < partition_.threads_c;",
        "return thread_rank() == 0;",
        STREAMING,
    ),
    mutant(
        "tiles: behind whole tiles the rest begins at the wrong window",
        "cuda/device/visit_vectors.cuh",
        "iterator.seek(first + done);",
        "iterator.seek(done);",
        WHOLE,
    ),
    mutant(
        "tiles: the last tile of what is kept goes on into what is not kept",
        "cuda/device/visit_vectors.cuh",
        "visit_any<kVectors>(iterator, first + done, count - done, visit);",
        "visit_any<kVectors>(iterator, first + done, count, visit);",
        TRAFFIC,
    ),
]

REDUCTIONS = [  # how what threads and blocks have found is joined
    mutant(
        "moments: two sets are weighted with each other's count",
        "cuda/device/welford.cuh",
        "combine(a, b, b.count / (a.count + b.count));",
        "combine(a, b, a.count / (a.count + b.count));",
        STREAMING,
    ),
    mutant(
        "moments: a tile that is not full is divided by a full one's count",
        "cuda/device/welford.cuh",
        "static_cast<opmath_t>(kMasked ? count : kCount);",
        "static_cast<opmath_t>(kCount);",
        STREAMING,
    ),
    mutant(
        "moments: a tile whose squares overflow is not summed again in double",
        "cuda/device/welford.cuh",
        "return is_finite(tile.m2) ? tile : welford_of<double, kCount, true>(count, at, has);",
        "return tile;",
        OVERFLOW,
    ),
    mutant(
        "block: fewer threads than columns leave the other columns out",
        "cuda/device/block_reduce.cuh",
        "for (int column = thread; column < width; column += threads) {",
        "for (int column = thread; column < width; column += width) {",
        STREAMING,
    ),
    mutant(
        "packed: a channel that begins inside a vector loses its part of it",
        "cuda/device/channel_tile_reduce.cuh",
        "const int first_thread_c = channel * inner / kElements;",
        "const int first_thread_c = (channel * inner + kElements - 1) / kElements;",
        RESIDENT,
    ),
    mutant(
        "partials: of more chunks than threads of a lane only the first are joined",
        "cuda/device/partials.cuh",
        "split += block_threads() / threads_c) {",
        "split += block_threads()) {",
        SETTINGS,
    ),
    mutant(
        "cluster: each member joins beginning with itself, in an order of its own",
        "cuda/device/persistent.cuh",
        "combine(all, peer_partial(rank, partials + local));",
        "combine(all, peer_partial(static_cast<int>((block_rank() + rank) % persistent.group_size), partials + local));",
        RESIDENT,
    ),
    mutant(
        "cluster: a member's first is read for every member's",
        "cuda/device/persistent.cuh",
        "load_dsmem(reinterpret_cast<const double*>(partials) + field, rank);",
        "load_dsmem(reinterpret_cast<const double*>(partials) + field, 0);",
        RESIDENT,
    ),
    mutant(
        "cluster: with an even number of groups, each slab is told where the last one is still read",
        "cuda/device/persistent.cuh",
        "const int turn = channel_tile / persistent.groups % kPartialBuffers;",
        "const int turn = channel_tile % kPartialBuffers;",
        GROUPS,
    ),
    mutant(
        "cluster: the block does not wait for the threads that finish its channels",
        "cuda/device/persistent.cuh",
        "  block_barrier();  // what finish wrote to shared memory is there for all\n",
        "",
        RESIDENT_SEEDS,
    ),
    mutant(
        "virtual cluster: a member that joins for itself begins at its own rank's channels",
        "cuda/device/persistent.cuh",
        "const int worker = persistent.two_shot ? cta.rank : 0;",
        "const int worker = cta.rank;",
        RESIDENT,
    ),
    mutant(
        "virtual cluster: nobody waits for the channels that others have joined",
        "cuda/device/persistent.cuh",
        "  group_barrier(counter, persistent.group_size, cta.rank);  // every channel's results are stored before they are read\n",
        "",
        RESIDENT_SEEDS,
    ),
    mutant(
        "virtual cluster: the barrier of the first group takes the launch's word",
        "cuda/device/persistent.cuh",
        "&persistent.barrier_words[1 + cta.group].value;",
        "&persistent.barrier_words[cta.group].value;",
        GROUPS,
    ),
    mutant(
        "resident: sums of squares that overflow alone are not rescued",
        "cuda/device/persistent.cuh",
        "const bool finite = is_finite(first[i]) && is_finite(second[i]);",
        "const bool finite = is_finite(first[i]);",
        RESIDENT_OVERFLOW,
    ),
    mutant(
        "resident: a last tile that is not full is left out of what is read again",
        "cuda/device/persistent.cuh",
        "int tile = (iterator.vectors() - cached_vectors + kVectors - 1) / kVectors;",
        "int tile = (iterator.vectors() - cached_vectors) / kVectors;",
        RESIDENT,
    ),
]

RESULTS = [  # what is made of statistics and sums
    mutant(
        "forward: the batch is counted once a block",
        "cuda/kernels/statistics.cuh",
        "params.num_batches_tracked != nullptr && block_rank() == 0 && thread_rank() == 0",
        "params.num_batches_tracked != nullptr && thread_rank() == 0",
        STREAMING,
    ),
    mutant(
        "forward: eps left out of invstd",
        "cuda/device/statistics_results.cuh",
        "return reciprocal_sqrt(all.m2 / all.count + results.eps);",
        "return reciprocal_sqrt(all.m2 / all.count);",
        STREAMING,
    ),
    mutant(
        "forward: the running variance is divided by n",
        "cuda/device/statistics_results.cuh",
        "all.m2 / (all.count - 1), factor);",
        "all.m2 / all.count, factor);",
        STREAMING,
    ),
    mutant(
        "forward: a momentum of None is taken for 0",
        "cuda/device/statistics_results.cuh",
        "return results.cumulative ? 1 / static_cast<double>(count) : results.momentum;",
        "return results.momentum;",
        SETTINGS,
    ),
    mutant(
        "inference: eps left out of invstd",
        "cuda/kernels/normalize.cuh",
        "params.inference ? reciprocal_sqrt(invstd_or_var + params.eps) : invstd_or_var",
        "params.inference ? reciprocal_sqrt(invstd_or_var) : invstd_or_var",
        STREAMING,
    ),
    mutant(
        "epilogue: the ReLU comes before the addition",
        "cuda/kernels/normalize.cuh",
        "added.add(residual, accesses, i, values);\n          relu(params.epilogue.relu, values);",
        "relu(params.epilogue.relu, values);\n          added.add(residual, accesses, i, values);",
        FUSED_VALUES,
    ),
    mutant(
        "ReLU: NaN becomes 0",
        "cuda/device/epilogue.cuh",
        "return value < 0 ? opmath_t(0) : value;",
        "return value > 0 ? value : opmath_t(0);",
        FUSED_VALUES,
    ),
    mutant(
        "ReLU: an x whose y is 0 is in the interval that lets gradients through",
        "cuda/device/epilogue.cuh",
        "bias))) <= 0);\n  };",
        "bias))) < 0); };",
        INTERVALS,
    ),
    mutant(
        "ReLU, backward: the end of the interval is not let through",
        "cuda/device/relu_backward.cuh",
        "return side < edge[column] ? opmath_t(0) : g;",
        "return side <= edge[column] ? opmath_t(0) : g;",
        INTERVALS,
    ),
    mutant(
        "ReLU, backward: the sums are of gradients that it had stopped",
        "cuda/kernels/grad_sums.cuh",
        "const opmath_t gradient = epilogue(element, xs[i][element], gs[i][element]);",
        "const opmath_t gradient = gs[i][element];",
        FUSED_VALUES,
    ),
    mutant(
        "backward: wrong sign of the projection",
        "cuda/kernels/grad_input.cuh",
        "value = fused_multiply_add(-deviation, slope[column], value - mean_g[column]);",
        "value = fused_multiply_add(deviation, slope[column], value - mean_g[column]);",
        STREAMING,
    ),
    mutant(
        "backward: the weight is ignored",
        "cuda/kernels/grad_input.cuh",
        "scale[column] = static_cast<opmath_t>(read_or(params.weight, channel, 1) * invstd);",
        "scale[column] = static_cast<opmath_t>(invstd);",
        STREAMING,
    ),
    mutant(
        "ranks: a single value in all moves the running statistics",
        "cuda/kernels/sync.cuh",
        "} else if (all.count == 1) {",
        "} else if (all.count < 1) {",
        RANKS,
    ),
    mutant(
        "resident: the batch is counted whenever as many blocks as a group has are done",
        "cuda/device/persistent.cuh",
        "last_to_arrive(&persistent.barrier_words[0].value, grid_blocks());",
        "last_to_arrive(&persistent.barrier_words[0].value, static_cast<unsigned>(persistent.group_size));",
        RESIDENT_SETTINGS,
    ),
    mutant(
        "resident forward: a cumulative average does not count the batch itself",
        "cuda/kernels/persistent_forward.cuh",
        "params.results.cumulative ? load(params.num_batches_tracked) + 1 : 0;",
        "params.results.cumulative ? load(params.num_batches_tracked) : 0;",
        RESIDENT_SETTINGS,
    ),
    mutant(
        "resident forward: every member moves the running statistics",
        "cuda/kernels/persistent_forward.cuh",
        "      if (persistent.two_shot || cta.rank == 0) {\n",
        "      {\n",
        RESIDENT,
    ),
    mutant(
        "resident forward: the mean's distance from its pivot is rounded to float",
        "cuda/kernels/persistent_forward.cuh",
        "const double shift = all.first / count;",
        "const double shift = static_cast<float>(all.first / count);",
        RESIDENT_SEEDS,
    ),
    mutant(
        "resident forward: a residual that is not aligned is loaded by vectors",
        "cuda/kernels/persistent_forward.cuh",
        "added_wide && Iterator::is_wide(partition, out, lead)};",
        "Iterator::is_wide(partition, out, lead)};",
        FUSED_ALIGNMENTS,
    ),
    mutant(
        "resident backward: the sum of gradients is divided by the elements of the share",
        "cuda/kernels/persistent_backward.cuh",
        "const double mean_g = all.first / params.elements_per_channel;",
        "const double mean_g = all.first / static_cast<double>(iterator.elements());",
        RESIDENT,
    ),
    mutant(
        "resident backward: the two means are swapped where they are recalled",
        "cuda/kernels/persistent_backward.cuh",
        "set(local, read(params.mean_g, channel), read(params.mean_g_xhat, channel));",
        "set(local, read(params.mean_g_xhat, channel), read(params.mean_g, channel));",
        RESIDENT,
    ),
    mutant(
        "resident backward: sums that overflow are not rescued",
        "cuda/kernels/persistent_backward.cuh",
        "      if (sums.needs_rescale()) sum_rescaled(x, g, iterator, first, count, mean, epilogue, sums);\n",
        "",
        RESIDENT_OVERFLOW,
    ),
]

SEQUENCES = [  # launches, their arguments and their scratch memory
    mutant(
        "streaming backward: no sums for the gradient of the bias alone",
        "cuda/launch/two_pass.h",
        "needs_means || args.grad_weight.data != nullptr || args.grad_bias.data != nullptr;",
        "needs_means || args.grad_weight.data != nullptr;",
        SETTINGS,
    ),
    mutant(
        "streaming backward: no scratch memory for the two means",
        "cuda/launch/two_pass.h",
        "return (kFields<Sums> * plan.partition.splits + 2) * plan.partition.channels;",
        "return kFields<Sums> * plan.partition.splits * plan.partition.channels;",
        STREAMING,
    ),
    mutant(
        "inference: the epilogue is forgotten",
        "cuda/launch/two_pass.h",
        "      .invstd_out = args.invstd,\n      .epilogue = args.epilogue,\n",
        "      .invstd_out = args.invstd,\n",
        FUSED_VALUES,
    ),
    mutant(
        "resident backward: no scratch memory for the means of a divided exchange",
        "cuda/launch/persistent.h",
        "return (kFields<Sums> * plan.group_size + (plan.two_shot ? 2 : 0)) * plan.partition.channels;",
        "return kFields<Sums> * plan.group_size * plan.partition.channels;",
        RESIDENT,
    ),
    mutant(
        "ranks: the sums that a rank sends are divided by its own elements",
        "cuda/launch/sync.h",
        ".elements_per_channel = 1,  // the sums themselves: how many elements there are the ranks only know together",
        ".elements_per_channel = static_cast<double>(args.problem.elements_per_channel()),",
        RANKS,
    ),
]

MUTANTS: list[Mutant] = WALKS + REDUCTIONS + RESULTS + SEQUENCES
