"""Faults of the CPU backend: its kernels, partition, schedule, statistics and result cache."""

from __future__ import annotations

from . import Build, Mutant

BACKEND = "tests/cpu/test_cpu_backend.py"
FUSED = "tests/cpu/test_fused_cpu.py"
MEMORY = "tests/cpu/test_cpu_memory.py"

# Selections that finish within a minute.
RUNS = (BACKEND, "-k", "every_length_of_a_run")
RUN_NUMBERS = (BACKEND, "-k", "every_number_of_runs")
COLUMNS = (BACKEND, "-k", "every_number_of")
SCHEDULES = (BACKEND, "-k", "threads_or_repetition and float32")
STATE = (BACKEND, "-k", "running_statistics_and_counter")
ROUNDED_ONCE = (BACKEND, "-k", "rounded_once")
LEVELS = (BACKEND, "-k", "every_level")
BEYOND_FLOAT = (BACKEND, FUSED, "-k", "beyond_float or tiny_eps")
FUSED_LENGTHS = (FUSED, "-k", "every_length_of_a_run and float32")
NOT_FINITE = (FUSED, "-k", "not_finite")
PAST_CACHE = (FUSED, "-k", "past_the_cache and float32")
RELU_BOUNDS = (FUSED, "-k", "(relu_bounds and columns) or rounds_to_zero")
ONE_NAN = ("tests/numerics/test_numerics.py", "-k", "cpu and (one_nan or one_inf or any_case)")
RANKS = ("tests/distributed/test_sync_ops.py", "-k", "settings or order_of_ranks")
ONE_VALUE = ("tests/distributed/test_sync.py", "-k", "too_little_data")
NO_MEMORY = ("tests/numerics/test_faults.py", "-k", "allocation")
CACHE = (MEMORY, "-k", "not forked and not wrong_limit")
FORKED = (MEMORY, "-k", "forked")
SCRATCH = (MEMORY, "-k", "overrun")


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(fault, f"csrc/cpu/{file}", old, new, tests, Build.EXTENSION)


KERNELS = [  # files that each SIMD level compiles
    mutant(
        "rows: with streaming stores, the elements before the first aligned address are not written",
        "simd/row_kernels.h",
        "      visitor.template whole<Write::kCached>(0);\n      i = (kStreamAlignment",
        "      i = (kStreamAlignment",
        PAST_CACHE,
    ),
    mutant(
        "columns: the ReLU mask is applied to the whole gradient instead of g alone",
        "simd/column_kernels.h",
        "return scale * (epilogue(load_span<kWhole>(g + at, span), value) - mean_g - projection);",
        "return scale * epilogue(load_span<kWhole>(g + at, span) - mean_g - projection, value);",
        FUSED_LENGTHS,
    ),
    mutant(
        "columns: sums that overflow float are recomputed with the vectors of the first span's column",
        "simd/column_kernels.h",
        "exact_sums(g + c, x + c, Tile{tile.rows, 1, tile.stride}, vectors, c);",
        "exact_sums(g + c, x + c, Tile{tile.rows, 1, tile.stride}, vectors, j);",
        BEYOND_FLOAT,
    ),
    mutant(
        "columns: the SIMD lanes that the last span shares with the previous one are counted twice",
        "simd/column_spans.h",
        "return {begin, static_cast<int>(s * kCount - begin), static_cast<int>(kCount)};",
        "return {begin, 0, static_cast<int>(kCount)};",
        COLUMNS,
    ),
    mutant(
        "bfloat16: ties are rounded away from zero instead of to even",
        "simd/lanes.h",
        "const NativeUint32 half = ((bits >> 16) & 1u) + 0x7fffu;",
        "const NativeUint32 half = NativeUint32{} + 0x8000u;",
        LEVELS,
    ),
    mutant(
        "bfloat16: NaN is rounded like a number",
        "simd/lanes.h",
        "return bits + (half & (NativeUint32)(a == a));",
        "return bits + half;",
        LEVELS,
    ),
    mutant(
        "bfloat16: the mask of an odd number of tail elements lacks the last one",
        "simd/lanes.h",
        "interleaved ? (remainder + 1) / 2 :",
        "interleaved ? remainder / 2 :",
        RUNS,
    ),
    mutant(
        "ReLU bounds: the lower bound itself is masked",
        "simd/lanes.h",
        "(x.part[p] < low.part[p]) |",
        "(x.part[p] <= low.part[p]) |",
        NOT_FINITE,
    ),
    mutant(
        "columns: an infinite sum counts as finite",
        "simd/level.h",
        "(bits & 0x7fffffff) >= 0x7f800000 ? 1 : 0",
        "(bits & 0x7fffffff) > 0x7f800000 ? 1 : 0",
        BEYOND_FLOAT,
    ),
    mutant(
        "float64: a sum of squares that is NaN becomes 0",
        "simd/level.h",
        "return value < 0 ? 0 : value;",
        "return value > 0 ? value : 0;",
        ONE_NAN,
    ),
    mutant(
        "bfloat16 parameters are rounded twice, through float",
        "simd/scalar.h",
        "to_bfloat16(to_odd_float(value));",
        "to_bfloat16(static_cast<float>(value));",
        ROUNDED_ONCE,
    ),
]

