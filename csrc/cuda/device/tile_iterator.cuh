// TileIterator: the vectors that one thread visits in one work tile (TilePartition, in plan.h). No other code maps
// threads to elements.
//
// A tile iterator visits the thread's vectors in order, starting from any of them. kColumns is the number of
// accumulators per vector: 1 if all elements belong to one channel (channels-first), else one per element.
#pragma once

#include "vector_access.cuh"

namespace bnk {

// Iterations of a loop that starts at `rank`, ends at `size` and advances by `step`.
BNK_DEVICE int turns(int size, int rank, int step) { return size <= rank ? 0 : (size - rank + step - 1) / step; }

// InRow: the integer type that counts the elements and vectors of a row. 32 bits are faster if rows are short enough.
template <typename T, Layout kLayout, typename InRow = int64_t>
class TileIterator;

template <typename T, typename InRow>
class TileIterator<T, Layout::kChannelsFirst, InRow> {
 public:
  using Element = T;
  static constexpr int kElements = kVectorElements<T>;
  static constexpr int kColumns = 1;
  static constexpr int kThreadsC = 1;  // upper bound

  // Vectors are aligned to `lead`, the tensor whose access speed matters most.
  BNK_DEVICE TileIterator(const TilePartition& partition, WorkTile work_tile, const T* lead)
      : partition_(partition),
        channel_(work_tile.channel_tile),
        phase_(phase_of(lead)),
        first_(work_tile.split * partition.split_size) {
    const int64_t rest = partition.outer * partition.row_vectors.value - first_;
    size_ = static_cast<int>(rest < partition.split_size ? rest : partition.split_size);
    count_ = turns(size_, static_cast<int>(thread_rank()), static_cast<int>(block_threads()));
    seek(0);
  }

  BNK_DEVICE static bool is_wide(const TilePartition& partition, const T* data, const T* lead) {
    return phase_of(data) == phase_of(lead) && elements_of(partition) >= kElements;
  }

  // Whether every row consists of full vectors. (An unaligned tensor needs one more vector per row than its length.)
  BNK_DEVICE static bool is_whole(const TilePartition& partition) {
    return partition.row_vectors.value * kElements == partition.inner && partition.row_vectors.value <= kMaxFullVectors;
  }

  // Vectors of this thread.
  BNK_DEVICE int vectors() const { return count_; }

  // Upper bound of vectors() over the threads of the CTA.
  BNK_DEVICE int max_vectors() const { return turns(size_, 0, static_cast<int>(block_threads())); }

  // Moves to the thread's vector with this number.
  BNK_DEVICE void seek(int number) {
    at_ = number;
    if (!more()) return;
    const int64_t position = first_ + static_cast<int>(thread_rank() + number * block_threads());
    const int64_t row = quotient(position, partition_.row_vectors);
    row_vector_ = static_cast<InRow>(position - row * partition_.row_vectors.value);
    row_start_ = (row * partition_.channels + channel_) * partition_.inner;
  }

  BNK_DEVICE bool more() const { return at_ < count_; }

  // Returns the current vector and advances to the thread's next one. Empty at the end.
  BNK_DEVICE VectorAccess next() {
    if (!more()) return {0, 0, 0};
    const InRow in_row = row_vector_ * kElements - shift_of(row_start_);
    const InRow rest = static_cast<InRow>(partition_.inner) - in_row;
    const VectorAccess access{row_start_ + in_row, in_row < 0 ? static_cast<int>(-in_row) : 0,
                              rest < kElements ? static_cast<int>(rest) : kElements};

    ++at_;
    row_start_ += partition_.step_rows * partition_.channels * partition_.inner;
    row_vector_ += static_cast<InRow>(partition_.step_vectors);
    if (row_vector_ >= static_cast<InRow>(partition_.row_vectors.value)) {
      row_vector_ -= static_cast<InRow>(partition_.row_vectors.value);
      row_start_ += partition_.channels * partition_.inner;
    }
    return access;
  }

