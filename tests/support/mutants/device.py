"""Faults of the kernels and their launch sequences, which the host runs thread by thread (tests/support/simt)."""

from __future__ import annotations

from . import Build, Mutant

INPUTS = "tests/cuda/test_simt_inputs.py"
PERSISTENT_INPUTS = "tests/cuda/test_simt_persistent_inputs.py"
FUSED = "tests/cuda/test_simt_fused.py"

# Selections that need the plain build alone.
ROWS = (INPUTS, "-m", "not slow", "-k", "every_number_of_vectors")
TWO_PASS = ("tests/cuda/test_simt.py", "-m", "not slow", "-k", "blocks_and_splits or (seeds and plain)")
FULL_VECTORS = ("tests/cuda/test_simt_full_vectors.py", "-k", "plain and (float64 or bfloat16)")
SETTINGS = (INPUTS, "-k", "optional or cumulative")
OVERFLOW = (INPUTS, "-k", "adversarial and (float32 or bfloat16)")
PERSISTENT = ("tests/cuda/test_simt_persistent.py", "-m", "not slow", "-k", "every_kind_of_plan")
PERSISTENT_SEEDS = ("tests/cuda/test_simt_persistent.py", "-k", "plain and (seeds or warps)")
PERSISTENT_SETTINGS = (PERSISTENT_INPUTS, "-k", "(tails or cumulative) and not tsan")
PERSISTENT_OVERFLOW = (PERSISTENT_INPUTS, "-k", "overflow")
GROUPS = ("tests/cuda/test_simt_groups.py", "-k", "not tsan")
FUSED_VALUES = (FUSED, "-k", "values_and_weights and not persistent and (float64 or bfloat16)")
FUSED_ALIGNMENTS = (FUSED, "-k", "persistent_alignments and bfloat16")
RELU_BOUNDS = ("tests/cuda/test_simt_relu_bounds.py",)
RANKS = ("tests/cuda/test_simt_ranks.py", "-k", "not asan and not tsan")
QUOTIENT = ("tests/cuda/test_simt_quotient.py", "-k", "all_divisors")
TRAFFIC = ("tests/plan/test_traffic.py", "-k", "plan_predicted")


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(fault, f"csrc/{file}", old, new, tests, Build.SIMT)


