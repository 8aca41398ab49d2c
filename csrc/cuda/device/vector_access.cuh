// Vector accesses: the unit in which kernels reach an [outer][channels][inner] array.
//
// A vector is kVectorElements<T> consecutive elements of which [begin, end) belong to the iterator's row; who visits which
// is told by tile_iterator.cuh. A full vector of a tensor that is aligned alike is one 16-byte access; every other vector is
// accessed element by element, so heads, tails and odd alignments are correct by construction.
#pragma once

#include "../../plan/plan.h"
#include "../ptx.cuh"

namespace bnk {

struct VectorAccess {
  static constexpr bool kFull = false;
  int64_t offset;  // of its element 0, in elements from the tensor's start; that element itself may lie outside
  int begin;
  int end;

  BNK_DEVICE int size() const { return end > begin ? end - begin : 0; }
  BNK_DEVICE bool is_full(int elements) const { return begin == 0 && end == elements; }
};

// A vector of which it is known when the kernel is compiled that it is full, and its tensors wide (View).
template <typename T>
struct FullVector {
  static constexpr bool kFull = true;
  static constexpr int begin = 0;
  static constexpr int end = kVectorElements<T>;
  int64_t offset;

  BNK_DEVICE static constexpr int size() { return end; }
  BNK_DEVICE static constexpr bool is_full(int /*elements*/) { return true; }
};

// One block's work: share s of a partition is split s / channel tiles of channel tile s % channel tiles, so that blocks which run side by side read
// neighbouring memory.
struct WorkTile {
  int64_t channel_tile;
  int64_t split;
};

// a / b, rounded down, for a >= 0. The product is off by few at most: by one below 2^51, which is where it ends in practice.
BNK_DEVICE int64_t quotient(int64_t a, const Divisor& b) {
  int64_t result = static_cast<int64_t>(static_cast<double>(a) * b.reciprocal);
  while (result * b.value > a) --result;
  while ((result + 1) * b.value <= a) ++result;
  return result;
}

BNK_DEVICE int64_t elements_of(const TilePartition& partition) {
  return partition.outer * partition.channels * partition.inner;
}
BNK_DEVICE int64_t work_tiles_of(const TilePartition& partition) {
  return partition.channel_tiles.value * partition.splits;
}

BNK_DEVICE WorkTile work_tile_at(const TilePartition& partition, int64_t index) {
  const int64_t split = quotient(index, partition.channel_tiles);
  return {index - split * partition.channel_tiles.value, split};
}

// Where in its 16-byte vector a tensor starts, in elements.
template <typename T>
BNK_DEVICE int phase_of(const T* data) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(data) / sizeof(T)) % kVectorElements<T>);
}

// A tensor as a kernel sees it. wide: the partition's vectors lie on 16-byte boundaries of it, and it is not smaller than one.
template <typename T, Layout kLayout>
struct View {
  T* data;
  int64_t elements;
  bool wide;
};

// Loading is in two steps, so that a thread can have several vectors in flight before it waits for the first:
// load_vectors only issues the loads, unpack_access looks at the bits.
//
// A vector that lies inside the tensor is loaded whole, also where only a part of it is the iterator's row: the other
// elements share its memory sectors anyway. They are then masked out.
template <typename T, Layout kLayout>
BNK_DEVICE bool is_inside(const View<const T, kLayout>& view, const VectorAccess& access) {
  if constexpr (kLayout != Layout::kChannelsFirst) return true;  // whole columns of vectors, if they are wide
  // In one comparison: an offset below 0 is a large one.
  return static_cast<uint64_t>(access.offset) <= static_cast<uint64_t>(view.elements - kVectorElements<T>);
}

template <typename Loads, typename T, Layout kLayout>
BNK_DEVICE Vector<T> load_access(const View<const T, kLayout>& view, const VectorAccess& access, const Loads& loads) {
  const T* start = view.data + access.offset;
  if (view.wide && access.size() > 0 && is_inside(view, access)) return loads.vector(start);
  Vector<T> bits{};
#pragma unroll
  for (int i = 0; i < kVectorElements<T>; ++i) {
    if (i >= access.begin && i < access.end) set_element(bits, i, loads.element(start + i));
  }
  return bits;
}

