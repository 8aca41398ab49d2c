"""Faults of the plans: how an array is cut, what fits on a device, which path is taken and what it is said to move."""

from __future__ import annotations

from . import Build, Mutant

RESIDENT_PLAN = "tests/plan/test_plan_persistent.py"

STREAMING = ("tests/plan/test_plan.py", "-k", "streaming")
LIMITS = (RESIDENT_PLAN, "-k", "limits_hold or shares_cover or cooperative")
PACKED_ROWS = ("tests/plan/test_plan_persistent.py", "-k", "packed_rows")
COUNTED = (RESIDENT_PLAN, "-k", "kernel_counts")
BYTES = (RESIDENT_PLAN, "-k", "test_bytes or inference")
# On the host execution, its plain build alone.
SIMT_STREAMING = ("tests/cuda/test_simt.py", "-m", "not slow", "-k", "blocks_and_chunks")
SIMT_TAILS = ("tests/cuda/test_simt_persistent_inputs.py", "-k", "(tails or cumulative) and not tsan")


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...], build: Build = Build.EXTENSION) -> Mutant:
    return Mutant(fault, f"csrc/{file}", old, new, tests, build)


WALKS = [
    mutant(
        "walk: a row that starts anywhere has a window too few",
        "plan/partition.cpp",
        "return ceil_div(problem.inner - 1, vector) + 1;",
        "return ceil_div(problem.inner, vector);",
        STREAMING,
    ),
    mutant(
        "walk: rows of whole vectors are taken for aligned wherever the tensor starts",
        "plan/partition.cpp",
        "if (aligned && problem.inner % vector == 0) return problem.inner / vector;",
        "if (problem.inner % vector == 0) return problem.inner / vector;",
        STREAMING,
    ),
    mutant(
        "walk: as many chunks as were asked for, of which some are empty",
        "plan/partition.cpp",
        "partition.splits = ceil_div(units, partition.split_size);",
        "partition.splits = splits;",
        STREAMING,
    ),
    mutant(
        "walk: a chunk may have more windows than 32 bits count",
        "plan/partition.cpp",
        "partition.split_size = std::min(ceil_div(units, splits), kMaxSplitSize);",
        "partition.split_size = ceil_div(units, splits);",
        STREAMING,
    ),
    mutant(
        "walk: a step's rows are rounded up",
        "plan/partition.cpp",
        "partition.step_rows = block / vectors;",
        "partition.step_rows = ceil_div(block, vectors);",
        STREAMING,
    ),
    mutant(
        "packed: a slab has as many channels as its vectors have elements",
        "plan/partition.cpp",
        "static_cast<int>(threads_c * vector_elements(problem.dtype) / problem.inner);",
        "static_cast<int>(threads_c * vector_elements(problem.dtype));",
        LIMITS,
    ),
    mutant(
        "walk: the last slab, which has fewer channels, is forgotten",
        "plan/partition.cpp",
        "make_divisor(ceil_div(problem.channels, partition.tile_channels));",
        "make_divisor(std::max<int64_t>(1, problem.channels / partition.tile_channels));",
        STREAMING,
    ),
    mutant(
        "joins: more lanes than a warp has threads",
        "plan/partition.cpp",
        "return power_of_two_at_least(channels, std::min(threads_c, kPlanWarp));",
        "return power_of_two_at_least(channels, threads_c);",
        STREAMING,
    ),
]

STREAMS = [
    mutant(
        "streaming: a thread's chain of float64 sums has no limit",
        "plan/two_pass.cpp",
        "return make_two_pass(problem, aligned, block, std::max(splits, needed));",
        "return make_two_pass(problem, aligned, block, splits);",
        STREAMING,
    ),
    mutant(
        "streaming: more blocks than a grid may have",
        "plan/two_pass.cpp",
        "plan.tile_launch = {std::min(plan.partition.channel_tiles.value * plan.partition.splits, kMaxGrid), block};",
        "plan.tile_launch = {plan.partition.channel_tiles.value * plan.partition.splits, block};",
        STREAMING,
    ),
    mutant(
        "streaming: a small channel's block is of no whole warps",
        "plan/two_pass.cpp",
        "ceil_div(tile_units(problem, Layout::kChannelsFirst, aligned), kPlanWarp) * kPlanWarp;",
        "tile_units(problem, Layout::kChannelsFirst, aligned);",
        STREAMING,
    ),
    mutant(
        "streaming: as many chunks are joined as were asked for, not as there are",
        "plan/two_pass.cpp",
        "plan.finalize = {problem.channels, plan.partition.splits, ",
        "plan.finalize = {problem.channels, std::max<int64_t>(1, splits), ",
        SIMT_STREAMING,
        Build.SIMT,
    ),
]