ACCESSES = [  # which elements a thread visits, and in which order
    mutant(
        "quotient: one that is too small is not corrected",
        "cuda/device/vector_access.cuh",
        "  while ((result + 1) * b.value <= a) ++result;\n",
        "",
        QUOTIENT,
    ),
    mutant(
        "loads: a vector that starts inside the tensor is assumed to end inside it",
        "cuda/device/vector_access.cuh",
        "static_cast<uint64_t>(view.elements - kVectorElements<T>);",
        "static_cast<uint64_t>(view.elements - 1);",
        TWO_PASS,
    ),
    mutant(
        "loads: full vectors are loaded from an unaligned tensor",
        "cuda/device/vector_access.cuh",
        "if (view.wide && access.size() > 0 && is_inside(view, access)) return loads.vector(start);",
        "if (access.size() > 0 && is_inside(view, access)) return loads.vector(start);",
        TWO_PASS,
    ),
    mutant(
        "loads: the first element after a row counts as part of it",
        "cuda/device/vector_access.cuh",
        "if (i < access.begin || i >= access.end) out[i] = 0;",
        "if (i < access.begin || i > access.end) out[i] = 0;",
        RANKS,
    ),
    mutant(
        "stores: the first element after a row is overwritten",
        "cuda/device/vector_access.cuh",
        "if (i >= access.begin && i < access.end) store<CacheOp::kStreaming>",
        "if (i >= access.begin && i <= access.end) store<CacheOp::kStreaming>",
        TWO_PASS,
    ),
    mutant(
        "channels-first: a thread continues one vector past its row's end",
        "cuda/device/tile_iterator.cuh",
        "if (row_vector_ >= static_cast<InRow>(partition_.row_vectors.value)) {",
        "if (row_vector_ > static_cast<InRow>(partition_.row_vectors.value)) {",
        ROWS,
    ),
    mutant(
        "channels-first: with full vectors, a thread continues one vector past its row's end",
        "cuda/device/tile_iterator.cuh",
        "if (row_vector >= static_cast<int>(partition.row_vectors.value)) {",
        "if (row_vector > static_cast<int>(partition.row_vectors.value)) {",
        ROWS,
    ),
    mutant(
        "channels-first: with full vectors, the step to the next row is one row too long",
        "cuda/device/tile_iterator.cuh",
        "partition_.step_vectors * kElements, row - partition_.inner,",
        "partition_.step_vectors * kElements, row,",
        FULL_VECTORS,
    ),
    mutant(
        "channels-first: a tensor smaller than a vector is loaded by vectors",
        "cuda/device/tile_iterator.cuh",
        "return phase_of(data) == phase_of(lead) && elements_of(partition) >= kElements;",
        "return phase_of(data) == phase_of(lead);",
        PERSISTENT_SETTINGS,
    ),
    mutant(
        "channels-first: a work tile that starts with a partial vector counts the elements before the row",
        "cuda/device/tile_iterator.cuh",
        "(in_row < 0 ? 0 : in_row < partition_.inner ? in_row : partition_.inner);",
        "(in_row < partition_.inner ? in_row : partition_.inner);",
        PERSISTENT,
    ),
    mutant(
        "columns: with several channel tiles, the channel offset uses threads_c instead of tile_channels",
        "cuda/device/tile_iterator.cuh",
        "return channel_tile_ * partition_.tile_channels + local(column);",
        "return channel_tile_ * partition_.threads_c + local(column);",
        TWO_PASS,
    ),
    mutant(
        "packed: a vector's first element of the next channel counts as part of this channel",
        "cuda/device/tile_iterator.cuh",
        "return column < boundary_ ? local_ : local_ + 1;",
        "return column <= boundary_ ? local_ : local_ + 1;",
        PERSISTENT,
    ),
    mutant(
        "packed: the cached rows count as one element each",
        "cuda/device/tile_iterator.cuh",
        "return (vectors * step_ < rows_ ? vectors * step_ : rows_) * partition_.inner;",
        "return vectors * step_ < rows_ ? vectors * step_ : rows_;",
        PERSISTENT,
    ),
    mutant(
        "inference, channels-last: only the first thread along C stores the statistics",
        "cuda/device/tile_iterator.cuh",
        "return static_cast<int>(thread_rank()) < partition_.threads_c;",
        "return thread_rank() == 0;",
        TWO_PASS,
    ),
    mutant(
        "tiles: after full tiles the remainder starts at the wrong vector",
        "cuda/device/visit_vectors.cuh",
        "iterator.seek(first + done);",
        "iterator.seek(done);",
        FULL_VECTORS,
    ),
    mutant(
        "tiles: the last cached tile continues into the uncached part",
        "cuda/device/visit_vectors.cuh",
        "visit_any<kVectors>(iterator, first + done, count - done, visit);",
        "visit_any<kVectors>(iterator, first + done, count, visit);",
        TRAFFIC,
    ),
]

