// Tiles: a thread's windows, a few at a time, so that it has several loads under way before it waits for the first.
//
// A tile whose windows are known to be whole when the kernel is compiled (WholeWindow) has loops of its own, which look at
// nothing: half of the instructions, where rows begin and end on vectors.
#pragma once

#include <type_traits>

#include "walkers.cuh"

namespace bnk {

// The walker's next windows, `most` of them; empty ones behind its last.
template <typename Walker, int kTile>
BNK_DEVICE void next_tile(Walker& walker, Window (&windows)[kTile], int most) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) windows[i] = i < most ? walker.next() : Window{0, 0, 0};
}

// Of a tile, as a visit gets it.
template <typename Tile>
inline constexpr int kWindows = std::extent_v<std::remove_reference_t<Tile>>;

// Whether a thread's windows first .. first + kTile - 1 are all there.
template <int kTile, typename Walker>
BNK_DEVICE bool has_tile(const Walker& walker, int first) {
  return first + kTile <= walker.windows();
}

// Visits a tile of whole windows: visit(windows, number), where `number` is that of the first.
template <int kTile, typename T, typename Way, typename Visit>
BNK_DEVICE void visit_whole(Way& way, int number, const Visit& visit) {
  WholeWindow<T> windows[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) windows[i] = way.next();
  visit(windows, number);
}

// The same of the walker's next windows, `most` of them.
template <int kTile, typename Walker, typename Visit>
BNK_DEVICE void visit_any(Walker& walker, int number, int most, const Visit& visit) {
  Window windows[kTile];
  next_tile(walker, windows, most);
  visit(windows, number);
}

// Visits a thread's windows from `first` on, `count` of them or as many as there are, tile by tile. A tile's windows are of
// type WholeWindow where all of them are there and `whole` says so (the walk's are, and every tensor is wide): then
// nothing of them has to be looked at. Otherwise they are of type Window, and those that are not there are empty.
// kFirstTile: whole windows of a tile, as long as there are so many. The loops are not unrolled: a turn has as many loads
// under way as there are registers for.
template <int kTile, int kFirstTile = kTile, typename Walker, typename Visit>
BNK_DEVICE void visit_tiles(Walker& walker, int first, int count, bool whole, const Visit& visit) {
  using T = typename Walker::Element;
  int done = 0;
  walker.seek(first);
  if (whole) {
    auto way = walker.whole();
    if constexpr (kFirstTile > kTile) {
#pragma unroll 1
      for (; done + kFirstTile <= count && has_tile<kFirstTile>(walker, first + done); done += kFirstTile) {
        visit_whole<kFirstTile, T>(way, first + done, visit);
      }
    }
#pragma unroll 1
    for (; done + kTile <= count && has_tile<kTile>(walker, first + done); done += kTile) {
      visit_whole<kTile, T>(way, first + done, visit);
    }
    walker.seek(first + done);
  }
#pragma unroll 1
  for (; done < count && walker.more(); done += kTile) visit_any<kTile>(walker, first + done, count - done, visit);
}

// The same of all of a thread's windows.
template <int kTile, typename Walker, typename Visit>
BNK_DEVICE void visit_tiles(Walker& walker, bool whole, const Visit& visit) {
  visit_tiles<kTile>(walker, 0, walker.windows(), whole, visit);
}

}  // namespace bnk
