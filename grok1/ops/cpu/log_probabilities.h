// Log-probabilities of one token a row and of the most probable ones, natural logarithms.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "race.h"
#include "threads.h"

namespace grok1 {

struct LogProbabilities {
  const float* logits;    // [R, V]
  const int32_t* tokens;  // [R]
  float* chosen;          // [R]
  int32_t* top_tokens;    // [R, top], most probable first, of equals the lower id
  float* top;             // [R, top]
  int64_t vocab_size, num_top;

  LogProbabilities of_row(int64_t row, const float* its_logits, const int32_t* token) const {
    return {its_logits,          token, chosen + row, top_tokens + row * num_top,
            top + row * num_top, vocab_size, num_top};
  }
};

// The sum of e^(logit - largest): in float32 within blocks, which are added in double.
inline double sum_of_exponentials(const float* logits, int64_t size, float largest) {
  constexpr int64_t kBlock = 64 * kLanes;
  double total = 0;
  int64_t i = 0;
  while (i + kLanes <= size) {
    Floats sum{};
    int64_t end = std::min(i + kBlock, size);
    for (; i + kLanes <= end; i += kLanes) sum += exp(load(logits + i) - largest);
    total += sum_of(sum);
  }
  for (; i < size; ++i) total += std::exp(logits[i] - largest);
  return total;
}

// Of each row of shifted[R, V], logits below the largest: the sum of their exponentials, and of these
// times what they are of. As above in float32 within blocks.
inline void exponential_sums(xla::ffi::ThreadPool& pool, const float* shifted, int64_t num_rows,
                             int64_t size, float* totals, float* weighted) {
  constexpr int64_t kBlock = 64 * kLanes;
  run_units(pool, num_rows, [&](int64_t row) {
    const float* logits = shifted + row * size;
    double total = 0, of_weighted = 0;
    int64_t i = 0;
    while (i + kLanes <= size) {
      Floats sum{}, weighted_sum{};
      const int64_t end = std::min(i + kBlock, size);
      for (; i + kLanes <= end; i += kLanes) {
        const Floats here = load(logits + i), power = exp(here);
        sum += power;
        weighted_sum = multiply_add(power, here, weighted_sum);
      }
      total += sum_of(sum);
      of_weighted += sum_of(weighted_sum);
    }
    for (; i < size; ++i) {
      const double power = std::exp(double{logits[i]});
      total += power;
      of_weighted += power * logits[i];
    }
    totals[row] = static_cast<float>(total);
    weighted[row] = static_cast<float>(of_weighted);
  });
}

// The ids of the `count` largest, best first.
inline std::vector<int32_t> largest_of(const float* logits, int64_t size, int64_t count) {
  constexpr int64_t kFew = 256;
  auto is_before = [&](int32_t one, int32_t other) {
    return logits[one] > logits[other] || (logits[one] == logits[other] && one < other);
  };
  std::vector<int32_t> found;
  if (count > kFew) {
    found.resize(size);
    std::iota(found.begin(), found.end(), 0);
    std::partial_sort(found.begin(), found.begin() + count, found.end(), is_before);
    found.resize(count);
    return found;
  }
  float bar = -std::numeric_limits<float>::infinity();
  auto enter = [&](int64_t id) {
    auto token = static_cast<int32_t>(id);
    if (static_cast<int64_t>(found.size()) == count) {
      if (!(logits[id] > bar)) return;
      found.pop_back();
    }
    found.insert(std::upper_bound(found.begin(), found.end(), token, is_before), token);
    if (static_cast<int64_t>(found.size()) == count) bar = logits[found.back()];
  };
  if (count == 0) return found;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    if (!any(load(logits + i) >= bar)) continue;
    for (int lane = 0; lane < kLanes; ++lane) enter(i + lane);
  }
  for (; i < size; ++i) enter(i);
  return found;
}

// Of finite logits, a finite number.
inline float log_probability(float logit, float largest, double log_total) {
  double difference = static_cast<double>(logit) - largest - log_total;
  return static_cast<float>(std::max<double>(difference, std::numeric_limits<float>::lowest()));
}

// Where a logit is not finite, no log-probability is a number.
inline void log_probabilities_of_row(const LogProbabilities& asked, int64_t row) {
  constexpr float kNoNumber = std::numeric_limits<float>::quiet_NaN();
  const float* logits = asked.logits + row * asked.vocab_size;
  float largest = -std::numeric_limits<float>::infinity();
  bool is_finite = true;
  for (int64_t i = 0; i < asked.vocab_size; ++i) {
    is_finite &= std::abs(logits[i]) <= std::numeric_limits<float>::max();
    largest = logits[i] > largest ? logits[i] : largest;
  }
  if (!is_finite) {
    std::fill_n(asked.top_tokens + row * asked.num_top, asked.num_top, 0);
    std::fill_n(asked.top + row * asked.num_top, asked.num_top, kNoNumber);
    asked.chosen[row] = kNoNumber;
    return;
  }
  double log_total = std::log(sum_of_exponentials(logits, asked.vocab_size, largest));
  // Where no token can be drawn there is none to look up.
  int64_t token = std::clamp<int64_t>(asked.tokens[row], 0, asked.vocab_size - 1);
  asked.chosen[row] = log_probability(logits[token], largest, log_total);
  auto top = largest_of(logits, asked.vocab_size, asked.num_top);
  for (int64_t place = 0; place < asked.num_top; ++place) {
    asked.top_tokens[row * asked.num_top + place] = top[place];
    asked.top[row * asked.num_top + place] =
        log_probability(logits[top[place]], largest, log_total);
  }
}

inline void log_probabilities(xla::ffi::ThreadPool& pool, const LogProbabilities& asked,
                              int64_t num_rows) {
  run_units(pool, num_rows, [&](int64_t row) { log_probabilities_of_row(asked, row); });
}

}  // namespace grok1