REDUCTIONS = [  # how partials of threads and blocks are combined
    mutant(
        "Welford: two sets are weighted with each other's count",
        "cuda/device/welford.cuh",
        "combine(a, b, b.count / (a.count + b.count));",
        "combine(a, b, a.count / (a.count + b.count));",
        TWO_PASS,
    ),
    mutant(
        "Welford: a partial tile is divided by a full tile's count",
        "cuda/device/welford.cuh",
        "static_cast<opmath_t>(kMasked ? count : kCount);",
        "static_cast<opmath_t>(kCount);",
        TWO_PASS,
    ),
    mutant(
        "Welford: a tile whose squares overflow is not summed again in double",
        "cuda/device/welford.cuh",
        "return is_finite(tile.m2) ? tile : welford_of<double, kCount, true>(count, at, has);",
        "return tile;",
        OVERFLOW,
    ),
    mutant(
        "block reduction: with fewer threads than columns, the other columns are skipped",
        "cuda/device/block_reduce.cuh",
        "for (int column = thread; column < width; column += threads) {",
        "for (int column = thread; column < width; column += width) {",
        TWO_PASS,
    ),
    mutant(
        "packed: a channel that starts inside a vector loses that vector's elements",
        "cuda/device/channel_tile_reduce.cuh",
        "const int first_thread_c = channel * inner / kElements;",
        "const int first_thread_c = (channel * inner + kElements - 1) / kElements;",
        PERSISTENT,
    ),
    mutant(
        "partials: with more splits than threads per column, only the first splits are combined",
        "cuda/device/partials.cuh",
        "split += block_threads() / threads_c) {",
        "split += block_threads()) {",
        SETTINGS,
    ),
    mutant(
        "cluster: each CTA combines the partials starting with its own, in a different order",
        "cuda/device/persistent.cuh",
        "combine(all, peer_partial(rank, partials + local));",
        "combine(all, peer_partial(static_cast<int>((block_rank() + rank) % persistent.group_size),\n"
        "                          partials + local));",
        PERSISTENT,
    ),
    mutant(
        "cluster: CTA rank 0's partials are read for every CTA rank",
        "cuda/device/persistent.cuh",
        "load_dsmem(reinterpret_cast<const double*>(partials) + field, rank);",
        "load_dsmem(reinterpret_cast<const double*>(partials) + field, 0);",
        PERSISTENT,
    ),
    mutant(
        "cluster: with an even number of groups, partials overwrite those of the previous channel tile",
        "cuda/device/persistent.cuh",
        "const int turn = channel_tile / persistent.groups % kPartialBuffers;",
        "const int turn = channel_tile % kPartialBuffers;",
        GROUPS,
    ),
    mutant(
        "cluster: the CTA does not wait for the threads that finalize its channels",
        "cuda/device/persistent.cuh",
        "  block_barrier();  // all threads see what on_reduced wrote to shared memory\n",
        "",
        PERSISTENT_SEEDS,
    ),
    mutant(
        "grid group: in a one-shot exchange, a CTA starts at its own rank's channels",
        "cuda/device/persistent.cuh",
        "const int worker = persistent.two_shot ? cta.rank : 0;",
        "const int worker = cta.rank;",
        PERSISTENT,
    ),
    mutant(
        "grid group: no CTA waits for the channels that other CTAs combine",
        "cuda/device/persistent.cuh",
        "  group_barrier(counter, persistent.group_size, cta.rank);"
        "  // all results are stored before they are reloaded\n",
        "",
        PERSISTENT_SEEDS,
    ),
    mutant(
        "grid group: the first group's barrier uses the launch's barrier word",
        "cuda/device/persistent.cuh",
        "&persistent.barrier_words[1 + cta.group].value;",
        "&persistent.barrier_words[cta.group].value;",
        GROUPS,
    ),
    mutant(
        "persistent: no overflow rescale if only the sum of squares overflows",
        "cuda/device/persistent.cuh",
        "const bool finite = is_finite(first[i]) && is_finite(second[i]);",
        "const bool finite = is_finite(first[i]);",
        PERSISTENT_OVERFLOW,
    ),
    mutant(
        "persistent: a partial last tile is omitted from the reload",
        "cuda/device/persistent.cuh",
        "int tile = (iterator.vectors() - cached_vectors + kVectors - 1) / kVectors;",
        "int tile = (iterator.vectors() - cached_vectors) / kVectors;",
        PERSISTENT,
    ),
]

