// Draws in whole numbers, as ops/race.py says; both give the same bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace grok1 {

constexpr int32_t kOctave = 1 << 24;
constexpr int32_t kLeast = -120 * kOctave;
constexpr int32_t kForbidden = std::numeric_limits<int32_t>::min();

using Words = uint32_t __attribute__((vector_size(sizeof(Floats))));
using Longs = uint64_t __attribute__((vector_size(2 * sizeof(Floats))));

constexpr uint32_t kExp2[] = {1488522236, 515882450, 119194884, 20650514, 2875340, 313683, 44540};
constexpr uint32_t kLog2[] = {598381691, 211551882, 79453832, 39700180, 10724941, 0, 10835733};
constexpr uint32_t kEarly[] = {774509980, 161866735, 45823803, 22197021, 3005039, 0, 4563343};

inline uint32_t multiply_high(uint32_t x, uint32_t y) { return uint64_t{x} * y >> 32; }

inline Words multiply_high(Words x, Words y) {
#if defined(__AVX512F__)
  __m512i a = reinterpret_cast<__m512i>(x), b = reinterpret_cast<__m512i>(y);
  __m512i even = _mm512_mul_epu32(a, b);
  __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  return reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
#elif defined(__AVX2__)
  __m256i a = reinterpret_cast<__m256i>(x), b = reinterpret_cast<__m256i>(y);
  __m256i even = _mm256_mul_epu32(a, b);
  __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  return reinterpret_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#elif defined(__aarch64__)
  const uint32x4_t a = (uint32x4_t)x, b = (uint32x4_t)y;
  const uint64x2_t first = vmull_u32(vget_low_u32(a), vget_low_u32(b));
  const uint64x2_t second = vmull_high_u32(a, b);
  return (Words)vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
#else
  Longs product = __builtin_convertvector(x, Longs) * __builtin_convertvector(y, Longs);
  return __builtin_convertvector(product >> 32, Words);
#endif
}

template <typename Number>
Number polynomial(const uint32_t (&coefficients)[7], Number x) {
  Number result = Number{} + coefficients[6];
  for (int i = 5; i >= 0; --i) result = multiply_high(result, x) + coefficients[i];
  return result;
}

// 2^(log_weight / kOctave) * 2^(30 + octaves), where octaves are -(log_weight >> 24).
template <typename Number>
Number mantissa(Number log_weight) {
  Number fraction = log_weight << 8;
  return (multiply_high(polynomial(kExp2, fraction), fraction) >> 1) + (1u << 30);
}

// The weight of a token, of which the largest is 2^44.
inline uint64_t weight(int32_t log_weight) {
  int64_t octaves = -(int64_t{log_weight} >> 24);
  return octaves > 45 ? 0 : (uint64_t{mantissa(static_cast<uint32_t>(log_weight))} << 14) >> octaves;
}

// The weight as a float, of which the largest is 1.
inline float relative_weight(int32_t log_weight) {
  auto upper = static_cast<float>(mantissa(static_cast<uint32_t>(log_weight)));
  return std::ldexp(upper, (log_weight >> 24) - 30);
}

// A sum of weights, rounded as race.Sum.value does.
inline float value_of(uint64_t sum) {
  auto high = static_cast<float>(static_cast<uint32_t>(sum >> 30));
  auto middle = static_cast<float>(static_cast<uint32_t>(sum >> 15 & 0x7FFF));
  auto low = static_cast<float>(static_cast<uint32_t>(sum & 0x7FFF));
  return high * 0x1p30f + middle * 0x1p15f + low;
}

// log2 of a number above 0, in units of 2^-24.
inline int32_t log2_of(uint32_t x) {
  int zeros = __builtin_clz(x);
  uint32_t fraction = x << zeros << 1, rest = ~fraction;
  uint32_t bend = multiply_high(polynomial(kLog2, rest), multiply_high(fraction, rest));
  return (31 - zeros) * kOctave + static_cast<int32_t>((fraction >> 8) + (bend >> 7));
}

// Standard Gumbel noise from a random number, in the units of log-weights.
inline int32_t noise(uint32_t bits) {
  constexpr int32_t kLog2OfLn2 = -8871228;
  bool is_late = bits >> 31;
  uint32_t odd = (is_late ? ~bits : bits) << 1 | 1;
  int32_t of_odd = log2_of(odd);
  if (is_late) return -(log2_of(33u * kOctave - of_odd) - 24 * kOctave + kLog2OfLn2);
  auto factor = static_cast<int32_t>(multiply_high(polynomial(kEarly, odd), odd) >> 7);
  return static_cast<int32_t>(33u * kOctave - of_odd) - factor;
}

inline const Words kCounting = [] {
  Words numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}();

// An upper bound of `noise`, to within two octaves.
inline Ints noise_bound(Words bits) {
  Floats upper = __builtin_convertvector((Ints)(bits >> 8), Floats);
  Ints exponent = ((Ints)upper >> 23) - 127;
  exponent = exponent < -9 ? Ints{} - 9 : exponent;
  return (24 - exponent) * kOctave;
}

