"""Faults of the plans: how an array is cut, what fits on a device, which path is taken and what it is said to move."""

from __future__ import annotations

from . import Build, Mutant

RESIDENT_PLAN = "tests/test_plan_resident.py"

STREAMING = ("tests/test_plan.py", "-k", "streaming")
LIMITS = (RESIDENT_PLAN, "-k", "limits_hold or shares_cover or cooperative")
COUNTED = (RESIDENT_PLAN, "-k", "kernel_counts")
BYTES = (RESIDENT_PLAN, "-k", "test_bytes or inference")
# On the host execution, its plain build alone.
SIMT_STREAMING = ("tests/test_simt.py", "-m", "not slow", "-k", "blocks_and_chunks")
SIMT_TAILS = ("tests/test_simt_resident_inputs.py", "-k", "(tails or cumulative) and not tsan")


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...], build: Build = Build.EXTENSION) -> Mutant:
    return Mutant(fault, f"csrc/{file}", old, new, tests, build)


WALKS = [
    mutant(
        "walk: a row that starts anywhere has a window too few",
        "plan_walk.cpp",
        "return ceil_div(problem.inner - 1, vector) + 1;",
        "return ceil_div(problem.inner, vector);",
        STREAMING,
    ),
    mutant(
        "walk: rows of whole vectors are taken for aligned wherever the tensor starts",
        "plan_walk.cpp",
        "if (aligned && problem.inner % vector == 0) return problem.inner / vector;",
        "if (problem.inner % vector == 0) return problem.inner / vector;",
        STREAMING,
    ),
    mutant(
        "walk: as many chunks as were asked for, of which some are empty",
        "plan_walk.cpp",
        "walk.chunks = ceil_div(units, walk.chunk_size);",
        "walk.chunks = chunks;",
        STREAMING,
    ),
    mutant(
        "walk: a chunk may have more windows than 32 bits count",
        "plan_walk.cpp",
        "walk.chunk_size = std::min(ceil_div(units, chunks), kMaxChunkSize);",
        "walk.chunk_size = ceil_div(units, chunks);",
        STREAMING,
    ),
    mutant(
        "walk: a step's rows are rounded up",
        "plan_walk.cpp",
        "walk.step_rows = block / windows;",
        "walk.step_rows = ceil_div(block, windows);",
        STREAMING,
    ),
    mutant(
        "packed: a slab has as many channels as its vectors have elements",
        "plan_walk.cpp",
        "static_cast<int>(lanes * vector_elements(problem.dtype) / problem.inner);",
        "static_cast<int>(lanes * vector_elements(problem.dtype));",
        LIMITS,
    ),
    mutant(
        "walk: the last slab, which has fewer channels, is forgotten",
        "plan_walk.cpp",
        "make_divisor(ceil_div(problem.channels, walk.slab_channels));",
        "make_divisor(std::max<int64_t>(1, problem.channels / walk.slab_channels));",
        STREAMING,
    ),
    mutant(
        "joins: more lanes than a warp has threads",
        "plan_walk.cpp",
        "return power_of_two_at_least(channels, std::min(lanes, kPlanWarp));",
        "return power_of_two_at_least(channels, lanes);",
        STREAMING,
    ),
]

STREAMS = [
    mutant(
        "streaming: a thread's chain of float64 sums has no limit",
        "plan_streaming.cpp",
        "return make_streaming(problem, aligned, block, std::max(chunks, needed));",
        "return make_streaming(problem, aligned, block, chunks);",
        STREAMING,
    ),
    mutant(
        "streaming: more blocks than a grid may have",
        "plan_streaming.cpp",
        "plan.walk_launch = {std::min(plan.walk.slabs.value * plan.walk.chunks, kMaxGrid), block};",
        "plan.walk_launch = {plan.walk.slabs.value * plan.walk.chunks, block};",
        STREAMING,
    ),
    mutant(
        "streaming: a small channel's block is of no whole warps",
        "plan_streaming.cpp",
        "ceil_div(slab_units(problem, Layout::kChannelsFirst, aligned), kPlanWarp) * kPlanWarp;",
        "slab_units(problem, Layout::kChannelsFirst, aligned);",
        STREAMING,
    ),
    mutant(
        "streaming: as many chunks are joined as were asked for, not as there are",
        "plan_streaming.cpp",
        "plan.finish = {problem.channels, plan.walk.chunks, ",
        "plan.finish = {problem.channels, std::max<int64_t>(1, chunks), ",
        SIMT_STREAMING,
        Build.SIMT,
    ),
]

