// A vector register's worth of floats, on whatever processor this is compiled for.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace grok1 {

// Lanes of a vector register, and how many registers of them one row of a tile takes.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kTileVectors = 4;  // there are twice as many registers as with AVX2
#else
constexpr int kLanes = 4;
constexpr int kTileVectors = 2;
#endif

constexpr int64_t kTileColumns = kTileVectors * kLanes;

constexpr int kCacheLine = 64;

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(sizeof(Floats))));

inline bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
  return found != 0;
#endif
}

inline Floats load(const float* from) {
  Floats floats;
  std::memcpy(&floats, from, sizeof(floats));
  return floats;
}

inline void store_floats(float* to, Floats floats) { std::memcpy(to, &floats, sizeof(floats)); }

// Holds a vector in a register: a compiler may otherwise load it again for each of its uses, and
// loads are then what takes the time.
__attribute__((always_inline)) inline void hold([[maybe_unused]] Floats& floats) {
#if defined(__x86_64__)
  asm("" : "+v"(floats));
#elif defined(__aarch64__)
  asm("" : "+w"(floats));
#endif
}

#if defined(__aarch64__)
// Of 16 bytes, those of the lanes of four vectors: in byte kPlace of a lane, the others are zero.
template <int kPlace>
struct Spread {
  uint8_t places[4][16] = {};

  constexpr Spread() {
    for (int i = 0; i < 64; ++i) {
      places[i / 16][i % 16] = i % 4 == kPlace ? i / 4 : 255;  // what is out of range gives zero
    }
  }

  static Ints of(uint8x16_t bytes, int vector) {
    static constexpr Spread spread;
    return (Ints)vqtbl1q_u8(bytes, vld1q_u8(spread.places[vector]));
  }
};

// Four bytes, again and again.
inline uint8x16_t four_bytes(const void* from) {
  uint32_t bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return vreinterpretq_u8_u32(vdupq_n_u32(bytes));
}

// Of bytes that are each the highest of a lane: where an integer has its sign, and 2^24 times as
// large as they are.
inline Floats from_highest(Ints bytes) {
  return (Floats)vcvtq_n_f32_s32((int32x4_t)bytes, 24);
}
#endif

inline Floats load(const int8_t* from) {
#if defined(__AVX512F__)
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#elif defined(__aarch64__)
  return from_highest(Spread<3>::of(four_bytes(from), 0));
#else
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, Floats);
#endif
}

// Vectors of bytes that are best loaded together.
#if defined(__aarch64__)
constexpr int kLoadedVectors = 4;
#else
constexpr int kLoadedVectors = 1;
#endif

// Several vectors that lie side by side.
template <int kCount>
__attribute__((always_inline)) inline void load(const int8_t* from, Floats (&to)[kCount]) {
  static_assert(kCount % kLoadedVectors == 0);
#pragma GCC unroll 4
  for (int v = 0; v < kCount; v += kLoadedVectors) {
#if defined(__aarch64__)
    const uint8x16_t bytes = vld1q_u8(reinterpret_cast<const uint8_t*>(from + v * kLanes));
    for (int i = 0; i < 4; ++i) to[v + i] = from_highest(Spread<3>::of(bytes, i));
#else
    to[v] = load(from + v * kLanes);
#endif
  }
}

// x * y + z, rounded once where the processor can, and the same wherever it is called: whether a
// compiler joins a product and a sum depends on what is around them.
__attribute__((always_inline)) inline Floats multiply_add(Floats x, Floats y, Floats z) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, y, z);
#elif defined(__FMA__) && defined(__AVX2__)
  return _mm256_fmadd_ps(x, y, z);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
  return x * y + z;
#endif
}

// The same with one number for all lanes, and with one lane. Compilers for x86-64 join these
// wherever they are.
__attribute__((always_inline)) inline Floats multiply_add(Floats x, float y, Floats z) {
#if defined(__aarch64__)
  return (Floats)vfmaq_n_f32((float32x4_t)z, (float32x4_t)x, y);
#else
  return x * y + z;
#endif
}

inline float multiply_add(float x, float y, float z) {
#if defined(__aarch64__)
  return __builtin_fmaf(x, y, z);
#else
  return x * y + z;
#endif
}

inline Floats load_bfloat16(const uint16_t* from) {
  using Halves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Ints) << 16);
}

// Four bits of each byte, from 0 to 15: the low ones, or the high ones where `shift` is 4.
inline Floats load_four_bits(const uint8_t* from, int shift) {
#if defined(__AVX512F__)
  Ints bytes = (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  Ints bytes = (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  Ints bytes = Spread<0>::of(four_bytes(from), 0);
#else
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  Bytes loaded;
  std::memcpy(&loaded, from, sizeof(loaded));
  Ints bytes = __builtin_convertvector(loaded, Ints);
#endif
  return __builtin_convertvector(bytes >> shift & 15, Floats);
}

// e^x to about one unit in the last place, 0 where that is below the normal floats: 2^n times e^r
// with |r| <= ln 2 / 2, e^r by its Taylor series.
inline Floats exp(Floats x) {
  constexpr float kLowest = -87.33f, kHighest = 88.37f;  // n stays a normal exponent
  constexpr float kRound = 12582912.0f;                  // 1.5 * 2^23: adding it rounds
  x = x < kLowest ? Floats{} + kLowest : x;
  x = x > kHighest ? Floats{} + kHighest : x;
  Floats n = x * 1.44269504f + kRound;
  Ints exponent;
  std::memcpy(&exponent, &n, sizeof(exponent));
  n -= kRound;
  // ln 2 in two parts, the first exact in products with n.
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats series = Floats{} + 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  // The integer that kRound left in the low bits of the mantissa goes to the exponent.
  Ints power = (exponent + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return series * scale;
}

// GELU in its tanh form, x / (1 + e^(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Floats gelu(Floats x) {
  Floats u = 0.797884561f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp(-2.0f * u));
}

inline float sum_of(Floats floats) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(floats);
#elif defined(__aarch64__)
  return vaddvq_f32((float32x4_t)floats);
#else
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += floats[lane];
  return sum;
#endif
}

// tanh from e^(2x); near 0, where that would lose digits, its Taylor series.
inline Floats tanh(Floats x) {
  Floats square = x * x;
  Floats series = Floats{} - 1382.0f / 155925;
  for (float term : {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f}) {
    series = series * square + term;
  }
  Floats large = 1.0f - 2.0f / (1.0f + exp(2.0f * x));
  return square < 0.1f ? x * series : large;
}

inline float to_float(uint16_t bfloat16) {
  uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace grok1
