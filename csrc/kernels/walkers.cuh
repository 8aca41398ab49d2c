// Walkers: the only place that knows where an element lies and which thread visits it (Walk, in plan.h).
//
// A walker is one thread's way through one share, window by window, from the first or from anywhere. kColumns tells of how
// many channels a window's elements may be: all of one (channels-first), or each of its own.
#pragma once

#include "walk.cuh"

namespace bnk {

// How often a thread is in turn that begins at `rank` of `size` and goes on in steps.
BNK_DEVICE int turns(int size, int rank, int step) { return size <= rank ? 0 : (size - rank + step - 1) / step; }

template <typename T, Layout kLayout>
class Walker;

template <typename T>
class Walker<T, Layout::kChannelsFirst> {
 public:
  static constexpr int kElements = kVectorElements<T>;
  static constexpr int kColumns = 1;
  static constexpr int kLanes = 1;  // at most

  // Windows are aligned to `lead`, the tensor whose speed matters most.
  BNK_DEVICE Walker(const Walk& walk, Share share, const T* lead)
      : walk_(walk), channel_(share.slab), phase_(phase_of(lead)), first_(share.chunk * walk.chunk_size) {
    const int64_t rest = walk.outer * walk.windows.value - first_;
    size_ = static_cast<int>(rest < walk.chunk_size ? rest : walk.chunk_size);
    seek(0);
  }

  BNK_DEVICE static bool is_wide(const Walk&, const T* data, const T* lead) { return phase_of(data) == phase_of(lead); }

  // Of this thread, in all.
  BNK_DEVICE int windows() const {
    return turns(size_, static_cast<int>(thread_rank()), static_cast<int>(block_threads()));
  }

  // Of any thread of the block, at most.
  BNK_DEVICE int most_windows() const { return turns(size_, 0, static_cast<int>(block_threads())); }

  // On to the thread's window of this number.
  BNK_DEVICE void seek(int number) {
    at_ = static_cast<int>(thread_rank() + number * block_threads());
    if (at_ >= size_) return;
    const int64_t row = quotient(first_ + at_, walk_.windows);
    window_ = first_ + at_ - row * walk_.windows.value;
    row_start_ = (row * walk_.channels + channel_) * walk_.inner;
  }

  BNK_DEVICE bool more() const { return at_ < size_; }

  // The current window, and on to the thread's next. Empty when there are no more.
  BNK_DEVICE Window next() {
    if (!more()) return {0, 0, 0};
    const int64_t in_row = window_ * kElements - shift_of(row_start_);
    const int64_t rest = walk_.inner - in_row;
    const Window window{row_start_ + in_row, in_row < 0 ? static_cast<int>(-in_row) : 0,
                        rest < kElements ? static_cast<int>(rest) : kElements};

    at_ += static_cast<int>(block_threads());
    row_start_ += walk_.step_rows * walk_.channels * walk_.inner;
    window_ += walk_.step_windows;
    if (window_ >= walk_.windows.value) {
      window_ -= walk_.windows.value;
      row_start_ += walk_.channels * walk_.inner;
    }
    return window;
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
  int at_;         // of those, the current one: window_ of the row that starts at row_start_
  int64_t row_start_ = 0;
  int64_t window_ = 0;
};

// Channels-last and packed: a thread stays on one vector of columns and goes down the rows.
template <typename T, Layout kLayout>
class ColumnWalker {
 public:
  static constexpr int kElements = kVectorElements<T>;
  static constexpr int kColumns = kElements;
  static constexpr int kLanes = kLayout == Layout::kPacked ? kMaxPackedLanes : kMaxLanes;  // at most

