// Rounding float32 matrices to 4 bits: scales searched for the least squared error, and error
// feedback. What is compared is whole numbers, or floats that are only multiplied and divided, so
// that no order of sums and no fused operation changes a bit: `ops/int4_rounding.py` says the same
// through XLA, and says why.
//
// A tile is kRoundedColumns columns of one block of weight rows. Pairs of rows lie side by side, as
// multiplications of 16-bit numbers want them: [pairs, kRoundedColumns, 2].

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "int4.h"

namespace grok1 {

constexpr int kRoundedColumns = 16;
constexpr int kPair = 2 * kRoundedColumns;
constexpr int kMostBlockRows = 256, kMostGroups = 8;
constexpr float kLeastLargest = 0x1p-100f;  // below it a block is rounded to zeros

// Sizes of the largest value of a group that are tried, in units of the book; and those of the
// largest scale of a block, in units of the 6-bit scales.
constexpr int kLargest[22] = {-136, -132, -128, -124, -120, -116, -112, -108, -104, -100, -96,
                              -92,  88,   92,   96,   100,  104,  108,  112,  116,  120,  124};
constexpr float kLargestOfBlock[8] = {-32, -31, -30, -28, 28, 29, 30, 31};

using Lanes = int32_t[kRoundedColumns];
using FloatLanes = float[kRoundedColumns];
using Ints = int32_t __attribute__((vector_size(sizeof(Floats))));

inline Ints load(const int32_t* from) {
  Ints ints;
  std::memcpy(&ints, from, sizeof(ints));
  return ints;
}

inline void store_ints(int32_t* to, Ints ints) { std::memcpy(to, &ints, sizeof(ints)); }

inline Floats to_floats(Ints ints) { return __builtin_convertvector(ints, Floats); }

// To the nearest whole number, of two the even one, no further than `least` and `most` from zero.
inline Ints rounded(Floats number, float least, float most) {
  number = number < least ? Floats{} + least : number;
  number = number > most ? Floats{} + most : number;
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtps_epi32(number));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtps_epi32(number));
#elif defined(__aarch64__)
  return (Ints)vcvtnq_s32_f32((float32x4_t)number);
#else
  Ints ints;
  for (int lane = 0; lane < kLanes; ++lane) ints[lane] = __builtin_rintf(number[lane]);
  return ints;
#endif
}

inline Floats divided(Floats one, Floats other) {
  return other == 0 ? Floats{} : one / (other == 0 ? Floats{} + 1 : other);
}

// Whole numbers that are nearer to the next value of the book than to the one before.
constexpr int kAbove[15] = {-116, -94, -74, -57, -42, -29, -16, -5, 7, 19, 31, 45, 61, 79, 101};

// Of eight whole numbers each, from -128 on, the code of the first, and the last that has it if
// another of them has the next: two values of the book are never that near to each other.
struct Octets {
  int8_t code[32] = {}, last[32] = {};

  constexpr Octets() {
    for (int octet = 0; octet < 32; ++octet) {
      const int first = 8 * octet - 128;
      last[octet] = 127;
      for (int above : kAbove) {
        code[octet] += first > above;
        if (first <= above && above < first + 7) last[octet] = above;
      }
    }
  }
};

constexpr float kMiddles[15] = {-115.5f, -93.5f, -74, -57, -42, -28.5f, -16,  -4.5f,
                                7,       19,     31.5f, 45.5f, 61, 79,     101};

constexpr float kMostFactor = 32700;  // 16 bits hold the scaled weight and what rounds it