PARTITION = [
    mutant(
        "rows: a partial last tile counts as a full one when splits are combined",
        "rows.cpp",
        "return std::min(tile * tile_rows_, problem_.outer) * problem_.inner;",
        "return tile * tile_rows_ * problem_.inner;",
        RUN_NUMBERS,
    ),
    mutant(
        "rows: the pieces of a partial last block of channels are numbered like those of a full block",
        "rows.cpp",
        "const int64_t row = index / (channels(block) * segments_);",
        "const int64_t row = index / (block_channels_ * segments_);",
        SCHEDULES,
    ),
    mutant(
        "rows: gradient sums accumulate in float",
        "rows.cpp",
        "partials[part.channel + c].first += of_tile[c].first;",
        "partials[part.channel + c].first = static_cast<float>(partials[part.channel + c].first + of_tile[c].first);",
        RUNS,
    ),
    mutant(
        "rows: every block gets the biases of the first channels",
        "rows.cpp",
        "of_channel(affine.weight, first), of_channel(affine.bias, first)};",
        "of_channel(affine.weight, first), affine.bias};",
        SCHEDULES,
    ),
    mutant(
        "columns: the last split's count omits the incomplete row",
        "columns.cpp",
        "const int64_t rest = split + 1 == splits_ ? problem_.outer % fold_ : 0;",
        "const int64_t rest = 0;",
        COLUMNS,
    ),
    mutant(
        "columns: the incomplete row is combined with statistics whose count omits the inner size",
        "columns.cpp",
        "double before = rows * columns;",
        "double before = rows * static_cast<double>(fold_);",
        COLUMNS,
    ),
    mutant(
        "columns: both ReLU bounds are written to the same memory",
        "columns.cpp",
        "return {by_column(relu_bounds.low, block, low), by_column(relu_bounds.high, block, high)};",
        "return {by_column(relu_bounds.low, block, low), by_column(relu_bounds.high, block, low)};",
        FUSED_LENGTHS,
    ),
    mutant(
        "columns: the number of splits depends on the number of threads",
        "columns.cpp",
        "std::clamp<int64_t>(rows_ / kSplitRows, 1, kMaxSplits)",
        "std::clamp<int64_t>(rows_ / kSplitRows, 1, kPiecesPerThread * threads)",
        SCHEDULES,
    ),
    mutant(
        "channels-last: the last block is as wide as the others, beyond the end of its rows",
        "columns.cpp",
        "{std::min(split_rows_, rows_ - row), std::min(block_columns_, row_columns_ - column), row_columns_}};",
        "{std::min(split_rows_, rows_ - row), block_columns_, row_columns_}};",
        COLUMNS,
    ),
    mutant(
        "combining Welford data: the counts of the two sets are swapped",
        "tiling.h",
        "delta * delta * before * share;",
        "delta * delta * count * share;",
        RUNS,
    ),
    mutant(
        "16-bit formats: vectors of float advance by the data's element size",
        "tiling.h",
        "static_cast<const char*>(vector) + channel * size_of(accumulate_dtype(problem_.dtype));",
        "static_cast<const char*>(vector) + channel * size_of(problem_.dtype);",
        COLUMNS,
    ),
    mutant(
        "rows: every block gets the lower ReLU bounds of the first channels",
        "tiling.h",
        "return {of_channel(relu_bounds.low, channel), of_channel(relu_bounds.high, channel)};",
        "return {relu_bounds.low, of_channel(relu_bounds.high, channel)};",
        BEYOND_FLOAT,
    ),
]