  // Iterates over full vectors from the current one on: a fixed step, plus a skip at the end of a row.
  struct Whole {
    const TilePartition& partition;
    int64_t step;
    int64_t skip;
    int64_t offset;
    int row_vector;

    BNK_DEVICE FullVector<T> next() {
      const FullVector<T> result{offset};
      offset += step;
      row_vector += static_cast<int>(partition.step_vectors);
      if (row_vector >= static_cast<int>(partition.row_vectors.value)) {
        row_vector -= static_cast<int>(partition.row_vectors.value);
        offset += skip;
      }
      return result;
    }
  };

  BNK_DEVICE Whole whole() const {
    const int64_t row = partition_.channels * partition_.inner;
    return {partition_, partition_.step_rows * row + partition_.step_vectors * kElements, row - partition_.inner,
            row_start_ + int64_t{row_vector_} * kElements, static_cast<int>(row_vector_)};
  }

  BNK_DEVICE int64_t channel(int /*column*/) const { return channel_; }
  BNK_DEVICE bool has_channel(int /*column*/) const { return true; }
  // The channel's index in the channel tile.
  BNK_DEVICE int local(int /*column*/) const { return 0; }
  // Whether this thread is the one in its CTA that writes the results of its channels.
  BNK_DEVICE bool first_in_block() const { return thread_rank() == 0; }

  // Elements per channel of the work tile: of all its vectors, or of the first `vectors` vectors of every thread.
  BNK_DEVICE int64_t elements() const { return elements_before(first_ + size_) - elements_before(first_); }
  BNK_DEVICE int64_t elements_of_first(int vectors) const {
    const int size = vectors * static_cast<int>(block_threads());
    return elements_before(first_ + (size < size_ ? size : size_)) - elements_before(first_);
  }

 private:
  // Whole counts row vectors in 32 bits and may step past the end of a row once.
  static constexpr int64_t kMaxFullVectors = int64_t{1} << 30;

  BNK_DEVICE int shift_of(int64_t row_start) const {
    return static_cast<int>(static_cast<uint64_t>(phase_ + row_start) % kElements);
  }

  // Elements of the channel that precede one of its vectors.
  BNK_DEVICE int64_t elements_before(int64_t position) const {
    const int64_t row = quotient(position, partition_.row_vectors);
    const int64_t row_vector = position - row * partition_.row_vectors.value;
    const int64_t in_row = row_vector * kElements - shift_of((row * partition_.channels + channel_) * partition_.inner);
    return row * partition_.inner + (in_row < 0 ? 0 : in_row < partition_.inner ? in_row : partition_.inner);
  }

  const TilePartition& partition_;
  int64_t channel_;
  int phase_;
  int64_t first_;  // the work tile's first vector, as an index in the channel
  int size_;       // vectors of the work tile
  int count_;      // vectors of this thread
  int at_;         // number of the current vector, which is row_vector_ of the row that starts at row_start_
  int64_t row_start_ = 0;
  InRow row_vector_ = 0;
};

// Channels-last and packed: a thread stays at one vector of columns and advances along the rows.
template <typename T, Layout kLayout>
class ColumnTileIterator {
 public:
  using Element = T;
  static constexpr int kElements = kVectorElements<T>;
  static constexpr int kColumns = kElements;
  static constexpr int kThreadsC = kLayout == Layout::kPacked ? kMaxPackedThreadsC : kMaxThreadsC;  // upper bound

