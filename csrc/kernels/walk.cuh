// Walking an [outer][channels][inner] array by windows: the only place that knows where an element lies.
//
// A window is kVectorElements<T> consecutive elements of which [begin, end) belong to the walker's row; see Walk in
// plan.h for who visits which. A full window of a tensor that is aligned alike is one 16-byte access; every other
// window is accessed element by element, so heads, tails and odd alignments are correct by construction.
#pragma once

#include "../plan.h"
#include "primitives.cuh"

namespace bnk {

enum class Layout { kChannelsFirst, kChannelsLast };

struct Window {
  int64_t offset;  // of its element 0, in elements from the tensor's start; that element itself may lie outside
  int begin;
  int end;

  BNK_DEVICE int size() const { return end > begin ? end - begin : 0; }
  BNK_DEVICE bool is_full(int elements) const { return begin == 0 && end == elements; }
};

// One block's work: share s of a walk is chunk s / slabs of slab s % slabs, so that blocks which run side by side read
// neighbouring memory.
struct Share {
  int64_t slab;
  int64_t chunk;
};

// a / b, rounded down, for a >= 0. The product is off by few at most: by one below 2^51, which is where it ends in practice.
BNK_DEVICE int64_t quotient(int64_t a, const Divisor& b) {
  int64_t result = static_cast<int64_t>(static_cast<double>(a) * b.reciprocal);
  while (result * b.value > a) --result;
  while ((result + 1) * b.value <= a) ++result;
  return result;
}

BNK_DEVICE int64_t elements_of(const Walk& walk) { return walk.outer * walk.channels * walk.inner; }
BNK_DEVICE int64_t shares_of(const Walk& walk) { return walk.slabs.value * walk.chunks; }

BNK_DEVICE Share share_at(const Walk& walk, int64_t index) {
  const int64_t chunk = quotient(index, walk.slabs);
  return {index - chunk * walk.slabs.value, chunk};
}

// Where in its 16-byte vector a tensor starts, in elements.
template <typename T>
BNK_DEVICE int phase_of(const T* data) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(data) / sizeof(T)) % kVectorElements<T>);
}

// A tensor as a kernel sees it. wide: the walk's windows lie on 16-byte boundaries of this tensor.
template <typename T>
struct View {
  T* data;
  int64_t elements;
  bool wide;
};

// `columns` is the number of channels that one window holds: all its elements are of one channel (channels-first), or
// each is of the next channel (channels-last).
template <typename T, Layout kLayout>
class Walker;

template <typename T>
class Walker<T, Layout::kChannelsFirst> {
 public:
  static constexpr int kElements = kVectorElements<T>;
  static constexpr int kColumns = 1;
  static constexpr int kLanes = 1;

  // Windows are aligned to `lead`, the tensor whose speed matters most.
  BNK_DEVICE Walker(const Walk& walk, Share share, const T* lead)
      : walk_(walk), channel_(share.slab), phase_(phase_of(lead)) {
    const int64_t all = walk.outer * walk.windows.value;
    const int64_t first = share.chunk * walk.chunk_size + thread_rank();
    const int64_t last = share.chunk * walk.chunk_size + walk.chunk_size;
    left_ = (last < all ? last : all) - first;
    if (left_ > 0) {
      row_ = quotient(first, walk.windows);
      window_ = first - row_ * walk.windows.value;
    }
  }

  BNK_DEVICE static bool is_wide(const Walk&, const T* data, const T* lead) { return phase_of(data) == phase_of(lead); }

  BNK_DEVICE bool more() const { return left_ > 0; }

  // The current window, and on to the thread's next. Empty when there are no more.
  BNK_DEVICE Window next() {
    if (left_ <= 0) return {0, 0, 0};
    const int64_t start = (row_ * walk_.channels + channel_) * walk_.inner;
    const int shift = static_cast<int>(static_cast<uint64_t>(phase_ + start) % kElements);
    const int64_t in_row = window_ * kElements - shift;
    const int64_t rest = walk_.inner - in_row;
    const Window window{start + in_row, in_row < 0 ? shift : 0, rest < kElements ? static_cast<int>(rest) : kElements};

    left_ -= block_threads();
    row_ += walk_.step_rows;
    window_ += walk_.step_windows;
    if (window_ >= walk_.windows.value) {
      window_ -= walk_.windows.value;
      ++row_;
    }
    return window;
  }

  template <int kTile>
  BNK_DEVICE void next_tile(Window (&windows)[kTile]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) windows[i] = next();
  }

  BNK_DEVICE int64_t channel(int /*column*/) const { return channel_; }
  BNK_DEVICE bool has_channel(int /*column*/) const { return true; }
  // Whether this thread is the one of its block that speaks for its channels.
  BNK_DEVICE bool first_in_block() const { return thread_rank() == 0; }

 private:
  const Walk& walk_;
  int64_t channel_;
  int phase_;
  int64_t left_;
  int64_t row_ = 0;
  int64_t window_ = 0;
};

