// What the collectives of shared memory and of sockets have in common: streams of elements, sums, and the clock.
#ifndef HVDKIT_NATIVE_SUM_H_
#define HVDKIT_NATIVE_SUM_H_

#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tensorflow/core/framework/op_kernel.h"

namespace hvdkit {

inline uint64_t Now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000ull + now.tv_nsec;
}

inline bool Fail(tensorflow::OpKernelContext* context, const absl::Status& status) {
  context->SetStatus(status);
  return false;
}

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A part of a tensor within a stream of elements.
template <typename T>
struct Piece {
  const T* in;
  T* out;
  size_t count;
};

// 16-bit elements are summed in 32 bits.
template <typename T>
struct Wider {
  using type = float;
};
template <>
struct Wider<double> {
  using type = double;
};

// sum[i] = scale * (of[0][i] + of[1][i] + ...). Two ranks are common, so they get a loop that compilers optimize well.
template <typename T>
void Add(const std::vector<const T*>& of, size_t offset, size_t count, typename Wider<T>::type scale, T* sum) {
  using W = typename Wider<T>::type;
  if (of.size() == 2) {
    const T *a = of[0] + offset, *b = of[1] + offset;
    for (size_t i = 0; i < count; ++i) sum[i] = static_cast<T>((static_cast<W>(a[i]) + static_cast<W>(b[i])) * scale);
    return;
  }
  constexpr size_t kBlock = 512;
  W total[kBlock];
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t n = std::min(kBlock, count - begin);
    std::fill_n(total, n, W(0));
    for (const T* part : of) {
      for (size_t i = 0; i < n; ++i) total[i] += static_cast<W>(part[offset + begin + i]);
    }
    for (size_t i = 0; i < n; ++i) sum[begin + i] = static_cast<T>(total[i] * scale);
  }
}

}  // namespace hvdkit

#endif  // HVDKIT_NATIVE_SUM_H_