// product = sum of weight * value, square = sum of value^2 over `pairs` pairs of rows, where value
// is the book's nearest to weight * factor / 2^21. Weights are below 2^15, factors at most kMostFactor.
inline void fit(const int16_t* weights, int64_t pairs, const Lanes& factor, Lanes& product,
                Lanes& square) {
#if defined(__AVX2__)
  const __m256i book = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113));
  auto table = [](const int8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  };
  static constexpr Octets octets;
  const __m256i codes[2] = {table(octets.code), table(octets.code + 16)};
  const __m256i lasts[2] = {table(octets.last), table(octets.last + 16)};
  const __m256i half = _mm256_set1_epi16(32);
  __m256i factors[2], products[2] = {}, squares[2] = {};
  for (int v = 0; v < 2; ++v) {
    __m256i each = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(factor + 8 * v));
    factors[v] = _mm256_or_si256(_mm256_slli_epi32(each, 16),
                                 _mm256_and_si256(each, _mm256_set1_epi32(0xFFFF)));
  }
  for (int64_t i = 0; i < pairs; ++i, weights += kPair) {
    __m256i weight[2], scaled[2];
    for (int v = 0; v < 2; ++v) {
      weight[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 16 * v));
      __m256i fine = _mm256_mulhrs_epi16(weight[v], factors[v]);
      scaled[v] = _mm256_srai_epi16(_mm256_add_epi16(fine, half), 6);
    }
    __m256i bytes = _mm256_packs_epi16(scaled[0], scaled[1]);
    __m256i place = _mm256_srli_epi16(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), 3);
    place = _mm256_and_si256(place, _mm256_set1_epi8(31));
    __m256i is_second = _mm256_slli_epi16(place, 3);
    __m256i code = _mm256_blendv_epi8(_mm256_shuffle_epi8(codes[0], place),
                                      _mm256_shuffle_epi8(codes[1], place), is_second);
    __m256i last = _mm256_blendv_epi8(_mm256_shuffle_epi8(lasts[0], place),
                                      _mm256_shuffle_epi8(lasts[1], place), is_second);
    code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(bytes, last));
    __m256i values = _mm256_shuffle_epi8(book, code);
    // In the order in which the pack took them.
    __m256i value[2] = {_mm256_srai_epi16(_mm256_unpacklo_epi8(values, values), 8),
                        _mm256_srai_epi16(_mm256_unpackhi_epi8(values, values), 8)};
    for (int v = 0; v < 2; ++v) {
      products[v] = _mm256_add_epi32(products[v], _mm256_madd_epi16(weight[v], value[v]));
      squares[v] = _mm256_add_epi32(squares[v], _mm256_madd_epi16(value[v], value[v]));
    }
  }
  for (int v = 0; v < 2; ++v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(product + 8 * v), products[v]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(square + 8 * v), squares[v]);
  }
#else
  std::fill_n(product, kRoundedColumns, 0);
  std::fill_n(square, kRoundedColumns, 0);
  for (int64_t i = 0; i < pairs; ++i, weights += kPair) {
    for (int lane = 0; lane < kPair; ++lane) {
      int32_t fine = (weights[lane] * factor[lane / 2] + (1 << 14)) >> 15;
      int32_t scaled = std::clamp((fine + 32) >> 6, -128, 127), code = 0;
      for (int above : kAbove) code += scaled > above;
      int32_t value = static_cast<int32_t>(kBook[code]);
      product[lane / 2] += weights[lane] * value;
      square[lane / 2] += value * value;
    }
  }
#endif
}

inline uint16_t float_to_half(float number) {
#if defined(__F16C__)
  return _cvtss_sh(number, 0);
#elif defined(__aarch64__)
  const __fp16 half = number;
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
#else
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  uint32_t sign = bits >> 16 & 0x8000, exponent = bits >> 23 & 255, mantissa = bits & 0x7FFFFF;
  if (exponent >= 143) return sign | 0x7C00;  // 2^16 and more
  if (exponent < 102) return sign;
  // The bits that are kept, and to even those that are dropped; a carry goes into the exponent.
  uint32_t shift = exponent < 113 ? 126 - exponent : 13;
  uint32_t whole = mantissa | (exponent < 113 ? 0x800000 : (exponent - 112) << 23);
  uint32_t kept = whole >> shift, dropped = whole & ((1u << shift) - 1), middle = 1u << (shift - 1);
  return sign | (kept + (dropped > middle || (dropped == middle && kept & 1)));
#endif
}

// The scales of a block, for `columns` columns of weights [rows, kRoundedColumns].
struct BlockScales {
  int64_t groups, group;               // and the rows of a group
  int32_t sub[kMostGroups][kRoundedColumns];  // from -32 to 31
  uint16_t scale[kRoundedColumns];

  void search(const float* weights, int64_t rows) {
    alignas(kCacheLine) int16_t whole[kMostBlockRows * kRoundedColumns];
    int exponent[kRoundedColumns];  // a weight is a whole number times 2^exponent
    FloatLanes largest = {}, unit;
    for (int64_t k = 0; k < rows; ++k) {
      for (int c = 0; c < kRoundedColumns; ++c) {
        largest[c] = std::max(largest[c], std::fabs(weights[k * kRoundedColumns + c]));
      }
    }
    for (int c = 0; c < kRoundedColumns; ++c) {
      exponent[c] = largest[c] < kLeastLargest ? 0 : std::ilogb(largest[c]) - 14;
      unit[c] = largest[c] < kLeastLargest ? 0 : std::ldexp(1.0f, -exponent[c]);
    }
    for (int64_t k = 0; k < rows; ++k) {
      Lanes numbers;
      for (int c = 0; c < kRoundedColumns; c += kLanes) {
        Floats scaled = load(weights + k * kRoundedColumns + c) * load(unit + c);
        store_ints(numbers + c, rounded(scaled, -32767, 32767));
      }
      for (int c = 0; c < kRoundedColumns; ++c) {
        whole[k / 2 * kPair + 2 * c + k % 2] = static_cast<int16_t>(numbers[c]);
      }
    }
    groups = rows / group;
    Lanes shift[kMostGroups];
    FloatLanes wanted[kMostGroups];
    for (int64_t g = 0; g < groups; ++g) {
      search_group(whole + g * group * kRoundedColumns, shift[g], wanted[g]);
    }
    search_block(whole, shift, wanted, exponent);
  }