SCHEDULE = [
    mutant(
        "owned: statistics of the right half overwrite those of the left half",
        "schedule.h",
        "combine_splits(tiling, work, channels, first + half, last, depth + 1, leaf);",
        "combine_splits(tiling, work, channels, first + half, last, depth, leaf);",
        SCHEDULES,
    ),
    mutant(
        "owned: memory for one level too few",
        "schedule.h",
        "for (int64_t merged = 1; merged < splits; merged *= 2) ++depths;",
        "for (int64_t merged = 1; 2 * merged < splits; merged *= 2) ++depths;",
        SCRATCH,
    ),
    mutant(
        "splits are combined with their counts swapped",
        "schedule.h",
        "work.merge(&left.partials[c], left.count, right.partials[c], right.count);",
        "work.merge(&left.partials[c], right.count, right.partials[c], left.count);",
        SCHEDULES,
    ),
    mutant(
        "shared: the first piece of each thread's work gets no result",
        "schedule.h",
        "for (int64_t piece = end; piece-- > begin;) f(piece);",
        "for (int64_t piece = end - 1; piece > begin; --piece) f(piece);",
        SCHEDULES,
    ),
    mutant(
        "shared: results of the second group of blocks overwrite the first group's",
        "schedule.h",
        "work.apply(base + piece / splits, piece % splits);",
        "work.apply(piece / splits, piece % splits);",
        SCHEDULES,
    ),
]