RESIDENTS = [
    mutant(
        "resident: as many members as were asked for, of which some have no share",
        "plan/persistent.cpp",
        "plan.group_size = static_cast<int>(plan.partition.splits);",
        "plan.group_size = choice.group_size;",
        SIMT_TAILS,
        Build.SIMT,
    ),
    mutant(
        "resident: a cooperative launch leaves no multiprocessor to others",
        "plan/persistent.cpp",
        "const int cooperating = limits.multiprocessors - limits.multiprocessors / kSparedOf;",
        "const int cooperating = limits.multiprocessors;",
        LIMITS,
    ),
    mutant(
        "resident: what the kernel takes of shared memory for itself is given away",
        "plan/persistent.cpp",
        "limits.shared_reserved, limits.shared_per_block) -\n      persistent_overhead(shape.layout);",
        "limits.shared_reserved, limits.shared_per_block);",
        LIMITS,
    ),
    mutant(
        "resident: shared memory for one tensor where two are kept",
        "plan/persistent.cpp",
        "int64_t{kVectorBytes} * choice.block * choice.cached_vectors * tensors_read(pass);",
        "int64_t{kVectorBytes} * choice.block * choice.cached_vectors;",
        LIMITS,
    ),
    mutant(
        "resident: a share is centred on however little of it is kept",
        "plan/persistent.cpp",
        "if (cached_vectors * kMinCachedShare < vectors) return {{}, -1};",
        "if (cached == 0) return {{}, -1};",
        LIMITS,
    ),
    mutant(
        "resident: a thread's chain of float64 sums has no limit",
        "plan/persistent.cpp",
        "  if (problem.dtype == Dtype::kFloat64 && vectors > kMaxVectorsPerThreadFloat64) return {{}, -1};\n",
        "",
        LIMITS,
    ),
    mutant(
        "resident: as many slabs as a kernel counts are too many",
        "plan/persistent.cpp",
        "partition.channel_tiles.value > kMaxChannelTiles ||",
        "partition.channel_tiles.value >= kMaxChannelTiles ||",
        COUNTED,
    ),
    mutant(
        "resident: rows may be longer than a kernel counts",
        "plan/persistent.cpp",
        "if (partition.channel_tiles.value > kMaxChannelTiles || problem.inner > kMaxPersistentRow) return {{}, -1};",
        "if (partition.channel_tiles.value > kMaxChannelTiles) return {{}, -1};",
        COUNTED,
    ),
    mutant(
        "packed: rows shorter than a vector, which then holds elements of more than two channels",
        "plan/persistent.cpp",
        "if (!aligned || problem.inner < vector || problem.channels",
        "if (!aligned || problem.channels",
        PACKED_ROWS,
    ),
    mutant(
        "packed: a tensor that is not aligned is walked by whole vectors",
        "plan/persistent.cpp",
        "if (!aligned || problem.inner < vector || problem.channels",
        "if (problem.inner < vector || problem.channels",
        LIMITS,
    ),
    mutant(
        "clusters: of 8 members on a device that has none",
        "plan/persistent.cpp",
        "std::min<int64_t>(limits.max_cluster, shares);",
        "std::min<int64_t>(8, shares);",
        LIMITS,
    ),
    mutant(
        "clusters: as if one could lie across the device's processing clusters",
        "plan/persistent.cpp",
        "return whole * (kClusterMultiprocessors * room.beside / group_size) + rest * room.beside / group_size;",
        "return (whole * kClusterMultiprocessors + rest) * room.beside / group_size;",
        LIMITS,
    ),
    mutant(
        "resident: blocks wait for each other though the device has no cooperative launch",
        "plan/persistent.cpp",
        "limits.cooperative_launch ? std::min(room.cooperating, shares) : 1;",
        "std::min(room.cooperating, shares);",
        LIMITS,
    ),
]

PREDICTIONS = [
    mutant(
        "bytes: the last member's share is taken for one of full size",
        "plan/persistent.cpp",
        "const int64_t last = units - (plan.partition.splits - 1) * plan.partition.split_size;",
        "const int64_t last = plan.partition.split_size;",
        BYTES,
    ),
    mutant(
        "bytes: one member alone recalls the results of a divided exchange",
        "plan/persistent.cpp",
        "Traffic{partials + 2 * bytes * plan.group_size, partials + 2 * bytes};",
        "Traffic{partials + 2 * bytes, partials + 2 * bytes};",
        BYTES,
    ),
    mutant(
        "bytes: the backward of inference reads the gradient once",
        "plan/persistent.cpp",
        "reads_x ? read : read + tensor, tensor};",
        "read, tensor};",
        BYTES,
    ),
    mutant(
        "bytes: inference is said to read two tensors",
        "plan/plan.h",
        "return pass == Pass::kForwardTrain || pass == Pass::kForwardEval ? 1 : 2; }",
        "return pass == Pass::kForwardTrain ? 1 : 2; }",
        BYTES,
    ),
    mutant(
        "choice: the streaming path is asked for in vain",
        "plan/persistent.cpp",
        "                : options.force_two_pass    ? Reason::kForced\n",
        "",
        STREAMING,
    ),
]

MUTANTS: list[Mutant] = WALKS + STREAMS + RESIDENTS + PREDICTIONS