 private:
  // Makes the group's weights as large as 15 bits hold, and finds the scale that is best for them,
  // in units of the block.
  void search_group(int16_t* whole, Lanes& shift, FloatLanes& wanted) {
    const int64_t pairs = group / 2;
    Lanes largest = {}, factor, product, square;
    for (int64_t k = 0; k < group; ++k) {
      for (int c = 0; c < kRoundedColumns; ++c) {
        int32_t number = whole[k / 2 * kPair + 2 * c + k % 2];
        largest[c] = std::abs(number) > std::abs(largest[c]) ? number : largest[c];
      }
    }
    for (int c = 0; c < kRoundedColumns; ++c) {
      shift[c] = largest[c] == 0 ? 0 : __builtin_clz(std::abs(largest[c])) - 17;
      largest[c] *= 1 << shift[c];
    }
    for (int64_t i = 0; i < pairs; ++i) {
      for (int lane = 0; lane < kPair; ++lane) whole[i * kPair + lane] *= 1 << shift[lane / 2];
    }
    FloatLanes best, gain;
    std::fill_n(best, kRoundedColumns, 0.0f);
    std::fill_n(gain, kRoundedColumns, -1.0f);
    auto keep_better = [&] {
      for (int c = 0; c < kRoundedColumns; c += kLanes) {
        Floats one = to_floats(load(product + c)), other = to_floats(load(square + c));
        Floats saved = one * one / other, before = load(gain + c);
        store_floats(best + c, saved > before ? one / other : load(best + c));
        store_floats(gain + c, saved > before ? saved : before);
      }
    };
    for (int size : kLargest) {
      for (int c = 0; c < kRoundedColumns; c += kLanes) {
        Ints of_group = load(largest + c);
        Floats each = static_cast<float>(size * (1 << 21)) /
                      to_floats(of_group == 0 ? Ints{} + (1 << 14) : of_group);
        store_ints(factor + c, rounded(each, -kMostFactor, kMostFactor));
      }
      fit(whole, pairs, factor, product, square);
      keep_better();
    }
    factors_of(best, factor);
    fit(whole, pairs, factor, product, square);
    keep_better();
    for (int c = 0; c < kRoundedColumns; ++c) {
      wanted[c] = best[c] / static_cast<float>(1 << shift[c]);
    }
  }

  static void factors_of(const FloatLanes& scale, Lanes& factor) {
    for (int c = 0; c < kRoundedColumns; c += kLanes) {
      Floats exact = divided(Floats{} + 0x1p21f, load(scale + c));
      store_ints(factor + c, rounded(exact, -kMostFactor, kMostFactor));
    }
  }

  void search_block(const int16_t* whole, const Lanes* shift, const FloatLanes* wanted,
                    const int* exponent) {
    FloatLanes largest = {}, gain;
    for (int64_t g = 0; g < groups; ++g) {
      for (int c = 0; c < kRoundedColumns; ++c) {
        bool is_larger = std::fabs(wanted[g][c]) > std::fabs(largest[c]);
        largest[c] = is_larger ? wanted[g][c] : largest[c];
      }
    }
    std::fill_n(gain, kRoundedColumns, -1.0f);
    for (float size : kLargestOfBlock) {
      FloatLanes step, inverse, under;
      Lanes found[kMostGroups], product, square, products = {}, squares = {}, factor;
      for (int c = 0; c < kRoundedColumns; c += kLanes) {
        Floats each = load(largest + c) / size;
        store_floats(step + c, each);
        store_floats(inverse + c, divided(Floats{} + 1, each));
      }
      for (int64_t g = 0; g < groups; ++g) {
        for (int c = 0; c < kRoundedColumns; c += kLanes) {
          Ints each = rounded(load(wanted[g] + c) * load(inverse + c), -32, 31);
          store_ints(found[g] + c, each);
          Floats doubled = to_floats((Ints{} + 1) << load(shift[g] + c));
          store_floats(under + c, to_floats(each) * load(step + c) * doubled);
        }
        factors_of(under, factor);
        fit(whole + g * group * kRoundedColumns, group / 2, factor, product, square);
        for (int c = 0; c < kRoundedColumns; ++c) {
          // Sums of eight groups, times the scales, stay below 2^31.
          products[c] += found[g][c] * (product[c] >> (shift[g][c] + 4));
          squares[c] += found[g][c] * found[g][c] * (square[c] >> 1);
        }
      }
      for (int c = 0; c < kRoundedColumns; ++c) {
        float one = static_cast<float>(products[c]), other = static_cast<float>(squares[c]);
        float saved = squares[c] == 0 ? 0 : one * one / other;
        if (!(saved > gain[c])) continue;
        gain[c] = saved;
        float best = squares[c] == 0 ? 0 : 8 * (one / other);
        scale[c] = float_to_half(std::ldexp(best, exponent[c]));
        for (int64_t g = 0; g < groups; ++g) sub[g][c] = found[g][c];
      }
    }
  }
};

