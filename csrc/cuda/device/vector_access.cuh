// VectorAccess: the unit of access to an [outer][channels][inner] array.
//
// A vector is kVectorElements<T> consecutive elements, of which [begin, end) belong to the iterator's row;
// tile_iterator.cuh assigns vectors to threads. A full vector of an equally aligned tensor is one 16-byte access. Every
// other vector is accessed element by element, so heads, tails and odd alignments are correct by construction.
#pragma once

#include "../../plan/plan.h"
#include "../ptx.cuh"

namespace bnk {

struct VectorAccess {
  static constexpr bool kFull = false;
  int64_t offset;  // of element 0, in elements from the tensor's start; element 0 may lie outside
  int begin;
  int end;

  BNK_DEVICE int size() const { return end > begin ? end - begin : 0; }
  BNK_DEVICE bool is_full(int elements) const { return begin == 0 && end == elements; }
};

// A vector known at compile time to be full, in tensors known to be wide (View).
template <typename T>
struct FullVector {
  static constexpr bool kFull = true;
  static constexpr int begin = 0;
  static constexpr int end = kVectorElements<T>;
  int64_t offset;

  BNK_DEVICE static constexpr int size() { return end; }
  BNK_DEVICE static constexpr bool is_full(int /*elements*/) { return true; }
};

// Work of one CTA. Work tile i of a partition is split i / channel_tiles of channel tile i % channel_tiles, so CTAs
// that run concurrently read adjacent memory.
struct WorkTile {
  int64_t channel_tile;
  int64_t split;
};

// floor(a / b) for a >= 0. The rounded product is off by a few at most: by at most one below 2^51, the practical limit.
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

// Offset of a tensor's start from a 16-byte boundary, in elements.
template <typename T>
BNK_DEVICE int phase_of(const T* data) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(data) / sizeof(T)) % kVectorElements<T>);
}

// A tensor as a kernel sees it. wide: the partition's vectors lie on its 16-byte boundaries, and it has at least one
// full vector of elements.
template <typename T, Layout kLayout>
struct View {
  T* data;
  int64_t elements;
  bool wide;
};

// Loads take two steps, so that a thread can have several vectors in flight before it waits for the first: load_vectors
// only issues the loads, unpack_access uses the bits.
//
// A vector that lies inside the tensor is loaded fully even if only part of it belongs to the iterator's row: the other
// elements share its memory sectors anyway. They are then masked out.
template <typename T, Layout kLayout>
BNK_DEVICE bool is_inside(const View<const T, kLayout>& view, const VectorAccess& access) {
  if constexpr (kLayout != Layout::kChannelsFirst) return true;  // columns of full vectors, if the view is wide
  // A single comparison: as an unsigned integer, a negative offset is too large.
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

// Loads with a cache operator known at compile time.
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

// Loads with a cache hint known at run time.
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

// Converts the elements of a vector; elements outside [begin, end) become 0.
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

// Writes the elements in [begin, end) only. Results are streamed: the kernel that writes them does not read them again.
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

// Loads a tile of vectors. All loads are issued back to back, except in the rare tile with an access that is not one
// 16-byte load.
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