template <typename T>
class Walker<T, Layout::kChannelsLast> {
 public:
  static constexpr int kElements = kVectorElements<T>;
  static constexpr int kColumns = kElements;
  static constexpr int kLanes = kMaxLanes;

  BNK_DEVICE Walker(const Walk& walk, Share share, const T* /*lead*/) : walk_(walk) {
    const int lane = static_cast<int>(thread_rank()) % walk.lanes;
    channel_ = (share.slab * walk.lanes + lane) * kElements;
    const int64_t rest = walk.channels - channel_;
    columns_ = rest < 0 ? 0 : rest < kElements ? static_cast<int>(rest) : kElements;
    const int64_t last = share.chunk * walk.chunk_size + walk.chunk_size;
    row_ = share.chunk * walk.chunk_size + thread_rank() / walk.lanes;
    end_row_ = columns_ == 0 ? 0 : last < walk.outer ? last : walk.outer;
  }

  BNK_DEVICE static bool is_wide(const Walk& walk, const T* data, const T* /*lead*/) {
    return walk.channels % kElements == 0 && phase_of(data) == 0;
  }

  BNK_DEVICE bool more() const { return row_ < end_row_; }

  BNK_DEVICE Window next() {
    if (!more()) return {0, 0, 0};
    const Window window{row_ * walk_.channels + channel_, 0, columns_};
    row_ += block_threads() / walk_.lanes;
    return window;
  }

  template <int kTile>
  BNK_DEVICE void next_tile(Window (&windows)[kTile]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) windows[i] = next();
  }

  BNK_DEVICE int64_t channel(int column) const { return channel_ + column; }
  BNK_DEVICE bool has_channel(int column) const { return column < columns_; }
  BNK_DEVICE bool first_in_block() const { return static_cast<int>(thread_rank()) < walk_.lanes; }

 private:
  const Walk& walk_;
  int64_t channel_;
  int columns_;
  int64_t row_;
  int64_t end_row_;
};

// Loading is in two steps, so that a thread can have several windows in flight before it waits for the first:
// load_window only issues the load, unpack_window looks at the bits.
//
// A window that lies inside the tensor is loaded whole, also where only a part of it is the walker's row: the other
// elements share its memory sectors anyway. They are then masked out.
template <Reuse kReuse, typename T>
BNK_DEVICE Vector<T> load_window(const View<const T>& view, const Window& window) {
  const T* start = view.data + window.offset;
  if (view.wide && window.size() > 0 && window.offset >= 0 && window.offset <= view.elements - kVectorElements<T>) {
    return load_vector<kReuse>(start);
  }
  Vector<T> bits{};
#pragma unroll
  for (int i = 0; i < kVectorElements<T>; ++i) {
    if (i >= window.begin && i < window.end) set_element(bits, i, load<kReuse>(start + i));
  }
  return bits;
}

// The elements of a window; those that are not there are 0.
template <typename T>
BNK_DEVICE void unpack_window(const Vector<T>& bits, const Window& window, Compute<T> (&out)[kVectorElements<T>]) {
  widen_vector(bits, out);
  if (window.is_full(kVectorElements<T>)) return;
#pragma unroll
  for (int i = 0; i < kVectorElements<T>; ++i) {
    if (i < window.begin || i >= window.end) out[i] = 0;
  }
}

// Writes the elements that are there, and no others. Results are not read again by the kernel that makes them.
template <typename T>
BNK_DEVICE void store_window(const View<T>& view, const Window& window,
                             const Compute<T> (&values)[kVectorElements<T>]) {
  T* start = view.data + window.offset;
  if (view.wide && window.is_full(kVectorElements<T>)) {
    store_vector<Reuse::kLast>(start, narrow_vector<T>(values));
    return;
  }
#pragma unroll
  for (int i = 0; i < kVectorElements<T>; ++i) {
    if (i >= window.begin && i < window.end) store<Reuse::kLast>(start + i, narrow<T>(values[i]));
  }
}

// A tile of windows: all its loads are issued before the first is waited for.
template <Reuse kReuse, typename T, int kTile>
BNK_DEVICE void load_tile(const View<const T>& view, const Window (&windows)[kTile], Vector<T> (&bits)[kTile]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) bits[i] = load_window<kReuse>(view, windows[i]);
}

template <typename T, int kTile>
BNK_DEVICE void unpack_tile(const Vector<T> (&bits)[kTile], const Window (&windows)[kTile],
                            Compute<T> (&values)[kTile][kVectorElements<T>]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) unpack_window(bits[i], windows[i], values[i]);
}

}  // namespace bnk