// What a block is rounded by with error feedback; see `ops/int4_feedback.py`.
struct Feedback {
  const float* original;  // [block, columns], the weights before those above them were rounded
  const float* factor;    // [block, block]
  float* errors;          // [block, columns], of the original weights
  float* lost;            // [columns], the squared error of the products
};

// A 4-bit matrix that is written.
struct RoundedMatrix {
  uint8_t* values;
  uint8_t* subscales;
  uint16_t* scales;
  int64_t columns, block, group;

  // Rounds `width` columns of block `number`, at `weights`, whose rows are `columns` floats apart.
  // With feedback each row makes up for what the rows above it have lost.
  void round(const float* weights, int64_t number, int64_t column, int64_t width,
             const Feedback* feedback = nullptr) const {
    alignas(kCacheLine) float tile[kMostBlockRows * kRoundedColumns] = {};
    for (int64_t k = 0; k < block; ++k) {
      std::memcpy(tile + k * kRoundedColumns, weights + k * columns, width * sizeof(float));
    }
    BlockScales found;
    found.group = group;
    found.search(tile, block);
    uint8_t* bytes = values + number * block / 2 * columns + column;
    FloatLanes exact, inverse, lost = {};
    for (int64_t k = 0; k < block; ++k) {
      if (k % group == 0) scales_of_group(found, k / group, exact, inverse);
      Lanes codes;
      nearest(tile + k * kRoundedColumns, inverse, codes);
      uint8_t pair[kRoundedColumns];
      if (k % 2) std::memcpy(pair, bytes + k / 2 * columns, width);
      for (int c = 0; c < kRoundedColumns; ++c) {
        pair[c] = k % 2 ? pair[c] | codes[c] << 4 : codes[c];
      }
      std::memcpy(bytes + k / 2 * columns, pair, width);
      if (feedback == nullptr) continue;
      const float* share = feedback->factor + k * block;
      FloatLanes error = {};
      std::memcpy(error, feedback->original + k * columns + column, width * sizeof(float));
      for (int c = 0; c < kRoundedColumns; ++c) {
        float value = kBook[codes[c]] * exact[c];
        float left = share[k] * (tile[k * kRoundedColumns + c] - value);
        lost[c] += left * left;
        error[c] -= value;
      }
      std::memcpy(feedback->errors + k * columns + column, error, width * sizeof(float));
      for (int64_t later = k + 1; later < block; ++later) {
        float* row = tile + later * kRoundedColumns;
        for (int c = 0; c < kRoundedColumns; c += kLanes) {
          store_floats(row + c, load(row + c) + share[later] * load(error + c));
        }
      }
    }
    if (feedback != nullptr) {
      std::memcpy(feedback->lost + column, lost, width * sizeof(float));
    }
    write_scales(found, number, column, width);
  }

  static void scales_of_group(const BlockScales& found, int64_t g, FloatLanes& exact,
                              FloatLanes& inverse) {
    for (int c = 0; c < kRoundedColumns; ++c) {
      exact[c] = static_cast<float>(found.sub[g][c]) * half_to_float(found.scale[c]);
      inverse[c] = exact[c] == 0 ? 0 : 1 / exact[c];
    }
  }

  static void nearest(const float* weights, const FloatLanes& inverse, Lanes& codes) {
    for (int c = 0; c < kRoundedColumns; c += kLanes) {
      Floats scaled = load(weights + c) * load(inverse + c);
      Ints code{};
      for (float middle : kMiddles) code -= scaled > middle;
      store_ints(codes + c, code);
    }
  }

  void write_scales(const BlockScales& found, int64_t number, int64_t column, int64_t width) const {
    std::memcpy(scales + number * columns + column, found.scale, width * sizeof(uint16_t));
    uint8_t* rows = subscales + number * kCodeRows * columns + column;
    for (int64_t c = 0; c < width; ++c) {
      uint8_t packed[kCodeRows] = {};
      for (int64_t g = 0; g < found.groups; ++g) {
        int biased = found.sub[g][c] + 32;
        packed[g / 2] |= (biased & 15) << 4 * (g % 2);
        packed[4 + g / 4] |= biased >> 4 << 2 * (g % 4);
      }
      for (int row = 0; row < kCodeRows; ++row) rows[row * columns + c] = packed[row];
    }
  }
};

}  // namespace grok1
