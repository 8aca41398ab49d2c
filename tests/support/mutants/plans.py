"""Faults of the plans: the partition of an array, device limits, the choice of path, and the predicted bytes."""

from __future__ import annotations

from . import Build, Mutant

PERSISTENT_PLAN = "tests/plan/test_plan_persistent.py"

TWO_PASS = ("tests/plan/test_plan.py", "-k", "two_pass")
LIMITS = (PERSISTENT_PLAN, "-k", "limits_hold or work_tiles_cover or cooperative")
PACKED_ROWS = ("tests/plan/test_plan_persistent.py", "-k", "packed_rows")
COUNTED = (PERSISTENT_PLAN, "-k", "kernel_counts")
BYTES = (PERSISTENT_PLAN, "-k", "test_bytes or inference")
# On the host execution, in its plain build only.
SIMT_TWO_PASS = ("tests/cuda/test_simt.py", "-m", "not slow", "-k", "blocks_and_splits")
SIMT_TAILS = ("tests/cuda/test_simt_persistent_inputs.py", "-k", "(tails or cumulative) and not tsan")


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...], build: Build = Build.EXTENSION) -> Mutant:
    return Mutant(fault, f"csrc/{file}", old, new, tests, build)


PARTITIONS = [
    mutant(
        "partition: an unaligned row has one vector too few",
        "plan/partition.cpp",
        "return ceil_div(problem.inner - 1, vector) + 1;",
        "return ceil_div(problem.inner, vector);",
        TWO_PASS,
    ),
    mutant(
        "partition: rows of full vectors count as aligned for any tensor address",
        "plan/partition.cpp",
        "if (aligned && problem.inner % vector == 0) return problem.inner / vector;",
        "if (problem.inner % vector == 0) return problem.inner / vector;",
        TWO_PASS,
    ),
    mutant(
        "partition: the requested number of splits is used even if some are empty",
        "plan/partition.cpp",
        "partition.splits = ceil_div(units, partition.split_size);",
        "partition.splits = splits;",
        TWO_PASS,
    ),
    mutant(
        "partition: a split may have more vectors than 32 bits can count",
        "plan/partition.cpp",
        "partition.split_size = std::min(ceil_div(units, splits), kMaxSplitSize);",
        "partition.split_size = ceil_div(units, splits);",
        TWO_PASS,
    ),
    mutant(
        "partition: the rows of a step are rounded up",
        "plan/partition.cpp",
        "partition.step_rows = block / vectors;",
        "partition.step_rows = ceil_div(block, vectors);",
        TWO_PASS,
    ),
    mutant(
        "packed: a channel tile has as many channels as its vectors have elements",
        "plan/partition.cpp",
        "static_cast<int>(threads_c * vector_elements(problem.dtype) / problem.inner);",
        "static_cast<int>(threads_c * vector_elements(problem.dtype));",
        LIMITS,
    ),
    mutant(
        "partition: the partial last channel tile is omitted",
        "plan/partition.cpp",
        "make_divisor(ceil_div(problem.channels, partition.tile_channels));",
        "make_divisor(std::max<int64_t>(1, problem.channels / partition.tile_channels));",
        TWO_PASS,
    ),
    mutant(
        "finalize: more threads along C than a warp has",
        "plan/partition.cpp",
        "return power_of_two_at_least(channels, std::min(threads_c, kPlanWarp));",
        "return power_of_two_at_least(channels, threads_c);",
        TWO_PASS,
    ),
]

TWO_PASS_PLANS = [
    mutant(
        "two-pass: a thread's chain of float64 sums has no limit",
        "plan/two_pass.cpp",
        "return make_two_pass(problem, aligned, block, std::max(splits, needed));",
        "return make_two_pass(problem, aligned, block, splits);",
        TWO_PASS,
    ),
    mutant(
        "two-pass: more blocks than the maximum grid size",
        "plan/two_pass.cpp",
        "plan.tile_launch = {std::min(plan.partition.channel_tiles.value * plan.partition.splits, kMaxGrid), block};",
        "plan.tile_launch = {plan.partition.channel_tiles.value * plan.partition.splits, block};",
        TWO_PASS,
    ),
    mutant(
        "two-pass: the block of a small channel is not rounded up to full warps",
        "plan/two_pass.cpp",
        "ceil_div(tile_units(problem, Layout::kChannelsFirst, aligned), kPlanWarp) * kPlanWarp;",
        "tile_units(problem, Layout::kChannelsFirst, aligned);",
        TWO_PASS,
    ),
    mutant(
        "two-pass: the requested number of splits is combined instead of the actual one",
        "plan/two_pass.cpp",
        "plan.finalize = {problem.channels, plan.partition.splits, ",
        "plan.finalize = {problem.channels, std::max<int64_t>(1, splits), ",
        SIMT_TWO_PASS,
        Build.SIMT,
    ),
]