RESULTS = [  # what is computed from statistics and sums
    mutant(
        "forward: the batch is counted once per block",
        "cuda/kernels/statistics.cuh",
        "params.num_batches_tracked != nullptr && block_rank() == 0 && thread_rank() == 0",
        "params.num_batches_tracked != nullptr && thread_rank() == 0",
        TWO_PASS,
    ),
    mutant(
        "forward: invstd omits eps",
        "cuda/device/statistics_results.cuh",
        "return reciprocal_sqrt(all.m2 / all.count + results.eps);",
        "return reciprocal_sqrt(all.m2 / all.count);",
        TWO_PASS,
    ),
    mutant(
        "forward: the running variance is divided by n",
        "cuda/device/statistics_results.cuh",
        "all.m2 / (all.count - 1), factor);",
        "all.m2 / all.count, factor);",
        TWO_PASS,
    ),
    mutant(
        "forward: momentum None is treated as 0",
        "cuda/device/statistics_results.cuh",
        "return results.cumulative ? 1 / static_cast<double>(count) : results.momentum;",
        "return results.momentum;",
        SETTINGS,
    ),
    mutant(
        "inference: invstd omits eps",
        "cuda/kernels/normalize.cuh",
        "params.inference ? reciprocal_sqrt(invstd_or_var + params.eps) : invstd_or_var",
        "params.inference ? reciprocal_sqrt(invstd_or_var) : invstd_or_var",
        TWO_PASS,
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
        "ReLU bounds: an x whose y is 0 passes gradients",
        "cuda/device/epilogue.cuh",
        "bias))) <= 0);\n  };",
        "bias))) < 0); };",
        RELU_BOUNDS,
    ),
    mutant(
        "ReLU backward: the bound itself does not pass gradients",
        "cuda/device/epilogue.cuh",
        "return side < edge[column] ? opmath_t(0) : g;",
        "return side <= edge[column] ? opmath_t(0) : g;",
        RELU_BOUNDS,
    ),
    mutant(
        "ReLU backward: the sums include masked gradients",
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
        TWO_PASS,
    ),
    mutant(
        "backward: the weight is ignored",
        "cuda/kernels/grad_input.cuh",
        "scale[column] = static_cast<opmath_t>(read_or(params.weight, channel, 1) * invstd);",
        "scale[column] = static_cast<opmath_t>(invstd);",
        TWO_PASS,
    ),
    mutant(
        "ranks: a single value over all ranks updates the running statistics",
        "cuda/kernels/sync.cuh",
        "} else if (all.count == 1) {",
        "} else if (all.count < 1) {",
        RANKS,
    ),
    mutant(
        "persistent: the batch is counted after one group's number of blocks instead of all",
        "cuda/device/persistent.cuh",
        "last_to_arrive(&persistent.barrier_words[0].value, grid_blocks());",
        "last_to_arrive(&persistent.barrier_words[0].value, static_cast<unsigned>(persistent.group_size));",
        PERSISTENT_SETTINGS,
    ),
    mutant(
        "persistent forward: a cumulative average does not count the current batch",
        "cuda/kernels/persistent_forward.cuh",
        "params.results.cumulative ? load(params.num_batches_tracked) + 1 : 0;",
        "params.results.cumulative ? load(params.num_batches_tracked) : 0;",
        PERSISTENT_SETTINGS,
    ),
    mutant(
        "persistent forward: every CTA updates the running statistics",
        "cuda/kernels/persistent_forward.cuh",
        "      if (persistent.two_shot || cta.rank == 0) {\n",
        "      {\n",
        PERSISTENT,
    ),
    mutant(
        "persistent forward: the difference of mean and pivot is rounded to float",
        "cuda/kernels/persistent_forward.cuh",
        "const double shift = all.first / count;",
        "const double shift = static_cast<float>(all.first / count);",
        PERSISTENT_SEEDS,
    ),
    mutant(
        "persistent forward: an unaligned residual is loaded by vectors",
        "cuda/kernels/persistent_forward.cuh",
        "added_wide && Iterator::is_wide(partition, out, lead)};",
        "Iterator::is_wide(partition, out, lead)};",
        FUSED_ALIGNMENTS,
    ),
    mutant(
        "persistent backward: the sum of gradients is divided by the elements of the work tile",
        "cuda/kernels/persistent_backward.cuh",
        "const double mean_g = all.first / params.elements_per_channel;",
        "const double mean_g = all.first / static_cast<double>(iterator.elements());",
        PERSISTENT,
    ),
    mutant(
        "persistent backward: the two means are swapped when they are reloaded",
        "cuda/kernels/persistent_backward.cuh",
        "set(local, read(params.mean_g, channel), read(params.mean_g_xhat, channel));",
        "set(local, read(params.mean_g_xhat, channel), read(params.mean_g, channel));",
        PERSISTENT,
    ),
    mutant(
        "persistent backward: no overflow rescale of the sums",
        "cuda/kernels/persistent_backward.cuh",
        "      if (sums.needs_rescale()) sum_rescaled(x, g, iterator, first, count, mean, epilogue, sums);\n",
        "",
        PERSISTENT_OVERFLOW,
    ),
]

SEQUENCES = [  # launches, their arguments and scratch memory
    mutant(
        "two-pass backward: no sums if only the bias needs a gradient",
        "cuda/launch/two_pass.h",
        "needs_means || args.grad_weight.data != nullptr || args.grad_bias.data != nullptr;",
        "needs_means || args.grad_weight.data != nullptr;",
        SETTINGS,
    ),
    mutant(
        "two-pass backward: no scratch memory for the two means",
        "cuda/launch/two_pass.h",
        "return (kFields<Sums> * plan.partition.splits + 2) * plan.partition.channels;",
        "return kFields<Sums> * plan.partition.splits * plan.partition.channels;",
        TWO_PASS,
    ),
    mutant(
        "inference: the epilogue is omitted",
        "cuda/launch/two_pass.h",
        "      .invstd_out = args.invstd,\n      .epilogue = args.epilogue,\n",
        "      .invstd_out = args.invstd,\n",
        FUSED_VALUES,
    ),
    mutant(
        "persistent backward: no scratch memory for the means of a two-shot exchange",
        "cuda/launch/persistent.h",
        "return (kFields<Sums> * plan.group_size + (plan.two_shot ? 2 : 0)) * plan.partition.channels;",
        "return kFields<Sums> * plan.group_size * plan.partition.channels;",
        PERSISTENT,
    ),
    mutant(
        "ranks: the sums that a rank sends are divided by the rank's own element count",
        "cuda/launch/sync.h",
        ".elements_per_channel = 1,",
        ".elements_per_channel = static_cast<double>(args.problem.elements_per_channel()),",
        RANKS,
    ),
]

MUTANTS: list[Mutant] = ACCESSES + REDUCTIONS + RESULTS + SEQUENCES
