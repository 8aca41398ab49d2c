// Windows: the unit in which kernels reach an [outer][channels][inner] array.
//
// A window is kVectorElements<T> consecutive elements of which [begin, end) belong to the walker's row; who visits which
// is told by walkers.cuh. A full window of a tensor that is aligned alike is one 16-byte access; every other window is
// accessed element by element, so heads, tails and odd alignments are correct by construction.
#pragma once

#include "../plan.h"
#include "primitives.cuh"

namespace bnk {

struct Window {
  static constexpr bool kWhole = false;
  int64_t offset;  // of its element 0, in elements from the tensor's start; that element itself may lie outside
  int begin;
  int end;

  BNK_DEVICE int size() const { return end > begin ? end - begin : 0; }
  BNK_DEVICE bool is_full(int elements) const { return begin == 0 && end == elements; }
};

// A window of which it is known when the kernel is compiled that it is full, and its tensors wide (View).
template <typename T>
struct WholeWindow {
  static constexpr bool kWhole = true;
  static constexpr int begin = 0;
  static constexpr int end = kVectorElements<T>;
  int64_t offset;

  BNK_DEVICE static constexpr int size() { return end; }
  BNK_DEVICE static constexpr bool is_full(int /*elements*/) { return true; }
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

// A tensor as a kernel sees it. wide: the walk's windows lie on 16-byte boundaries of it, and it is not smaller than one.
template <typename T, Layout kLayout>
struct View {
  T* data;
  int64_t elements;
  bool wide;
};

// Loading is in two steps, so that a thread can have several windows in flight before it waits for the first:
// load_tile only issues the loads, unpack_window looks at the bits.
//
// A window that lies inside the tensor is loaded whole, also where only a part of it is the walker's row: the other
// elements share its memory sectors anyway. They are then masked out.
template <typename T, Layout kLayout>
BNK_DEVICE bool is_inside(const View<const T, kLayout>& view, const Window& window) {
  if constexpr (kLayout != Layout::kChannelsFirst) return true;  // whole columns of vectors, if they are wide
  // In one comparison: an offset below 0 is a large one.
  return static_cast<uint64_t>(window.offset) <= static_cast<uint64_t>(view.elements - kVectorElements<T>);
}

template <typename Loads, typename T, Layout kLayout>
BNK_DEVICE Vector<T> load_window(const View<const T, kLayout>& view, const Window& window, const Loads& loads) {
  const T* start = view.data + window.offset;
  if (view.wide && window.size() > 0 && is_inside(view, window)) return loads.vector(start);
  Vector<T> bits{};
#pragma unroll
  for (int i = 0; i < kVectorElements<T>; ++i) {
    if (i >= window.begin && i < window.end) set_element(bits, i, loads.element(start + i));
  }
  return bits;
}

// What is loaded as the code says ...
template <Reuse kReuse>
struct Loads {
  template <typename T>
  BNK_DEVICE Vector<T> vector(const T* start) const {
    return load_vector<kReuse>(start);
  }
  template <typename T>
  BNK_DEVICE T element(const T* start) const {
    return load<kReuse>(start);
  }
};

// ... or as a hint does.
struct HintedLoads {
  CacheHint hint;

  template <typename T>
  BNK_DEVICE Vector<T> vector(const T* start) const {
    return load_vector(start, hint);
  }
  template <typename T>
  BNK_DEVICE T element(const T* start) const {
    return load(start);
  }
};

template <Reuse kReuse, typename T, Layout kLayout>
BNK_DEVICE Vector<T> load_window(const View<const T, kLayout>& view, const Window& window) {
  return load_window(view, window, Loads<kReuse>{});
}

template <Reuse kReuse, typename T, Layout kLayout>
BNK_DEVICE Vector<T> load_window(const View<const T, kLayout>& view, const WholeWindow<T>& window) {
  return load_vector<kReuse>(view.data + window.offset);
}

// The elements of a window; those that are not there are 0.
template <typename T, typename Window_>
BNK_DEVICE void unpack_window(const Vector<T>& bits, const Window_& window, Compute<T> (&out)[kVectorElements<T>]) {
  widen_vector(bits, out);
  if constexpr (!Window_::kWhole) {
    if (window.is_full(kVectorElements<T>)) return;
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) {
      if (i < window.begin || i >= window.end) out[i] = 0;
    }
  }
}

// Writes the elements that are there, and no others. Results are not read again by the kernel that makes them.
template <typename T, Layout kLayout, typename Window_>
BNK_DEVICE void store_window(const View<T, kLayout>& view, const Window_& window,
                             const Compute<T> (&values)[kVectorElements<T>]) {
  T* start = view.data + window.offset;
  if (Window_::kWhole || (view.wide && window.is_full(kVectorElements<T>))) {
    store_vector<Reuse::kLast>(start, narrow_vector<T>(values));
  } else if constexpr (!Window_::kWhole) {
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) {
      if (i >= window.begin && i < window.end) store<Reuse::kLast>(start + i, narrow<T>(values[i]));
    }
  }
}

template <typename Window_, int kTile>
BNK_DEVICE bool all_full(const Window_ (&windows)[kTile], int elements) {
  bool full = true;
#pragma unroll
  for (int i = 0; i < kTile; ++i) full &= windows[i].is_full(elements);
  return full;
}

// A tile of windows. All its loads are issued one behind the other, unless one is not of a vector, which is rare.
template <typename Loads, typename T, Layout kLayout, typename Window_, int kTile>
BNK_DEVICE void load_tile(const View<const T, kLayout>& view, const Window_ (&windows)[kTile], Vector<T> (&bits)[kTile],
                          const Loads& loads) {
  bool vectors = true;
  if constexpr (!Window_::kWhole) {
    vectors = view.wide;
#pragma unroll
    for (int i = 0; i < kTile; ++i) vectors &= windows[i].size() == 0 || is_inside(view, windows[i]);
  }
  if (vectors) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      bits[i] = windows[i].size() > 0 ? loads.vector(view.data + windows[i].offset) : Vector<T>{};
    }
  } else if constexpr (!Window_::kWhole) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) bits[i] = load_window(view, windows[i], loads);
  }
}

template <Reuse kReuse, typename T, Layout kLayout, typename Window_, int kTile>
BNK_DEVICE void load_tile(const View<const T, kLayout>& view, const Window_ (&windows)[kTile],
                          Vector<T> (&bits)[kTile]) {
  load_tile(view, windows, bits, Loads<kReuse>{});
}

template <typename T, typename Window_, int kTile>
BNK_DEVICE void unpack_tile(const Vector<T> (&bits)[kTile], const Window_ (&windows)[kTile],
                            Compute<T> (&values)[kTile][kVectorElements<T>]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) unpack_window(bits[i], windows[i], values[i]);
}

}  // namespace bnk
