"""Faults of the CPU backend: its kernels, how a problem is cut and scheduled, its statistics, the memory it keeps."""

from __future__ import annotations

from . import Build, Mutant

BACKEND = "tests/cpu/test_cpu_backend.py"
FUSED = "tests/cpu/test_fused_cpu.py"
MEMORY = "tests/cpu/test_cpu_memory.py"

# Selections, narrow enough to end in a minute.
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
INTERVALS = (FUSED, "-k", "(interval and columns) or rounds_to_zero")
ONE_NAN = ("tests/numerics/test_numerics.py", "-k", "cpu and (one_nan or one_inf or any_case)")
RANKS = ("tests/distributed/test_sync_ops.py", "-k", "settings or order_of_ranks")
ONE_VALUE = ("tests/distributed/test_sync.py", "-k", "too_little_data")
NO_MEMORY = ("tests/numerics/test_faults.py", "-k", "allocation")
KEPT = (MEMORY, "-k", "not forked and not wrong_limit")
FORKED = (MEMORY, "-k", "forked")
SCRATCH = (MEMORY, "-k", "overrun")


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(fault, f"csrc/cpu/{file}", old, new, tests, Build.EXTENSION)


KERNELS = [  # files that each SIMD level compiles
    mutant(
        "rows: where results are streamed, the elements before the first aligned address are not written",
        "simd/row_kernels.h",
        "      visitor.template whole<Write::kCached>(0);\n      i = (kStreamAlignment",
        "      i = (kStreamAlignment",
        PAST_CACHE,
    ),
    mutant(
        "columns: the gate of a ReLU is applied to the whole gradient, not to g alone",
        "simd/column_kernels.h",
        "return scale * (epilogue(load_span<kWhole>(g + at, span), value) - mean_g - projection);",
        "return scale * epilogue(load_span<kWhole>(g + at, span) - mean_g - projection, value);",
        FUSED_LENGTHS,
    ),
    mutant(
        "columns: sums beyond float are made again with the vectors of a column of the first span",
        "simd/column_kernels.h",
        "exact_sums(g + c, x + c, Tile{tile.rows, 1, tile.stride}, vectors, c);",
        "exact_sums(g + c, x + c, Tile{tile.rows, 1, tile.stride}, vectors, j);",
        BEYOND_FLOAT,
    ),
    mutant(
        "columns: the lanes that the last span shares with the one before are counted twice",
        "simd/column_spans.h",
        "return {begin, static_cast<int>(s * kCount - begin), static_cast<int>(kCount)};",
        "return {begin, 0, static_cast<int>(kCount)};",
        COLUMNS,
    ),
    mutant(
        "bfloat16: ties are rounded away from zero, not to even",
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
        "bfloat16: of an odd number of last elements the mask has one odd one too few",
        "simd/lanes.h",
        "interleaved ? (remainder + 1) / 2 :",
        "interleaved ? remainder / 2 :",
        RUNS,
    ),
    mutant(
        "ReLU's gate: the lower end itself is shut out",
        "simd/lanes.h",
        "(x.part[p] < low.part[p]) |",
        "(x.part[p] <= low.part[p]) |",
        NOT_FINITE,
    ),
    mutant(
        "columns: an infinite sum is taken for a good one",
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

CUTS = [
    mutant(
        "rows: a last tile of fewer runs counts as a full one where chunks are merged",
        "rows.cpp",
        "return std::min(tile * tile_rows_, problem_.outer) * problem_.inner;",
        "return tile * tile_rows_ * problem_.inner;",
        RUN_NUMBERS,
    ),
    mutant(
        "rows: the pieces of a last block of fewer channels are numbered as those of a full one",
        "rows.cpp",
        "const int64_t row = index / (channels(block) * segments_);",
        "const int64_t row = index / (block_channels_ * segments_);",
        SCHEDULES,
    ),
    mutant(
        "rows: sums of the gradient are added up in float",
        "rows.cpp",
        "partials[part.channel + c].first += of_tile[c].first;",
        "partials[part.channel + c].first = static_cast<float>(partials[part.channel + c].first + of_tile[c].first);",
        RUNS,
    ),
    mutant(
        "rows: every block is given the biases of the first channels",
        "rows.cpp",
        "of_channel(affine.weight, first), of_channel(affine.bias, first)};",
        "of_channel(affine.weight, first), affine.bias};",
        SCHEDULES,
    ),
    mutant(
        "columns: the last chunk's count leaves out the incomplete row",
        "columns.cpp",
        "const int64_t rest = split + 1 == splits_ ? problem_.outer % fold_ : 0;",
        "const int64_t rest = 0;",
        COLUMNS,
    ),
    mutant(
        "columns: the incomplete row joins statistics whose count forgets the inner size",
        "columns.cpp",
        "double before = rows * columns;",
        "double before = rows * static_cast<double>(fold_);",
        COLUMNS,
    ),
    mutant(
        "columns: both ends of ReLU's interval are written to one space",
        "columns.cpp",
        "return {by_column(relu_bounds.low, block, low), by_column(relu_bounds.high, block, high)};",
        "return {by_column(relu_bounds.low, block, low), by_column(relu_bounds.high, block, low)};",
        FUSED_LENGTHS,
    ),
    mutant(
        "columns: the number of chunks depends on the number of threads",
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
        "merging moments: the count of one set in the place of the other's",
        "layout.h",
        "delta * delta * before * share;",
        "delta * delta * count * share;",
        RUNS,
    ),
    mutant(
        "16-bit formats: vectors of float are walked in steps of the data's size",
        "layout.h",
        "static_cast<const char*>(vector) + channel * size_of(accumulate_dtype(problem_.dtype));",
        "static_cast<const char*>(vector) + channel * size_of(problem_.dtype);",
        COLUMNS,
    ),
    mutant(
        "rows: every block is given the lower ends of ReLU's intervals of the first channels",
        "layout.h",
        "return {of_channel(relu_bounds.low, channel), of_channel(relu_bounds.high, channel)};",
        "return {relu_bounds.low, of_channel(relu_bounds.high, channel)};",
        BEYOND_FLOAT,
    ),
]

SCHEDULE = [
    mutant(
        "owned: statistics of a right half are written over those of the left one",
        "schedule.h",
        "combine_splits(layout, work, channels, first + half, last, depth + 1, leaf);",
        "combine_splits(layout, work, channels, first + half, last, depth, leaf);",
        SCHEDULES,
    ),
    mutant(
        "owned: space for one depth too few",
        "schedule.h",
        "for (int64_t merged = 1; merged < splits; merged *= 2) ++depths;",
        "for (int64_t merged = 1; 2 * merged < splits; merged *= 2) ++depths;",
        SCRATCH,
    ),
    mutant(
        "chunks are merged with their counts swapped",
        "schedule.h",
        "work.merge(&left.partials[c], left.count, right.partials[c], right.count);",
        "work.merge(&left.partials[c], right.count, right.partials[c], left.count);",
        SCHEDULES,
    ),
    mutant(
        "shared: the first piece of each thread's share gets no result",
        "schedule.h",
        "for (int64_t piece = end; piece-- > begin;) f(piece);",
        "for (int64_t piece = end - 1; piece > begin; --piece) f(piece);",
        SCHEDULES,
    ),
    mutant(
        "shared: results of a second group of blocks are written to the first one's",
        "schedule.h",
        "work.apply(base + piece / splits, piece % splits);",
        "work.apply(piece / splits, piece % splits);",
        SCHEDULES,
    ),
]

STATISTICS = [
    mutant(
        "a tiny eps is taken for a usual one: sums of squares may underflow",
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
        "a batch is counted before there is memory for the call",
        "backend.cpp",
        "  const double factor = args.cumulative ?",
        "  if (args.num_batches_tracked != nullptr) *args.num_batches_tracked = count;\n"
        "  const double factor = args.cumulative ?",
        NO_MEMORY,
    ),
    mutant(
        "a thread takes the partial sums of another",
        "schedule.h",
        "at::get_thread_num() * scratch",
        "at::get_thread_num() / 2 * scratch",
        SCHEDULES,
    ),
    mutant(
        "memory that cannot be remembered is kept, and lost",
        "result_cache.cpp",
        "      return unmap(freed);\n",
        "      throw;\n",
        NO_MEMORY,
    ),
    mutant(
        "the cumulative average divides by the number of batches before this one",
        "backend.cpp",
        "args.cumulative ? 1.0 / static_cast<double>(count)",
        "args.cumulative ? 1.0 / static_cast<double>(count - 1)",
        STATE,
    ),
    mutant(
        "inference: no eps",
        "backend.cpp",
        "1 / std::sqrt(read(args.running_var, c) + args.eps)",
        "1 / std::sqrt(read(args.running_var, c))",
        LEVELS,
    ),
    mutant(
        "ranks: the gradient of x leaves the weight out",
        "backend.cpp",
        "write(scale.space(), c, invstd * read_or(args.weight, c, 1));",
        "write(scale.space(), c, invstd);",
        RANKS,
    ),
    mutant(
        "ranks: the running statistics move for a single value",
        "ranks.cpp",
        "if (n < 2) continue;",
        "if (n < 1) continue;",
        ONE_VALUE,
    ),
    mutant(
        "ranks: the count so far is that of the last rank alone",
        "ranks.cpp",
        "before += of_rank;",
        "before = of_rank;",
        RANKS,
    ),
    mutant(
        "ReLU's interval: NaN does not pass",
        "relu_bounds.cpp",
        "return !(value <= 0);",
        "return value > 0;",
        INTERVALS,
    ),
    mutant(
        "ReLU's interval, 16 bits: minus infinity passes",
        "relu_bounds.cpp",
        "return magnitude > infinity ||",
        "return magnitude >= infinity ||",
        INTERVALS,
    ),
    mutant(
        "ReLU's interval, float16: judged before y is rounded",
        "relu_bounds.cpp",
        "return passes_relu(to_float16(value).bits, 0x7c00);",
        "return !(value <= 0);",
        INTERVALS,
    ),
    mutant(
        "a SIMD level that there is not is the least one, and no error",
        "simd/simd_level.cpp",
        'throw std::runtime_error("BNKERNELS_CPU_SIMD=" + std::string(wanted) + ": this build and processor have " +\n'
        "                           available);",
        "return levels[sizeof(levels) / sizeof(levels[0]) - 1];",
        LEVELS,
    ),
]

KEPT_MEMORY = [
    mutant(
        "a result takes any kept block that is large enough",  # lived once: 1,237 MiB resident instead of 515
        "result_cache.cpp",
        "return b.size == size;",
        "return b.size >= size;",
        KEPT,
    ),
    mutant(
        "one block more than the limit is kept",
        "result_cache.cpp",
        "while (cached_bytes_ > limit_)",
        "while (cached_bytes_ > limit_ + freed.size)",
        KEPT,
    ),
    mutant(
        "a size is rounded down to those that blocks come in",
        "result_cache.cpp",
        "return (bytes + step - 1) / step * step;",
        "return bytes / step * step;",
        KEPT,
    ),
    mutant(
        "a block that is used again still counts as kept",
        "result_cache.cpp",
        "        cached_bytes_ -= size;\n        return data;",
        "        return data;",
        KEPT,
    ),
    mutant(
        "what empty_cache() gave back still counts as kept",
        "result_cache.cpp",
        "      dropped.swap(cached_);\n      cached_bytes_ = 0;\n",
        "      dropped.swap(cached_);\n",
        KEPT,
    ),
    mutant(
        "a forked child does not unlock the mutex",
        "result_cache.cpp",
        "                   [] { instance().mutex_.unlock(); });",
        "                   nullptr);",
        FORKED,
    ),
    mutant(
        "nothing is done about forks",
        "result_cache.cpp",
        "    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },\n"
        "                   [] { instance().mutex_.unlock(); });\n",
        "",
        FORKED,
    ),
]

MUTANTS: list[Mutant] = [*KERNELS, *CUTS, *SCHEDULE, *STATISTICS, *KEPT_MEMORY]