STATISTICS = [
    mutant(
        "a tiny eps is handled like a usual one: sums of squares may underflow",
        "backend.cpp",
        "return eps < 1e-36 ? 1e-30 : 0;",
        "return eps > 1e-36 ? 1e-30 : 0;",
        BEYOND_FLOAT,
    ),
    mutant(
        "running_var: the variance over n, not over n - 1",
        "backend.cpp",
        "factor * (total.second / (n - 1) - old)",
        "factor * (total.second / n - old)",
        STATE,
    ),
    mutant(
        "running_mean: momentum the wrong way round",
        "backend.cpp",
        "write(args.running_mean, c, old + factor * (mean - old));",
        "write(args.running_mean, c, mean + factor * (old - mean));",
        STATE,
    ),
    mutant(
        "a batch is counted before the call's memory is allocated",
        "backend.cpp",
        "  const double factor = args.cumulative ?",
        "  if (args.num_batches_tracked != nullptr) *args.num_batches_tracked = count;\n"
        "  const double factor = args.cumulative ?",
        NO_MEMORY,
    ),
    mutant(
        "a thread uses another thread's partial sums",
        "schedule.h",
        "at::get_thread_num() * scratch",
        "at::get_thread_num() / 2 * scratch",
        SCHEDULES,
    ),
    mutant(
        "a block that cannot be recorded in the cache leaks",
        "result_cache.cpp",
        "      return unmap(freed);\n",
        "      throw;\n",
        NO_MEMORY,
    ),
    mutant(
        "the cumulative average divides by the number of previous batches",
        "backend.cpp",
        "args.cumulative ? 1.0 / static_cast<double>(count)",
        "args.cumulative ? 1.0 / static_cast<double>(count - 1)",
        STATE,
    ),
    mutant(
        "inference: eps is omitted",
        "backend.cpp",
        "1 / std::sqrt(read(args.running_var, c) + args.eps)",
        "1 / std::sqrt(read(args.running_var, c))",
        LEVELS,
    ),
    mutant(
        "ranks: the gradient of x omits the weight",
        "backend.cpp",
        "write(scale.space(), c, invstd * read_or(args.weight, c, 1));",
        "write(scale.space(), c, invstd);",
        RANKS,
    ),
    mutant(
        "ranks: a single value updates the running statistics",
        "ranks.cpp",
        "if (n < 2) continue;",
        "if (n < 1) continue;",
        ONE_VALUE,
    ),
    mutant(
        "ranks: the accumulated count is the last rank's count",
        "ranks.cpp",
        "before += of_rank;",
        "before = of_rank;",
        RANKS,
    ),
    mutant(
        "ReLU bounds: NaN does not pass",
        "relu_bounds.cpp",
        "return !(value <= 0);",
        "return value > 0;",
        RELU_BOUNDS,
    ),
    mutant(
        "ReLU bounds, 16 bits: minus infinity passes",
        "relu_bounds.cpp",
        "return magnitude > infinity ||",
        "return magnitude >= infinity ||",
        RELU_BOUNDS,
    ),
    mutant(
        "ReLU bounds, float16: the sign of y is tested before rounding",
        "relu_bounds.cpp",
        "return passes_relu(to_float16(value).bits, 0x7c00);",
        "return !(value <= 0);",
        RELU_BOUNDS,
    ),
    mutant(
        "an unavailable SIMD level selects the lowest one instead of raising an error",
        "simd/simd_level.cpp",
        'throw std::runtime_error("BNKERNELS_CPU_SIMD=" + std::string(wanted) + ": this build and processor have " +\n'
        "                           available);",
        "return levels[sizeof(levels) / sizeof(levels[0]) - 1];",
        LEVELS,
    ),
]

RESULT_CACHE = [
    mutant(
        "a result reuses any cached block that is large enough",  # a former bug: 1,237 MiB resident instead of 515
        "result_cache.cpp",
        "return b.size == size;",
        "return b.size >= size;",
        CACHE,
    ),
    mutant(
        "the cache holds one block more than the limit",
        "result_cache.cpp",
        "while (cached_bytes_ > limit_)",
        "while (cached_bytes_ > limit_ + freed.size)",
        CACHE,
    ),
    mutant(
        "a size is rounded down to a block size",
        "result_cache.cpp",
        "return (bytes + step - 1) / step * step;",
        "return bytes / step * step;",
        CACHE,
    ),
    mutant(
        "a reused block still counts as cached",
        "result_cache.cpp",
        "        cached_bytes_ -= size;\n        return data;",
        "        return data;",
        CACHE,
    ),
    mutant(
        "blocks released by empty_cache() still count as cached",
        "result_cache.cpp",
        "      dropped.swap(cached_);\n      cached_bytes_ = 0;\n",
        "      dropped.swap(cached_);\n",
        CACHE,
    ),
    mutant(
        "a forked child does not unlock the mutex",
        "result_cache.cpp",
        "                   [] { instance().mutex_.unlock(); });",
        "                   nullptr);",
        FORKED,
    ),
    mutant(
        "no pthread_atfork handlers",
        "result_cache.cpp",
        "    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },\n"
        "                   [] { instance().mutex_.unlock(); });\n",
        "",
        FORKED,
    ),
]

MUTANTS: list[Mutant] = [*KERNELS, *PARTITION, *SCHEDULE, *STATISTICS, *RESULT_CACHE]
