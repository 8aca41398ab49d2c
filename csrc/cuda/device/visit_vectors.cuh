// Tiles: a thread's vectors, a few at a time, so that it has several loads under way before it waits for the first.
//
// A tile whose vectors are known to be whole when the kernel is compiled (FullVector) has loops of its own, which look at
// nothing: half of the instructions, where rows begin and end on vectors.
#pragma once

#include <type_traits>

#include "tile_iterator.cuh"

namespace bnk {

// The iterator's next vectors, `most` of them; empty ones behind its last.
template <typename Iterator, int kVectors>
BNK_DEVICE void next_vectors(Iterator& iterator, VectorAccess (&accesses)[kVectors], int most) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) accesses[i] = i < most ? iterator.next() : VectorAccess{0, 0, 0};
}

// Of a tile, as a visit gets it.
template <typename Tile>
inline constexpr int kAccesses = std::extent_v<std::remove_reference_t<Tile>>;

// Whether a thread's vectors first .. first + kTile - 1 are all there.
template <int kVectors, typename Iterator>
BNK_DEVICE bool has_vectors(const Iterator& iterator, int first) {
  return first + kVectors <= iterator.vectors();
}

// Visits a tile of whole vectors: visit(vectors, number), where `number` is that of the first.
template <int kVectors, typename T, typename Way, typename Visit>
BNK_DEVICE void visit_full(Way& way, int number, const Visit& visit) {
  FullVector<T> accesses[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) accesses[i] = way.next();
  visit(accesses, number);
}

// The same of the iterator's next vectors, `most` of them.
template <int kVectors, typename Iterator, typename Visit>
BNK_DEVICE void visit_any(Iterator& iterator, int number, int most, const Visit& visit) {
  VectorAccess accesses[kVectors];
  next_vectors(iterator, accesses, most);
  visit(accesses, number);
}

// Visits a thread's vectors from `first` on, `count` of them or as many as there are, tile by tile. A tile's vectors are of
// type FullVector where all of them are there and `whole` says so (the partition's are, and every tensor is wide): then
// nothing of them has to be looked at. Otherwise they are of type VectorAccess, and those that are not there are empty.
// kFirstVectors: whole vectors of a tile, as long as there are so many. The loops are not unrolled: a turn has as many loads
// under way as there are registers for.
template <int kVectors, int kFirstVectors = kVectors, typename Iterator, typename Visit>
BNK_DEVICE void visit_vectors(Iterator& iterator, int first, int count, bool whole, const Visit& visit) {
  using T = typename Iterator::Element;
  int done = 0;
  iterator.seek(first);
  if (whole) {
    auto way = iterator.whole();
    if constexpr (kFirstVectors > kVectors) {
#pragma unroll 1
      for (; done + kFirstVectors <= count && has_vectors<kFirstVectors>(iterator, first + done);
           done += kFirstVectors) {
        visit_full<kFirstVectors, T>(way, first + done, visit);
      }
    }
#pragma unroll 1
    for (; done + kVectors <= count && has_vectors<kVectors>(iterator, first + done); done += kVectors) {
      visit_full<kVectors, T>(way, first + done, visit);
    }
    iterator.seek(first + done);
  }
#pragma unroll 1
  for (; done < count && iterator.more(); done += kVectors)
    visit_any<kVectors>(iterator, first + done, count - done, visit);
}

// The same of all of a thread's vectors.
template <int kVectors, typename Iterator, typename Visit>
BNK_DEVICE void visit_vectors(Iterator& iterator, bool whole, const Visit& visit) {
  visit_vectors<kVectors>(iterator, 0, iterator.vectors(), whole, visit);
}

}  // namespace bnk
