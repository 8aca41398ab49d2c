// Memory asked for before it is needed. Part of level.h.
//
// Reads ask for what is read next. For statistics that is the tile after this one, which their caller knows; results, and
// what is walked from end to end, ask for what lies this far ahead.
constexpr int64_t kReadAhead = 2048;   // bytes
constexpr int64_t kWriteAhead = 1024;  // bytes

template <typename T>
BNK_INLINE void read_ahead(const T* here, int64_t bytes = kReadAhead) {
  for (int64_t line = 0; line < static_cast<int64_t>(Lanes<Accumulate<T>>::kCount * sizeof(T)); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(here) + bytes + line);
  }
}

template <typename T>
BNK_INLINE void write_ahead(const T* here) {
  for (int64_t line = 0; line < static_cast<int64_t>(Lanes<Accumulate<T>>::kCount * sizeof(T)); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(here) + kWriteAhead + line, 1);
  }
}
