"""Faults of the kernels and of their launch sequences, which the host runs thread by thread (tests/simt)."""

from __future__ import annotations

from . import Build, Mutant

INPUTS = "tests/test_simt_inputs.py"
RESIDENT_INPUTS = "tests/test_simt_resident_inputs.py"
FUSED = "tests/test_simt_fused.py"

# Selections that need the plain build alone.
ROWS = (INPUTS, "-m", "not slow", "-k", "every_number_of_windows")
STREAMING = ("tests/test_simt.py", "-m", "not slow", "-k", "blocks_and_chunks or (seeds and plain)")
WHOLE = ("tests/test_simt_whole.py", "-k", "plain and (float64 or bfloat16)")
SETTINGS = (INPUTS, "-k", "missing or cumulative")
OVERFLOW = (INPUTS, "-k", "adversarial and (float32 or bfloat16)")
RESIDENT = ("tests/test_simt_resident.py", "-m", "not slow", "-k", "every_kind_of_plan")
RESIDENT_SEEDS = ("tests/test_simt_resident.py", "-k", "plain and (seeds or warps)")
RESIDENT_SETTINGS = (RESIDENT_INPUTS, "-k", "(tails or cumulative) and not tsan")
RESIDENT_OVERFLOW = (RESIDENT_INPUTS, "-k", "overflow")
GROUPS = ("tests/test_simt_groups.py", "-k", "not tsan")
FUSED_VALUES = (FUSED, "-k", "values_and_weights and not resident and (float64 or bfloat16)")
FUSED_ALIGNMENTS = (FUSED, "-k", "resident_alignments and bfloat16")
INTERVALS = ("tests/test_simt_relu_range.py",)
RANKS = ("tests/test_simt_ranks.py", "-k", "not asan and not tsan")
QUOTIENT = ("tests/test_simt_quotient.py", "-k", "all_divisors")
TRAFFIC = ("tests/test_traffic.py", "-k", "plan_predicted")


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(fault, f"csrc/{file}", old, new, tests, Build.SIMT)


WALKS = [  # which elements a thread visits, and how it reaches them
    mutant(
        "quotient: one that is too small is left as it is",
        "kernels/walk.cuh",
        "  while ((result + 1) * b.value <= a) ++result;\n",
        "",
        QUOTIENT,
    ),
    mutant(
        "loads: a vector that begins inside the tensor is taken for one that ends there too",
        "kernels/walk.cuh",
        "static_cast<uint64_t>(view.elements - kVectorElements<T>);",
        "static_cast<uint64_t>(view.elements - 1);",
        STREAMING,
    ),
    mutant(
        "loads: vectors are loaded whole from a tensor that is not aligned",
        "kernels/walk.cuh",
        "if (view.wide && window.size() > 0 && is_inside(view, window)) return loads.vector(start);",
        "if (window.size() > 0 && is_inside(view, window)) return loads.vector(start);",
        STREAMING,
    ),
    mutant(
        "loads: the first element behind a row is taken for one of it",
        "kernels/walk.cuh",
        "if (i < window.begin || i >= window.end) out[i] = 0;",
        "if (i < window.begin || i > window.end) out[i] = 0;",
        RANKS,
    ),
    mutant(
        "stores: the first element behind a row is written with it",
        "kernels/walk.cuh",
        "if (i >= window.begin && i < window.end) store<Reuse::kLast>",
        "if (i >= window.begin && i <= window.end) store<Reuse::kLast>",
        STREAMING,
    ),
    mutant(
        "channels-first: a thread goes on one window behind its row's end",
        "kernels/walkers.cuh",
        "if (window_ >= static_cast<InRow>(walk_.windows.value)) {",
        "if (window_ > static_cast<InRow>(walk_.windows.value)) {",
        ROWS,
    ),
    mutant(
        "channels-first: of whole windows, too, a thread goes on one behind its row's end",
        "kernels/walkers.cuh",
        "if (window >= static_cast<int>(walk.windows.value)) {",
        "if (window > static_cast<int>(walk.windows.value)) {",
        ROWS,
    ),
    mutant(
        "channels-first: the jump behind a whole row's end is a row too long",
        "kernels/walkers.cuh",
        "walk_.step_windows * kElements, row - walk_.inner,",
        "walk_.step_windows * kElements, row,",
        WHOLE,
    ),
    mutant(
        "channels-first: a tensor smaller than a vector is loaded by vectors",
        "kernels/walkers.cuh",
        "return phase_of(data) == phase_of(lead) && elements_of(walk) >= kElements;",
        "return phase_of(data) == phase_of(lead);",
        RESIDENT_SETTINGS,
    ),
    mutant(
        "channels-first: a share that begins with a cut window counts the elements before the row",
        "kernels/walkers.cuh",
        "(in_row < 0 ? 0 : in_row < walk_.inner ? in_row : walk_.inner);",
        "(in_row < walk_.inner ? in_row : walk_.inner);",
        RESIDENT,
    ),
    mutant(
        "columns: with several slabs, channels are counted from the slab's vectors",
        "kernels/walkers.cuh",
        "return slab_ * walk_.slab_channels + local(column);",
        "return slab_ * walk_.lanes + local(column);",
        STREAMING,
    ),
    mutant(
        "packed: a vector's first element of the next channel is taken for one of this channel",
        "kernels/walkers.cuh",
        "return column < boundary_ ? local_ : local_ + 1;",
        "return column <= boundary_ ? local_ : local_ + 1;",
        RESIDENT,
    ),
    mutant(
        "packed: the elements of the kept rows are counted as one a row",
        "kernels/walkers.cuh",
        "return (windows * step_ < rows_ ? windows * step_ : rows_) * walk_.inner;",
        "return windows * step_ < rows_ ? windows * step_ : rows_;",
        RESIDENT,
    ),
    mutant(
        "inference, channels-last: only the first lane leaves the statistics that were used",
        "kernels/walkers.cuh",
        "return static_cast<int>(thread_rank()) < walk_.lanes;",
        "return thread_rank() == 0;",
        STREAMING,
    ),
    mutant(
        "tiles: behind whole tiles the rest begins at the wrong window",
        "kernels/tiles.cuh",
        "walker.seek(first + done);",
        "walker.seek(done);",
        WHOLE,
    ),
    mutant(
        "tiles: the last tile of what is kept goes on into what is not kept",
        "kernels/tiles.cuh",
        "visit_any<kTile>(walker, first + done, count - done, visit);",
        "visit_any<kTile>(walker, first + done, count, visit);",
        TRAFFIC,
    ),
]