// Threefry-2x32 of 20 rounds: x and y are the counter, then the random numbers.
template <typename Number>
void threefry(uint32_t key0, uint32_t key1, Number& x, Number& y) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
  x += keys[0];
  y += keys[1];
#pragma GCC unroll 5
  for (uint32_t group = 0; group < 5; ++group) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      int rotation = kRotations[group % 2][i];
      x += y;
      y = (y << rotation | y >> (32 - rotation)) ^ x;
    }
    x += keys[(group + 1) % 3];
    y += keys[(group + 2) % 3] + group + 1;
  }
}

// Log-weights of logits, below the largest of them; not above 0 whatever is given.
class LogWeights {
 public:
  LogWeights(float largest, float temperature)
      : largest_(largest),
        factor_(std::min(kUnits / std::max(temperature, std::numeric_limits<float>::min()), kMost)) {
  }

  int32_t of(float logit) const {
    float below = std::min(std::max(logit - largest_, -kMost), 0.0f);
    return static_cast<int32_t>(std::max(below * factor_, kFloor));
  }

  Ints of(Floats logits) const {
    Floats below = logits - largest_;
    below = below > -kMost ? below : Floats{} - kMost;
    below = below < 0 ? below : Floats{};
    Floats scaled = below * factor_;
    scaled = scaled > kFloor ? scaled : Floats{} + kFloor;
    return __builtin_convertvector(scaled, Ints);
  }

 private:
  static constexpr float kMost = std::numeric_limits<float>::max();
  static constexpr float kUnits = 24204406.0f;  // kOctave / ln 2
  static constexpr auto kFloor = static_cast<float>(kLeast);

  float largest_, factor_;
};

// The log-weight from which on min-p keeps tokens.
inline int32_t least_kept(float min_p) {
  int32_t low = kLeast - 1, high = 0;
  while (min_p > 0 && high - low > 1) {
    int32_t middle = low + (high - low) / 2;
    (relative_weight(middle) >= min_p ? high : low) = middle;
  }
  return min_p > 0 ? high : kLeast;
}

// The random numbers of a row's draw: from the request's key, folded with the position.
class RowKey {
 public:
  RowKey(const uint32_t* key, int32_t position) : words_{0, static_cast<uint32_t>(position)} {
    threefry(key[0], key[1], words_[0], words_[1]);
  }

  template <typename Number>
  void block(Number& x, Number& y) const {
    threefry(words_[0], words_[1], x, y);
  }

  // Of one token.
  uint32_t bits(int64_t id) const {
    auto x = static_cast<uint32_t>(id / kGroup * kHalf + id % kHalf);
    uint32_t y = 0;
    block(x, y);
    return id % kGroup < kHalf ? x : y;
  }

  // Tokens of a group; one word of a block is for a token of its first half, the other of the second.
  static constexpr int64_t kGroup = 32, kHalf = 16;

 private:
  uint32_t words_[2];
};

// Calls `enter(id, bits)` for all tokens whose log-weight is at least `least`, which is above that
// of a forbidden one, and with noise may reach `bar`, which `enter` may raise. The size is a
// multiple of a group.
template <typename Enter>
void race(const RowKey& key, const int32_t* log_weights, int64_t size, int32_t least,
          const int64_t& bar, Enter enter) {
  constexpr int64_t kHalf = RowKey::kHalf;
  for (int64_t start = 0; start < size; start += RowKey::kGroup) {
    for (int64_t part = 0; part < kHalf; part += kLanes) {
      Ints first, second;
      const int32_t* from = log_weights + start + part;
      std::memcpy(&first, from, sizeof(first));
      std::memcpy(&second, from + kHalf, sizeof(second));
      if (!any((first >= least) | (second >= least))) continue;
      Words x = static_cast<uint32_t>(start / 2 + part) + kCounting, y = {};
      key.block(x, y);
      const auto here = static_cast<int32_t>(std::max<int64_t>(bar, kForbidden));
      Ints can_win[2] = {(first >= least) & (first + noise_bound(x) >= here),
                         (second >= least) & (second + noise_bound(y) >= here)};
      if (!any(can_win[0] | can_win[1])) continue;
      for (int half = 0; half < 2; ++half) {
        for (int lane = 0; lane < kLanes; ++lane) {
          if (!can_win[half][lane]) continue;
          enter(start + half * kHalf + part + lane, half == 0 ? x[lane] : y[lane]);
        }
      }
    }
  }
}

// Room for the log-weights of a row, in whole groups of which what is beyond the row is forbidden.
inline int32_t* groups_of(std::vector<int32_t>& memory, int64_t size) {
  memory.resize((size + RowKey::kGroup - 1) / RowKey::kGroup * RowKey::kGroup);
  std::fill(memory.begin() + size, memory.end(), kForbidden);
  return memory.data();
}

}  // namespace grok1