PERSISTENT_PLANS = [
    mutant(
        "persistent: the requested group size is used even if some CTAs have no work tile",
        "plan/persistent.cpp",
        "plan.group_size = static_cast<int>(plan.partition.splits);",
        "plan.group_size = choice.group_size;",
        SIMT_TAILS,
        Build.SIMT,
    ),
    mutant(
        "persistent: a cooperative launch leaves no multiprocessor to other kernels",
        "plan/persistent.cpp",
        "const int cooperating = limits.multiprocessors - limits.multiprocessors / kSparedOf;",
        "const int cooperating = limits.multiprocessors;",
        LIMITS,
    ),
    mutant(
        "persistent: the kernel's own shared memory is not subtracted",
        "plan/persistent.cpp",
        "limits.shared_reserved, limits.shared_per_block) -\n      persistent_overhead(shape.layout);",
        "limits.shared_reserved, limits.shared_per_block);",
        LIMITS,
    ),
    mutant(
        "persistent: shared memory for one tensor although two are cached",
        "plan/persistent.cpp",
        "int64_t{kVectorBytes} * choice.block * choice.cached_vectors * tensors_read(pass);",
        "int64_t{kVectorBytes} * choice.block * choice.cached_vectors;",
        LIMITS,
    ),
    mutant(
        "persistent: the pivot's sample has no minimum size",
        "plan/persistent.cpp",
        "if (cached_vectors * kMinCachedShare < vectors) return {{}, -1};",
        "if (cached == 0) return {{}, -1};",
        LIMITS,
    ),
    mutant(
        "persistent: a thread's chain of float64 sums has no limit",
        "plan/persistent.cpp",
        "  if (problem.dtype == Dtype::kFloat64 && vectors > kMaxVectorsPerThreadFloat64) return {{}, -1};\n",
        "",
        LIMITS,
    ),
    mutant(
        "persistent: the largest number of channel tiles that a kernel can count is rejected",
        "plan/persistent.cpp",
        "partition.channel_tiles.value > kMaxChannelTiles ||",
        "partition.channel_tiles.value >= kMaxChannelTiles ||",
        COUNTED,
    ),
    mutant(
        "persistent: rows may be longer than a kernel can count",
        "plan/persistent.cpp",
        "if (partition.channel_tiles.value > kMaxChannelTiles || problem.inner > kMaxPersistentRow) return {{}, -1};",
        "if (partition.channel_tiles.value > kMaxChannelTiles) return {{}, -1};",
        COUNTED,
    ),
    mutant(
        "packed: rows may be shorter than a vector, so that it holds elements of more than two channels",
        "plan/persistent.cpp",
        "if (!aligned || problem.inner < vector || problem.channels",
        "if (!aligned || problem.channels",
        PACKED_ROWS,
    ),
    mutant(
        "packed: an unaligned tensor is accessed by full vectors",
        "plan/persistent.cpp",
        "if (!aligned || problem.inner < vector || problem.channels",
        "if (problem.inner < vector || problem.channels",
        LIMITS,
    ),
    mutant(
        "clusters: clusters of 8 on a device without cluster support",
        "plan/persistent.cpp",
        "std::min<int64_t>(limits.max_cluster, max_group_size);",
        "std::min<int64_t>(8, max_group_size);",
        LIMITS,
    ),
    mutant(
        "clusters: a cluster may span several processing clusters of the device",
        "plan/persistent.cpp",
        "return whole * (kClusterMultiprocessors * room.beside / group_size) + rest * room.beside / group_size;",
        "return (whole * kClusterMultiprocessors + rest) * room.beside / group_size;",
        LIMITS,
    ),
    mutant(
        "persistent: blocks wait for each other on a device without cooperative launch",
        "plan/persistent.cpp",
        "limits.cooperative_launch ? std::min(room.cooperating, max_group_size) : 1;",
        "std::min(room.cooperating, max_group_size);",
        LIMITS,
    ),
]

PREDICTIONS = [
    mutant(
        "bytes: the last CTA's work tile counts as full",
        "plan/persistent.cpp",
        "const int64_t last = units - (plan.partition.splits - 1) * plan.partition.split_size;",
        "const int64_t last = plan.partition.split_size;",
        BYTES,
    ),
    mutant(
        "bytes: only one CTA reloads the results of a two-shot exchange",
        "plan/persistent.cpp",
        "Traffic{partials + 2 * bytes * plan.group_size, partials + 2 * bytes};",
        "Traffic{partials + 2 * bytes, partials + 2 * bytes};",
        BYTES,
    ),
    mutant(
        "bytes: the backward of inference reads the gradient only once",
        "plan/persistent.cpp",
        "reads_x ? read : read + tensor, tensor};",
        "read, tensor};",
        BYTES,
    ),
    mutant(
        "bytes: inference reads two tensors",
        "plan/plan.h",
        "return pass == Pass::kForwardTrain || pass == Pass::kForwardEval ? 1 : 2; }",
        "return pass == Pass::kForwardTrain ? 1 : 2; }",
        BYTES,
    ),
    mutant(
        "choice: a request for the two-pass path is ignored",
        "plan/persistent.cpp",
        "                : options.force_two_pass    ? Reason::kForced\n",
        "",
        TWO_PASS,
    ),
]

MUTANTS: list[Mutant] = PARTITIONS + TWO_PASS_PLANS + PERSISTENT_PLANS + PREDICTIONS