REDUCTIONS = [  # how what threads and blocks have found is joined
    mutant(
        "moments: two sets are weighted with each other's count",
        "kernels/moments.cuh",
        "join(a, b, b.count / (a.count + b.count));",
        "join(a, b, a.count / (a.count + b.count));",
        STREAMING,
    ),
    mutant(
        "moments: a tile that is not full is divided by a full one's count",
        "kernels/moments.cuh",
        "static_cast<Real>(kMasked ? count : kCount);",
        "static_cast<Real>(kCount);",
        STREAMING,
    ),
    mutant(
        "moments: a tile whose squares overflow is not summed again in double",
        "kernels/moments.cuh",
        "return is_finite(tile.m2) ? tile : two_pass<double, kCount, true>(count, at, has);",
        "return tile;",
        OVERFLOW,
    ),
    mutant(
        "block: fewer threads than columns leave the other columns out",
        "kernels/block_reduce.cuh",
        "for (int column = thread; column < width; column += threads) {",
        "for (int column = thread; column < width; column += width) {",
        STREAMING,
    ),
    mutant(
        "packed: a channel that begins inside a vector loses its part of it",
        "kernels/slab_reduce.cuh",
        "const int first_lane = channel * inner / kElements;",
        "const int first_lane = (channel * inner + kElements - 1) / kElements;",
        RESIDENT,
    ),
    mutant(
        "partials: of more chunks than threads of a lane only the first are joined",
        "kernels/partials.cuh",
        "chunk += block_threads() / lanes) {",
        "chunk += block_threads()) {",
        SETTINGS,
    ),
    mutant(
        "cluster: each member joins beginning with itself, in an order of its own",
        "kernels/resident.cuh",
        "join(all, told_by(rank, told + local));",
        "join(all, told_by(static_cast<int>((block_rank() + rank) % residence.members), told + local));",
        RESIDENT,
    ),
    mutant(
        "cluster: a member's first is read for every member's",
        "kernels/resident.cuh",
        "load_member(reinterpret_cast<const double*>(told) + field, rank);",
        "load_member(reinterpret_cast<const double*>(told) + field, 0);",
        RESIDENT,
    ),
    mutant(
        "cluster: with an even number of groups, each slab is told where the last one is still read",
        "kernels/resident.cuh",
        "const int turn = slab / residence.groups % kToldSlabs;",
        "const int turn = slab % kToldSlabs;",
        GROUPS,
    ),
    mutant(
        "cluster: the block does not wait for the threads that finish its channels",
        "kernels/resident.cuh",
        "  block_barrier();  // what finish wrote to shared memory is there for all\n",
        "",
        RESIDENT_SEEDS,
    ),
    mutant(
        "virtual cluster: a member that joins for itself begins at its own rank's channels",
        "kernels/resident.cuh",
        "const int worker = residence.divided ? member.rank : 0;",
        "const int worker = member.rank;",
        RESIDENT,
    ),
    mutant(
        "virtual cluster: nobody waits for the channels that others have joined",
        "kernels/resident.cuh",
        "  group_barrier(counter, residence.members, member.rank);"
        "  // every channel's results are stored before they are read\n",
        "",
        RESIDENT_SEEDS,
    ),
    mutant(
        "virtual cluster: the barrier of the first group takes the launch's word",
        "kernels/resident.cuh",
        "&residence.barrier_words[1 + member.group].value;",
        "&residence.barrier_words[member.group].value;",
        GROUPS,
    ),
    mutant(
        "resident: sums of squares that overflow alone are not rescued",
        "kernels/resident.cuh",
        "const bool finite = is_finite(first[i]) && is_finite(second[i]);",
        "const bool finite = is_finite(first[i]);",
        RESIDENT_OVERFLOW,
    ),
    mutant(
        "resident: a last tile that is not full is left out of what is read again",
        "kernels/resident.cuh",
        "int tile = (walker.windows() - kept + kTile - 1) / kTile;",
        "int tile = (walker.windows() - kept) / kTile;",
        RESIDENT,
    ),
]

