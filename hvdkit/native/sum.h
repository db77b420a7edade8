// What the collectives of shared memory and of sockets have in common: streams of elements, sums, factors, layouts, and
// the clock.
#ifndef HVDKIT_NATIVE_SUM_H_
#define HVDKIT_NATIVE_SUM_H_

#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
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

// Reads a factor from an attribute. It is text, because TensorFlow's attributes have no doubles.
inline absl::Status ReadFactor(tensorflow::OpKernelConstruction* construction, const char* name, double* factor) {
  std::string text;
  TF_RETURN_IF_ERROR(construction->GetAttr(name, &text));
  *factor = std::strtod(text.c_str(), nullptr);
  return absl::OkStatus();
}

// What must be the same on all ranks, or elements of different tensors would be mixed up: a hash of the collective's kind
// and of the shapes of its tensors, and a number for the error message.
struct Layout {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, over words instead of bytes
  uint64_t elements = 0;

  void Add(uint64_t word) { hash = (hash ^ word) * 0x100000001b3; }

  // `from`: the first dimension that must be the same.
  void Add(const tensorflow::TensorShape& shape, int from) {
    uint64_t elements_here = 1;
    Add(shape.dims());
    for (int i = from; i < shape.dims(); ++i) {
      Add(shape.dim_size(i));
      elements_here *= shape.dim_size(i);
    }
    elements += elements_here;
  }
  bool operator==(const Layout& other) const { return hash == other.hash && elements == other.elements; }

  // Says how another rank's tensors differ from this rank's.
  std::string Mismatch(const Layout& other, const std::string& rank) const {
    const std::string theirs = std::to_string(other.elements), ours = std::to_string(elements);
    return "Mismatched shapes: " + rank + " passed " +
           (theirs == ours ? "other shapes than this rank" : theirs + " elements where this rank passed " + ours) +
           ". All ranks must pass tensors of the same shapes to a collective; to an allgather, rows of the same shape.";
  }
};

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
