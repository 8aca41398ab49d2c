// Walkers: the only place that knows where an element lies and which thread visits it (Walk, in plan.h).
//
// A walker is one thread's way through one share, window by window, from the first or from anywhere. kColumns tells of how
// many channels a window's elements may be: all of one (channels-first), or each of its own.
#pragma once

#include "walk.cuh"

namespace bnk {

// How often a thread is in turn that begins at `rank` of `size` and goes on in steps.
BNK_DEVICE int turns(int size, int rank, int step) { return size <= rank ? 0 : (size - rank + step - 1) / step; }

// InRow: what elements and windows of a row are counted with. Where rows are known to be short enough, 32 bits are faster.
template <typename T, Layout kLayout, typename InRow = int64_t>
class Walker;

template <typename T, typename InRow>
class Walker<T, Layout::kChannelsFirst, InRow> {
 public:
  using Element = T;
  static constexpr int kElements = kVectorElements<T>;
  static constexpr int kColumns = 1;
  static constexpr int kLanes = 1;  // at most

  // Windows are aligned to `lead`, the tensor whose speed matters most.
  BNK_DEVICE Walker(const Walk& walk, Share share, const T* lead)
      : walk_(walk), channel_(share.slab), phase_(phase_of(lead)), first_(share.chunk * walk.chunk_size) {
    const int64_t rest = walk.outer * walk.windows.value - first_;
    size_ = static_cast<int>(rest < walk.chunk_size ? rest : walk.chunk_size);
    count_ = turns(size_, static_cast<int>(thread_rank()), static_cast<int>(block_threads()));
    seek(0);
  }

  BNK_DEVICE static bool is_wide(const Walk& walk, const T* data, const T* lead) {
    return phase_of(data) == phase_of(lead) && elements_of(walk) >= kElements;
  }

  // Whether every row is of whole windows. (Of a tensor that is not aligned, a row is covered by one more than it is long.)
  BNK_DEVICE static bool is_whole(const Walk& walk) {
    return walk.windows.value * kElements == walk.inner && walk.windows.value <= kMostWholeWindows;
  }

  // Of this thread, in all.
  BNK_DEVICE int windows() const { return count_; }

  // Of any thread of the block, at most.
  BNK_DEVICE int most_windows() const { return turns(size_, 0, static_cast<int>(block_threads())); }

  // On to the thread's window of this number.
  BNK_DEVICE void seek(int number) {
    at_ = number;
    if (!more()) return;
    const int64_t position = first_ + static_cast<int>(thread_rank() + number * block_threads());
    const int64_t row = quotient(position, walk_.windows);
    window_ = static_cast<InRow>(position - row * walk_.windows.value);
    row_start_ = (row * walk_.channels + channel_) * walk_.inner;
  }

  BNK_DEVICE bool more() const { return at_ < count_; }

  // The current window, and on to the thread's next. Empty when there are no more.
  BNK_DEVICE Window next() {
    if (!more()) return {0, 0, 0};
    const InRow in_row = window_ * kElements - shift_of(row_start_);
    const InRow rest = static_cast<InRow>(walk_.inner) - in_row;
    const Window window{row_start_ + in_row, in_row < 0 ? static_cast<int>(-in_row) : 0,
                        rest < kElements ? static_cast<int>(rest) : kElements};

    ++at_;
    row_start_ += walk_.step_rows * walk_.channels * walk_.inner;
    window_ += static_cast<InRow>(walk_.step_windows);
    if (window_ >= static_cast<InRow>(walk_.windows.value)) {
      window_ -= static_cast<InRow>(walk_.windows.value);
      row_start_ += walk_.channels * walk_.inner;
    }
    return window;
  }

  // The way on from the current window where all are whole: a jump to each, and another behind a row's end.
  struct Whole {
    const Walk& walk;
    int64_t step;
    int64_t skip;
    int64_t offset;
    int window;

    BNK_DEVICE WholeWindow<T> next() {
      const WholeWindow<T> result{offset};
      offset += step;
      window += static_cast<int>(walk.step_windows);
      if (window >= static_cast<int>(walk.windows.value)) {
        window -= static_cast<int>(walk.windows.value);
        offset += skip;
      }
      return result;
    }
  };

  BNK_DEVICE Whole whole() const {
    const int64_t row = walk_.channels * walk_.inner;
    return {walk_, walk_.step_rows * row + walk_.step_windows * kElements, row - walk_.inner,
            row_start_ + int64_t{window_} * kElements, static_cast<int>(window_)};
  }

  BNK_DEVICE int64_t channel(int /*column*/) const { return channel_; }
  BNK_DEVICE bool has_channel(int /*column*/) const { return true; }
  // A channel's place in the slab.
  BNK_DEVICE int local(int /*column*/) const { return 0; }
  // Whether this thread is the one of its block that speaks for its channels.
  BNK_DEVICE bool first_in_block() const { return thread_rank() == 0; }

  // Elements of each channel in the share: of all its windows, or of the first `windows` of every thread.
  BNK_DEVICE int64_t elements() const { return elements_before(first_ + size_) - elements_before(first_); }
  BNK_DEVICE int64_t elements_of_first(int windows) const {
    const int size = windows * static_cast<int>(block_threads());
    return elements_before(first_ + (size < size_ ? size : size_)) - elements_before(first_);
  }

 private:
  // Whole counts them in 32 bits, and may step past a row's end once.
  static constexpr int64_t kMostWholeWindows = int64_t{1} << 30;

  BNK_DEVICE int shift_of(int64_t row_start) const {
    return static_cast<int>(static_cast<uint64_t>(phase_ + row_start) % kElements);
  }