RESULTS = [  # what is made of statistics and sums
    mutant(
        "forward: the batch is counted once a block",
        "kernels/statistics.cuh",
        "params.num_batches_tracked != nullptr && block_rank() == 0 && thread_rank() == 0",
        "params.num_batches_tracked != nullptr && thread_rank() == 0",
        STREAMING,
    ),
    mutant(
        "forward: eps left out of invstd",
        "kernels/statistics_results.cuh",
        "return reciprocal_sqrt(all.m2 / all.count + results.eps);",
        "return reciprocal_sqrt(all.m2 / all.count);",
        STREAMING,
    ),
    mutant(
        "forward: the running variance is divided by n",
        "kernels/statistics_results.cuh",
        "all.m2 / (all.count - 1), factor);",
        "all.m2 / all.count, factor);",
        STREAMING,
    ),
    mutant(
        "forward: a momentum of None is taken for 0",
        "kernels/statistics_results.cuh",
        "return results.cumulative ? 1 / static_cast<double>(count) : results.momentum;",
        "return results.momentum;",
        SETTINGS,
    ),
    mutant(
        "inference: eps left out of invstd",
        "kernels/normalize.cuh",
        "params.inference ? reciprocal_sqrt(spread + params.eps) : spread",
        "params.inference ? reciprocal_sqrt(spread) : spread",
        STREAMING,
    ),
    mutant(
        "epilogue: the ReLU comes before the addition",
        "kernels/normalize.cuh",
        "added.add(residual, windows, i, values);\n          relu(params.epilogue.relu, values);",
        "relu(params.epilogue.relu, values);\n          added.add(residual, windows, i, values);",
        FUSED_VALUES,
    ),
    mutant(
        "ReLU: NaN becomes 0",
        "kernels/epilogue.cuh",
        "return value < 0 ? Real(0) : value;",
        "return value > 0 ? value : Real(0);",
        FUSED_VALUES,
    ),
    mutant(
        "ReLU: an x whose y is 0 is in the interval that lets gradients through",
        "kernels/epilogue.cuh",
        "bias))) <= 0); };",
        "bias))) < 0); };",
        INTERVALS,
    ),
    mutant(
        "ReLU, backward: the end of the interval is not let through",
        "kernels/relu_gate.cuh",
        "return side < edge[column] ? Real(0) : g;",
        "return side <= edge[column] ? Real(0) : g;",
        INTERVALS,
    ),
    mutant(
        "ReLU, backward: the sums are of gradients that it had stopped",
        "kernels/grad_sums.cuh",
        "const Real gradient = gate(element, xs[i][element], gs[i][element]);",
        "const Real gradient = gs[i][element];",
        FUSED_VALUES,
    ),
    mutant(
        "backward: wrong sign of the projection",
        "kernels/grad_input.cuh",
        "value = fused_multiply_add(-deviation, slope[column], value - mean_g[column]);",
        "value = fused_multiply_add(deviation, slope[column], value - mean_g[column]);",
        STREAMING,
    ),
    mutant(
        "backward: the weight is ignored",
        "kernels/grad_input.cuh",
        "scale[column] = static_cast<Real>(read_or(params.weight, channel, 1) * invstd);",
        "scale[column] = static_cast<Real>(invstd);",
        STREAMING,
    ),
    mutant(
        "ranks: a single value in all moves the running statistics",
        "kernels/ranks.cuh",
        "} else if (all.count == 1) {",
        "} else if (all.count < 1) {",
        RANKS,
    ),
    mutant(
        "resident: the batch is counted whenever as many blocks as a group has are done",
        "kernels/resident.cuh",
        "last_to_arrive(&residence.barrier_words[0].value, grid_blocks());",
        "last_to_arrive(&residence.barrier_words[0].value, static_cast<unsigned>(residence.members));",
        RESIDENT_SETTINGS,
    ),
    mutant(
        "resident forward: a cumulative average does not count the batch itself",
        "kernels/resident_forward.cuh",
        "params.results.cumulative ? load(params.num_batches_tracked) + 1 : 0;",
        "params.results.cumulative ? load(params.num_batches_tracked) : 0;",
        RESIDENT_SETTINGS,
    ),
    mutant(
        "resident forward: every member moves the running statistics",
        "kernels/resident_forward.cuh",
        "      if (residence.divided || member.rank == 0) {\n",
        "      {\n",
        RESIDENT,
    ),
    mutant(
        "resident forward: the mean's distance from its pivot is rounded to float",
        "kernels/resident_forward.cuh",
        "const double shift = all.first / count;",
        "const double shift = static_cast<float>(all.first / count);",
        RESIDENT_SEEDS,
    ),
    mutant(
        "resident forward: a residual that is not aligned is loaded by vectors",
        "kernels/resident_forward.cuh",
        "added_wide && Walker_::is_wide(walk, out, lead)};",
        "Walker_::is_wide(walk, out, lead)};",
        FUSED_ALIGNMENTS,
    ),
    mutant(
        "resident backward: the sum of gradients is divided by the elements of the share",
        "kernels/resident_backward.cuh",
        "const double mean_g = all.first / params.elements_per_channel;",
        "const double mean_g = all.first / static_cast<double>(walker.elements());",
        RESIDENT,
    ),
    mutant(
        "resident backward: the two means are swapped where they are recalled",
        "kernels/resident_backward.cuh",
        "set(local, read(params.mean_g, channel), read(params.mean_g_xhat, channel));",
        "set(local, read(params.mean_g_xhat, channel), read(params.mean_g, channel));",
        RESIDENT,
    ),
    mutant(
        "resident backward: sums that overflow are not rescued",
        "kernels/resident_backward.cuh",
        "      if (sums.needs_rescue()) sum_rescued(x, g, walker, first, count, mean, gate, sums);\n",
        "",
        RESIDENT_OVERFLOW,
    ),
]

