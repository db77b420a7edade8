// Messages without their zeros, for links that take longer than packing does.
//
// Many gradients have zeros: those of the weights of a unit whose ReLU is off for the whole batch, of inputs that are
// always zero, of rows of an embedding that no sample has. Of a message, each block of 64 words of four bytes is sent as
// a mask of the words that are not zero, and these words. Nothing is rounded: the other side gets the same bits.
#ifndef HVDKIT_NATIVE_PACK_H_
#define HVDKIT_NATIVE_PACK_H_

#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace hvdkit {

using Places = std::vector<iovec>;

constexpr size_t kWord = sizeof(uint32_t), kMask = sizeof(uint64_t), kBlockWords = 64;
constexpr size_t kSamples = 256;
constexpr double kPackSecondsPerByte = 0.5e-9;  // to pack and unpack it, measured on one core of an AMD EPYC

inline size_t BytesOf(const Places& places) {
  size_t bytes = 0;
  for (const iovec& place : places) bytes += place.iov_len;
  return bytes;
}

inline bool HasWholeWords(const Places& places) {
  return std::all_of(places.begin(), places.end(), [](const iovec& place) { return place.iov_len % kWord == 0; });
}

// Tensors of halves may begin between two words.
inline uint32_t WordAt(const char* at) {
  uint32_t word;
  std::memcpy(&word, at, kWord);
  return word;
}

// Estimates the fraction of words that are zero, from samples at equal distances.
inline double FractionOfZeros(const Places& places) {
  const size_t words = BytesOf(places) / kWord, stride = std::max<size_t>(1, words / kSamples);
  size_t zeros = 0, samples = 0, next = 0, begin = 0;
  for (const iovec& place : places) {
    const auto* at = static_cast<const char*>(place.iov_base);
    const size_t end = begin + place.iov_len / kWord;
    for (; next < end; next += stride, ++samples) zeros += WordAt(at + (next - begin) * kWord) == 0;
    begin = end;
  }
  return samples ? static_cast<double>(zeros) / samples : 0;
}

// Returns whether packing takes less time than it saves on a link of `rate` bytes per second.
inline bool IsWorthPacking(const Places& places, double rate) {
  constexpr double masks = static_cast<double>(kMask) / (kBlockWords * kWord);
  return FractionOfZeros(places) - masks > kPackSecondsPerByte * rate;
}

inline std::vector<char> Pack(const Places& places) {
  const size_t words = BytesOf(places) / kWord;
  std::vector<char> packed(words * kWord + (words + kBlockWords - 1) / kBlockWords * kMask + kWord);
  char* mask_at = packed.data();
  auto* out = reinterpret_cast<uint32_t*>(mask_at + kMask);
  uint64_t mask = 0;
  size_t in_block = 0;
  const auto end_block = [&] {
    std::memcpy(mask_at, &mask, kMask);
    mask_at = reinterpret_cast<char*>(out);
    mask = in_block = 0;
  };
  for (const iovec& place : places) {
    const auto* in = static_cast<const char*>(place.iov_base);
    for (size_t left = place.iov_len / kWord; left;) {
      if (!in_block) out = reinterpret_cast<uint32_t*>(mask_at + kMask);
      const size_t n = std::min(left, kBlockWords - in_block);
      for (size_t i = 0; i < n; ++i) {
        *out = WordAt(in + i * kWord);  // the next word overwrites it if it is zero
        const uint64_t is_kept = *out != 0;
        out += is_kept;
        mask |= is_kept << (in_block + i);
      }
      in += n * kWord, left -= n, in_block += n;
      if (in_block == kBlockWords) end_block();
    }
  }
  if (in_block) end_block();
  packed.resize(mask_at - packed.data());
  return packed;
}

// Writes the words of `packed[:bytes]`, which must be followed by a readable word, to `places`. Returns false if there
// are not as many.
inline bool Unpack(const char* packed, size_t bytes, const Places& places) {
  const char *at = packed, *end = at + bytes;
  const auto has = [&](size_t needed) { return static_cast<size_t>(end - at) >= needed; };
  uint64_t mask = 0;
  size_t in_block = 0;  // words that are left
  for (const iovec& place : places) {
    auto* out = static_cast<char*>(place.iov_base);
    for (size_t left = place.iov_len / kWord; left;) {
      if (!in_block) {
        if (!has(kMask)) return false;
        std::memcpy(&mask, at, kMask);
        at += kMask;
        in_block = kBlockWords;
        if (!has(__builtin_popcountll(mask) * kWord)) return false;
      }
      const size_t n = std::min(left, in_block);
      for (size_t i = 0; i < n; ++i, mask >>= 1) {
        const uint32_t is_kept = mask & 1, word = WordAt(at) & -is_kept;
        std::memcpy(out + i * kWord, &word, kWord);
        at += is_kept * kWord;
      }
      out += n * kWord, left -= n, in_block -= n;
    }
  }
  return at == end;
}

}  // namespace hvdkit

#endif  // HVDKIT_NATIVE_PACK_H_
