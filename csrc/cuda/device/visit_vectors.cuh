// Tiles: groups of a thread's vectors, so that a thread has several loads in flight before it waits for the first.
//
// Tiles of vectors known at compile time to be full (FullVector) have their own loops without predicates: half the
// instructions, where rows begin and end on vector boundaries.
#pragma once

#include <type_traits>

#include "tile_iterator.cuh"

namespace bnk {

// The iterator's next `most` vectors, followed by empty ones.
template <typename Iterator, int kVectors>
BNK_DEVICE void next_vectors(Iterator& iterator, VectorAccess (&accesses)[kVectors], int most) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) accesses[i] = i < most ? iterator.next() : VectorAccess{0, 0, 0};
}

// Vectors of a tile, as passed to a visit.
template <typename Tile>
inline constexpr int kAccesses = std::extent_v<std::remove_reference_t<Tile>>;

// Whether the thread's vectors first .. first + kVectors - 1 all exist.
template <int kVectors, typename Iterator>
BNK_DEVICE bool has_vectors(const Iterator& iterator, int first) {
  return first + kVectors <= iterator.vectors();
}

// Visits a tile of full vectors: visit(vectors, number), where `number` is the number of the first vector.
template <int kVectors, typename T, typename FullIterator, typename Visit>
BNK_DEVICE void visit_full(FullIterator& full_iterator, int number, const Visit& visit) {
  FullVector<T> accesses[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) accesses[i] = full_iterator.next();
  visit(accesses, number);
}

// Visits a tile of the iterator's next `most` vectors, full or not.
template <int kVectors, typename Iterator, typename Visit>
BNK_DEVICE void visit_any(Iterator& iterator, int number, int most, const Visit& visit) {
  VectorAccess accesses[kVectors];
  next_vectors(iterator, accesses, most);
  visit(accesses, number);
}

// Visits up to `count` of a thread's vectors from `first` on, tile by tile. The vectors of a tile have type FullVector,
// which needs no predicates, if all of them exist and `whole` is set (the partition's vectors are full and every tensor
// is wide). Otherwise they have type VectorAccess, and missing vectors are empty. kFirstVectors: tile size of the
// leading full tiles, while enough vectors remain. The loops are not unrolled: an iteration already has as many loads
// in flight as registers allow.
template <int kVectors, int kFirstVectors = kVectors, typename Iterator, typename Visit>
BNK_DEVICE void visit_vectors(Iterator& iterator, int first, int count, bool whole, const Visit& visit) {
  using T = typename Iterator::Element;
  int done = 0;
  iterator.seek(first);
  if (whole) {
    auto full_iterator = iterator.whole();
    if constexpr (kFirstVectors > kVectors) {
#pragma unroll 1
      for (; done + kFirstVectors <= count && has_vectors<kFirstVectors>(iterator, first + done);
           done += kFirstVectors) {
        visit_full<kFirstVectors, T>(full_iterator, first + done, visit);
      }
    }
#pragma unroll 1
    for (; done + kVectors <= count && has_vectors<kVectors>(iterator, first + done); done += kVectors) {
      visit_full<kVectors, T>(full_iterator, first + done, visit);
    }
    iterator.seek(first + done);
  }
#pragma unroll 1
  for (; done < count && iterator.more(); done += kVectors)
    visit_any<kVectors>(iterator, first + done, count - done, visit);
}

// Visits all of a thread's vectors.
template <int kVectors, typename Iterator, typename Visit>
BNK_DEVICE void visit_vectors(Iterator& iterator, bool whole, const Visit& visit) {
  visit_vectors<kVectors>(iterator, 0, iterator.vectors(), whole, visit);
}

}  // namespace bnk