SEQUENCES = [  # launches, their arguments and their scratch memory
    mutant(
        "streaming backward: no sums for the gradient of the bias alone",
        "paths/streaming.h",
        "needs_means || args.grad_weight.data != nullptr || args.grad_bias.data != nullptr;",
        "needs_means || args.grad_weight.data != nullptr;",
        SETTINGS,
    ),
    mutant(
        "streaming backward: no scratch memory for the two means",
        "paths/streaming.h",
        "return (kFields<Sums> * plan.walk.chunks + 2) * plan.walk.channels;",
        "return kFields<Sums> * plan.walk.chunks * plan.walk.channels;",
        STREAMING,
    ),
    mutant(
        "inference: the epilogue is forgotten",
        "paths/streaming.h",
        "      .invstd_out = args.invstd,\n      .epilogue = args.epilogue,\n",
        "      .invstd_out = args.invstd,\n",
        FUSED_VALUES,
    ),
    mutant(
        "resident backward: no scratch memory for the means of a divided exchange",
        "paths/resident.h",
        "return (kFields<Sums> * plan.members + (plan.divided ? 2 : 0)) * plan.walk.channels;",
        "return kFields<Sums> * plan.members * plan.walk.channels;",
        RESIDENT,
    ),
    mutant(
        "ranks: the sums that a rank sends are divided by its own elements",
        "paths/sync.h",
        ".elements_per_channel = 1,  // the sums themselves: how many elements there are the ranks only know together",
        ".elements_per_channel = static_cast<double>(args.problem.elements_per_channel()),",
        RANKS,
    ),
]

MUTANTS: list[Mutant] = WALKS + REDUCTIONS + RESULTS + SEQUENCES