  // Of the channel, before a window of it.
  BNK_DEVICE int64_t elements_before(int64_t position) const {
    const int64_t row = quotient(position, walk_.windows);
    const int64_t window = position - row * walk_.windows.value;
    const int64_t in_row = window * kElements - shift_of((row * walk_.channels + channel_) * walk_.inner);
    return row * walk_.inner + (in_row < 0 ? 0 : in_row < walk_.inner ? in_row : walk_.inner);
  }

  const Walk& walk_;
  int64_t channel_;
  int phase_;
  int64_t first_;  // window of the channel that the share begins with
  int size_;       // windows of the share
  int count_;      // of those, this thread's
  int at_;         // of those, the current one: window_ of the row that starts at row_start_
  int64_t row_start_ = 0;
  InRow window_ = 0;
};

// Channels-last and packed: a thread stays on one vector of columns and goes down the rows.
template <typename T, Layout kLayout>
class ColumnWalker {
 public:
  using Element = T;
  static constexpr int kElements = kVectorElements<T>;
  static constexpr int kColumns = kElements;
  static constexpr int kLanes = kLayout == Layout::kPacked ? kMaxPackedLanes : kMaxLanes;  // at most

  BNK_DEVICE ColumnWalker(const Walk& walk, Share share, const T* /*lead*/)
      : walk_(walk), slab_(share.slab), lane_(static_cast<int>(thread_rank()) % walk.lanes) {
    const int64_t first_row = share.chunk * walk.chunk_size;
    const int64_t rest = walk.outer - first_row;
    rows_ = static_cast<int>(rest < walk.chunk_size ? rest : walk.chunk_size);
    const int64_t first_column = (slab_ * walk.lanes + lane_) * kElements;  // of its vector
    const int64_t columns = row_columns() - first_column;
    columns_ = columns < 0 ? 0 : columns < kElements ? static_cast<int>(columns) : kElements;
    if constexpr (kLayout == Layout::kPacked) {
      const int inner = static_cast<int>(walk.inner);
      local_ = lane_ * kElements / inner;
      boundary_ = (local_ + 1) * inner - lane_ * kElements;
    }
    step_ = static_cast<int>(block_threads()) / walk.lanes;
    const int rank = static_cast<int>(thread_rank()) / walk.lanes;
    // Threads beyond the last whole row of lanes have nothing to do, nor have those beyond the array's columns.
    count_ = rank >= step_ || columns_ == 0 ? 0 : turns(rows_, rank, step_);
    first_ = (first_row + rank) * row_columns() + first_column;
    seek(0);
  }

  BNK_DEVICE static bool is_wide(const Walk& walk, const T* data, const T* /*lead*/) {
    return walk.channels * walk.inner % kElements == 0 && phase_of(data) == 0;
  }

  // Whether every thread's windows are whole.
  BNK_DEVICE static bool is_whole(const Walk& walk) { return walk.channels * walk.inner % kElements == 0; }

  BNK_DEVICE int windows() const { return count_; }
  BNK_DEVICE int most_windows() const { return turns(rows_, 0, step_); }

  BNK_DEVICE void seek(int number) {
    at_ = number;
    offset_ = first_ + number * (step_ * row_columns());
  }

  BNK_DEVICE bool more() const { return at_ < count_; }

  BNK_DEVICE Window next() {
    if (!more()) return {0, 0, 0};
    const Window window{offset_, 0, columns_};
    ++at_;
    offset_ += step_ * row_columns();
    return window;
  }

  // The way on from the current window where all are whole.
  struct Whole {
    int64_t step;
    int64_t offset;

    BNK_DEVICE WholeWindow<T> next() {
      const WholeWindow<T> result{offset};
      offset += step;
      return result;
    }
  };

  BNK_DEVICE Whole whole() const { return {step_ * row_columns(), offset_}; }

  BNK_DEVICE int64_t channel(int column) const { return slab_ * walk_.slab_channels + local(column); }
  BNK_DEVICE bool has_channel(int column) const { return column < columns_; }
  BNK_DEVICE int local(int column) const {
    if constexpr (kLayout == Layout::kPacked) return column < boundary_ ? local_ : local_ + 1;
    return lane_ * kElements + column;
  }
  BNK_DEVICE bool first_in_block() const { return static_cast<int>(thread_rank()) < walk_.lanes; }

  BNK_DEVICE int64_t elements() const { return rows_ * walk_.inner; }
  BNK_DEVICE int64_t elements_of_first(int windows) const {
    return (windows * step_ < rows_ ? windows * step_ : rows_) * walk_.inner;
  }

 private:
  BNK_DEVICE int64_t row_columns() const { return walk_.channels * walk_.inner; }

  const Walk& walk_;
  int64_t slab_;
  int lane_;
  int rows_;          // of the share
  int columns_;       // of its vector that the array has
  int local_ = 0;     // packed: the slab's channel that its first column is of ...
  int boundary_ = 0;  // ... and the first of its columns that is of the next one
  int step_;          // rows from one of its windows to the next
  int count_;         // of its windows
  int64_t first_;     // of its vector in the first of them
  int at_;            // the current one ...
  int64_t offset_;    // ... and of its vector in it
};

template <typename T, typename InRow>
class Walker<T, Layout::kChannelsLast, InRow> : public ColumnWalker<T, Layout::kChannelsLast> {
  using ColumnWalker<T, Layout::kChannelsLast>::ColumnWalker;
};

template <typename T, typename InRow>
class Walker<T, Layout::kPacked, InRow> : public ColumnWalker<T, Layout::kPacked> {
  using ColumnWalker<T, Layout::kPacked>::ColumnWalker;
};

}  // namespace bnk