RESIDENTS = [
    mutant(
        "resident: as many members as were asked for, of which some have no share",
        "plan_resident.cpp",
        "plan.members = static_cast<int>(plan.walk.chunks);",
        "plan.members = choice.members;",
        SIMT_TAILS,
        Build.SIMT,
    ),
    mutant(
        "resident: a cooperative launch leaves no multiprocessor to others",
        "plan_resident.cpp",
        "const int cooperating = limits.multiprocessors - limits.multiprocessors / kSparedOf;",
        "const int cooperating = limits.multiprocessors;",
        LIMITS,
    ),
    mutant(
        "resident: what the kernel takes of shared memory for itself is given away",
        "plan_resident.cpp",
        "limits.shared_reserved, limits.shared_per_block) -\n      resident_overhead(shape.layout);",
        "limits.shared_reserved, limits.shared_per_block);",
        LIMITS,
    ),
    mutant(
        "resident: shared memory for one tensor where two are kept",
        "plan_resident.cpp",
        "int64_t{kVectorBytes} * choice.block * choice.kept * tensors_read(pass);",
        "int64_t{kVectorBytes} * choice.block * choice.kept;",
        LIMITS,
    ),
    mutant(
        "resident: a share is centred on however little of it is kept",
        "plan_resident.cpp",
        "if (kept * kLeastKept < windows) return {{}, -1};",
        "if (kept == 0) return {{}, -1};",
        LIMITS,
    ),
    mutant(
        "resident: a thread's chain of float64 sums has no limit",
        "plan_resident.cpp",
        "  if (problem.dtype == Dtype::kFloat64 && windows > kMaxWindowsPerThreadFloat64) return {{}, -1};\n",
        "",
        LIMITS,
    ),
    mutant(
        "resident: as many slabs as a kernel counts are too many",
        "plan_resident.cpp",
        "walk.slabs.value > kMaxSlabs ||",
        "walk.slabs.value >= kMaxSlabs ||",
        COUNTED,
    ),
    mutant(
        "resident: rows may be longer than a kernel counts",
        "plan_resident.cpp",
        "if (walk.slabs.value > kMaxSlabs || problem.inner > kMaxResidentRow) return {{}, -1};",
        "if (walk.slabs.value > kMaxSlabs) return {{}, -1};",
        COUNTED,
    ),
    mutant(
        "packed: rows shorter than a vector, which then holds elements of more than two channels",
        "plan_resident.cpp",
        "if (!aligned || problem.inner < vector || problem.channels",
        "if (!aligned || problem.channels",
        LIMITS,
    ),
    mutant(
        "packed: a tensor that is not aligned is walked by whole vectors",
        "plan_resident.cpp",
        "if (!aligned || problem.inner < vector || problem.channels",
        "if (problem.inner < vector || problem.channels",
        LIMITS,
    ),
    mutant(
        "clusters: of 8 members on a device that has none",
        "plan_resident.cpp",
        "std::min<int64_t>(limits.max_cluster, shares);",
        "std::min<int64_t>(8, shares);",
        LIMITS,
    ),
    mutant(
        "clusters: as if one could lie across the device's processing clusters",
        "plan_resident.cpp",
        "return whole * (kClusterMultiprocessors * room.beside / members) + rest * room.beside / members;",
        "return (whole * kClusterMultiprocessors + rest) * room.beside / members;",
        LIMITS,
    ),
    mutant(
        "resident: blocks wait for each other though the device has no cooperative launch",
        "plan_resident.cpp",
        "limits.cooperative_launch ? std::min(room.cooperating, shares) : 1;",
        "std::min(room.cooperating, shares);",
        LIMITS,
    ),
]

PREDICTIONS = [
    mutant(
        "bytes: the last member's share is taken for one of full size",
        "plan_resident.cpp",
        "const int64_t last = units - (plan.walk.chunks - 1) * plan.walk.chunk_size;",
        "const int64_t last = plan.walk.chunk_size;",
        BYTES,
    ),
    mutant(
        "bytes: one member alone recalls the results of a divided exchange",
        "plan_resident.cpp",
        "Traffic{partials + 2 * bytes * plan.members, partials + 2 * bytes};",
        "Traffic{partials + 2 * bytes, partials + 2 * bytes};",
        BYTES,
    ),
    mutant(
        "bytes: the backward of inference reads the gradient once",
        "plan_resident.cpp",
        "reads_x ? read : read + tensor, tensor};",
        "read, tensor};",
        BYTES,
    ),
    mutant(
        "bytes: inference is said to read two tensors",
        "plan.h",
        "return pass == Pass::kForwardTrain || pass == Pass::kForwardEval ? 1 : 2; }",
        "return pass == Pass::kForwardTrain ? 1 : 2; }",
        BYTES,
    ),
    mutant(
        "choice: the streaming path is asked for in vain",
        "plan_resident.cpp",
        "                : options.force_streaming   ? Reason::kForced\n",
        "",
        STREAMING,
    ),
]

MUTANTS: list[Mutant] = WALKS + STREAMS + RESIDENTS + PREDICTIONS