// What is loaded as the code says ...
template <CacheOp kCacheOp>
struct Loads {
  template <typename T>
  BNK_DEVICE Vector<T> vector(const T* start) const {
    return load_vector<kCacheOp>(start);
  }
  template <typename T>
  BNK_DEVICE T element(const T* start) const {
    return load<kCacheOp>(start);
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

template <CacheOp kCacheOp, typename T, Layout kLayout>
BNK_DEVICE Vector<T> load_access(const View<const T, kLayout>& view, const VectorAccess& access) {
  return load_access(view, access, Loads<kCacheOp>{});
}

template <CacheOp kCacheOp, typename T, Layout kLayout>
BNK_DEVICE Vector<T> load_access(const View<const T, kLayout>& view, const FullVector<T>& access) {
  return load_vector<kCacheOp>(view.data + access.offset);
}

// The elements of a vector; those that are not there are 0.
template <typename T, typename Access>
BNK_DEVICE void unpack_access(const Vector<T>& bits, const Access& access, opmath_type<T> (&out)[kVectorElements<T>]) {
  to_opmath_vector(bits, out);
  if constexpr (!Access::kFull) {
    if (access.is_full(kVectorElements<T>)) return;
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) {
      if (i < access.begin || i >= access.end) out[i] = 0;
    }
  }
}

// Writes the elements that are there, and no others. Results are not read again by the kernel that makes them.
template <typename T, Layout kLayout, typename Access>
BNK_DEVICE void store_access(const View<T, kLayout>& view, const Access& access,
                             const opmath_type<T> (&values)[kVectorElements<T>]) {
  T* start = view.data + access.offset;
  if (Access::kFull || (view.wide && access.is_full(kVectorElements<T>))) {
    store_vector<CacheOp::kStreaming>(start, from_opmath_vector<T>(values));
  } else if constexpr (!Access::kFull) {
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) {
      if (i >= access.begin && i < access.end) store<CacheOp::kStreaming>(start + i, from_opmath<T>(values[i]));
    }
  }
}

template <typename Access, int kVectors>
BNK_DEVICE bool all_full(const Access (&accesses)[kVectors], int elements) {
  bool full = true;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) full &= accesses[i].is_full(elements);
  return full;
}

// A tile of vectors. All its loads are issued one behind the other, unless one is not of a vector, which is rare.
template <typename Loads, typename T, Layout kLayout, typename Access, int kVectors>
BNK_DEVICE void load_vectors(const View<const T, kLayout>& view, const Access (&accesses)[kVectors],
                             Vector<T> (&bits)[kVectors], const Loads& loads) {
  bool vectors = true;
  if constexpr (!Access::kFull) {
    vectors = view.wide;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors &= accesses[i].size() == 0 || is_inside(view, accesses[i]);
  }
  if (vectors) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      bits[i] = accesses[i].size() > 0 ? loads.vector(view.data + accesses[i].offset) : Vector<T>{};
    }
  } else if constexpr (!Access::kFull) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) bits[i] = load_access(view, accesses[i], loads);
  }
}

template <CacheOp kCacheOp, typename T, Layout kLayout, typename Access, int kVectors>
BNK_DEVICE void load_vectors(const View<const T, kLayout>& view, const Access (&accesses)[kVectors],
                             Vector<T> (&bits)[kVectors]) {
  load_vectors(view, accesses, bits, Loads<kCacheOp>{});
}

template <typename T, typename Access, int kVectors>
BNK_DEVICE void unpack_vectors(const Vector<T> (&bits)[kVectors], const Access (&accesses)[kVectors],
                               opmath_type<T> (&values)[kVectors][kVectorElements<T>]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) unpack_access(bits[i], accesses[i], values[i]);
}

}  // namespace bnk