  BNK_DEVICE ColumnTileIterator(const TilePartition& partition, WorkTile work_tile, const T* /*lead*/)
      : partition_(partition),
        channel_tile_(work_tile.channel_tile),
        thread_c_(static_cast<int>(thread_rank()) % partition.threads_c) {
    const int64_t first_row = work_tile.split * partition.split_size;
    const int64_t rest = partition.outer - first_row;
    rows_ = static_cast<int>(rest < partition.split_size ? rest : partition.split_size);
    const int64_t first_column = (channel_tile_ * partition.threads_c + thread_c_) * kElements;  // of the vector
    const int64_t columns = row_columns() - first_column;
    columns_ = columns < 0 ? 0 : columns < kElements ? static_cast<int>(columns) : kElements;
    if constexpr (kLayout == Layout::kPacked) {
      const int inner = static_cast<int>(partition.inner);
      local_ = thread_c_ * kElements / inner;
      boundary_ = (local_ + 1) * inner - thread_c_ * kElements;
    }
    step_ = static_cast<int>(block_threads()) / partition.threads_c;
    const int rank = static_cast<int>(thread_rank()) / partition.threads_c;
    // Threads beyond the last complete row of threads_c threads have no vectors, nor have threads beyond the last
    // column.
    count_ = rank >= step_ || columns_ == 0 ? 0 : turns(rows_, rank, step_);
    first_ = (first_row + rank) * row_columns() + first_column;
    seek(0);
  }

  BNK_DEVICE static bool is_wide(const TilePartition& partition, const T* data, const T* /*lead*/) {
    return partition.channels * partition.inner % kElements == 0 && phase_of(data) == 0;
  }

  // Whether every thread's vectors are full.
  BNK_DEVICE static bool is_whole(const TilePartition& partition) {
    return partition.channels * partition.inner % kElements == 0;
  }

  BNK_DEVICE int vectors() const { return count_; }
  BNK_DEVICE int max_vectors() const { return turns(rows_, 0, step_); }

  BNK_DEVICE void seek(int number) {
    at_ = number;
    offset_ = first_ + number * (step_ * row_columns());
  }

  BNK_DEVICE bool more() const { return at_ < count_; }

  BNK_DEVICE VectorAccess next() {
    if (!more()) return {0, 0, 0};
    const VectorAccess access{offset_, 0, columns_};
    ++at_;
    offset_ += step_ * row_columns();
    return access;
  }

  // Iterates over full vectors from the current one on.
  struct Whole {
    int64_t step;
    int64_t offset;

    BNK_DEVICE FullVector<T> next() {
      const FullVector<T> result{offset};
      offset += step;
      return result;
    }
  };

  BNK_DEVICE Whole whole() const { return {step_ * row_columns(), offset_}; }

  BNK_DEVICE int64_t channel(int column) const { return channel_tile_ * partition_.tile_channels + local(column); }
  BNK_DEVICE bool has_channel(int column) const { return column < columns_; }
  BNK_DEVICE int local(int column) const {
    if constexpr (kLayout == Layout::kPacked) return column < boundary_ ? local_ : local_ + 1;
    return thread_c_ * kElements + column;
  }
  BNK_DEVICE bool first_in_block() const { return static_cast<int>(thread_rank()) < partition_.threads_c; }

  BNK_DEVICE int64_t elements() const { return rows_ * partition_.inner; }
  BNK_DEVICE int64_t elements_of_first(int vectors) const {
    return (vectors * step_ < rows_ ? vectors * step_ : rows_) * partition_.inner;
  }

 private:
  BNK_DEVICE int64_t row_columns() const { return partition_.channels * partition_.inner; }

  const TilePartition& partition_;
  int64_t channel_tile_;
  int thread_c_;
  int rows_;          // rows of the work tile
  int columns_;       // columns of this thread's vector that lie inside the array
  int local_ = 0;     // packed: channel of the vector's first column, as an index in the channel tile ...
  int boundary_ = 0;  // ... and the vector's first column of the next channel
  int step_;          // rows between consecutive vectors of this thread
  int count_;         // vectors of this thread
  int64_t first_;     // offset of the first vector
  int at_;            // number of the current vector ...
  int64_t offset_;    // ... and its offset
};

template <typename T, typename InRow>
class TileIterator<T, Layout::kChannelsLast, InRow> : public ColumnTileIterator<T, Layout::kChannelsLast> {
  using ColumnTileIterator<T, Layout::kChannelsLast>::ColumnTileIterator;
};

template <typename T, typename InRow>
class TileIterator<T, Layout::kPacked, InRow> : public ColumnTileIterator<T, Layout::kPacked> {
  using ColumnTileIterator<T, Layout::kPacked>::ColumnTileIterator;
};

}  // namespace bnk