  BNK_DEVICE ColumnWalker(const Walk& walk, Share share, const T* /*lead*/)
      : walk_(walk), share_(share), lane_(static_cast<int>(thread_rank()) % walk.lanes) {
    const int64_t columns = row_columns() - first_column();
    columns_ = columns < 0 ? 0 : columns < kElements ? static_cast<int>(columns) : kElements;
    if constexpr (kLayout == Layout::kPacked) {
      const int inner = static_cast<int>(walk.inner);
      local_ = lane_ * kElements / inner;
      boundary_ = (local_ + 1) * inner - lane_ * kElements;
    }
    step_ = static_cast<int>(block_threads()) / walk.lanes;
    rank_ = static_cast<int>(thread_rank()) / walk.lanes;
    // Threads beyond the last whole row of lanes have nothing to do, nor have those beyond the array's columns.
    end_ = rank_ >= step_ || columns_ == 0 ? 0 : static_cast<int>(rows());
    seek(0);
  }

  BNK_DEVICE static bool is_wide(const Walk& walk, const T* data, const T* /*lead*/) {
    return walk.channels * walk.inner % kElements == 0 && phase_of(data) == 0;
  }

  BNK_DEVICE int windows() const { return turns(end_, rank_, step_); }
  BNK_DEVICE int most_windows() const { return turns(static_cast<int>(rows()), 0, step_); }

  BNK_DEVICE void seek(int number) {
    at_ = rank_ + number * step_;
    offset_ = (share_.chunk * walk_.chunk_size + at_) * row_columns() + first_column();
  }

  BNK_DEVICE bool more() const { return at_ < end_; }

  BNK_DEVICE Window next() {
    if (!more()) return {0, 0, 0};
    const Window window{offset_, 0, columns_};
    at_ += step_;
    offset_ += step_ * row_columns();
    return window;
  }

  BNK_DEVICE int64_t channel(int column) const { return share_.slab * walk_.slab_channels + local(column); }
  BNK_DEVICE bool has_channel(int column) const { return column < columns_; }
  BNK_DEVICE int local(int column) const {
    if constexpr (kLayout == Layout::kPacked) return column < boundary_ ? local_ : local_ + 1;
    return lane_ * kElements + column;
  }
  BNK_DEVICE bool first_in_block() const { return static_cast<int>(thread_rank()) < walk_.lanes; }

  BNK_DEVICE int64_t elements() const { return rows() * walk_.inner; }
  BNK_DEVICE int64_t elements_of_first(int windows) const {
    return (windows * step_ < rows() ? windows * step_ : rows()) * walk_.inner;
  }

 private:
  BNK_DEVICE int64_t row_columns() const { return walk_.channels * walk_.inner; }
  // Of its vector.
  BNK_DEVICE int64_t first_column() const { return (share_.slab * walk_.lanes + lane_) * kElements; }

  BNK_DEVICE int64_t rows() const {
    const int64_t rest = walk_.outer - share_.chunk * walk_.chunk_size;
    return rest < walk_.chunk_size ? rest : walk_.chunk_size;
  }

  const Walk& walk_;
  Share share_;
  int lane_;
  int columns_;       // of its vector that the array has
  int local_ = 0;     // packed: the slab's channel that its first column is of ...
  int boundary_ = 0;  // ... and the first of its columns that is of the next one
  int step_;
  int rank_;
  int end_;         // rows of the share that concern this thread
  int at_;          // the current one ...
  int64_t offset_;  // ... and of its vector in it
};

template <typename T>
class Walker<T, Layout::kChannelsLast> : public ColumnWalker<T, Layout::kChannelsLast> {
  using ColumnWalker<T, Layout::kChannelsLast>::ColumnWalker;
};

template <typename T>
class Walker<T, Layout::kPacked> : public ColumnWalker<T, Layout::kPacked> {
  using ColumnWalker<T, Layout::kPacked>::ColumnWalker;
};

// The walker's next windows, `most` of them; empty ones behind its last.
template <typename Walker, int kTile>
BNK_DEVICE void next_tile(Walker& walker, Window (&windows)[kTile], int most = kTile) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) windows[i] = i < most ? walker.next() : Window{0, 0, 0};
}

}  // namespace bnk
