// Rotary phases of queries and keys, on all threads. See `apply_rope`, whose pairs are (i, i + half).
//
// Sines are the C library's: XLA's differ in the last place with the number of tokens.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace grok1 {

constexpr int64_t kRotatedTokensOfUnit = 8;

// Heads of some tokens, [tokens, heads, 2 * half], before and after.
struct Rotated {
  const float* from;
  float* to;
  int64_t num_heads;
};

inline void rotate(xla::ffi::ThreadPool& pool, const std::vector<Rotated>& all,
                   const int32_t* positions, const float* frequencies, int64_t num_tokens,
                   int64_t half) {
  const int64_t num_units = (num_tokens + kRotatedTokensOfUnit - 1) / kRotatedTokensOfUnit;
  run_units(pool, num_units, [&](int64_t unit) {
    std::vector<float> cosine(half), sine(half);
    const int64_t first = unit * kRotatedTokensOfUnit;
    for (int64_t t = first; t < std::min(num_tokens, first + kRotatedTokensOfUnit); ++t) {
      for (int64_t i = 0; i < half; ++i) {
        const float phase = positions[t] * frequencies[i];
        cosine[i] = std::cos(phase);
        sine[i] = std::sin(phase);
      }
      for (const Rotated& heads : all) {
        for (int64_t head = 0; head < heads.num_heads; ++head) {
          const int64_t start = (t * heads.num_heads + head) * 2 * half;
          const float *near = heads.from + start, *far = near + half;
          float* to = heads.to + start;
          for (int64_t i = 0; i < half; ++i) {
            to[i] = near[i] * cosine[i] - far[i] * sine[i];
            to[half + i] = far[i] * cosine[i] + near[i] * sine[i];
          }
        }
      }
    }
  });
}

}  // namespace grok1
