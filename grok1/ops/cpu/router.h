// A router's logits, their softmax and the choice of experts, in float32, on all threads.
//
// A row's result has the same bits whatever rows come with it: a choice between two experts that are
// nearly tied must not depend on them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "threads.h"

namespace grok1 {

constexpr int64_t kExpertsAtATime = 8;   // columns of a sum
constexpr int64_t kRouterSums = 8;       // side by side: an addition waits for the one before
constexpr int64_t kRoutedRowsOfUnit = 8;

using ExpertFloats = float __attribute__((vector_size(kExpertsAtATime * sizeof(float))));

// out[num_experts] = x[depth] @ router[depth, num_experts]
inline void route_row(const float* x, const float* router, int64_t depth, int64_t num_experts,
                      float* out) {
  for (int64_t first = 0; first < num_experts; first += kExpertsAtATime) {
    const int64_t count = std::min(kExpertsAtATime, num_experts - first);
    ExpertFloats sums[kRouterSums] = {};
    auto add = [&](int64_t k, ExpertFloats& sum) __attribute__((always_inline)) {
      ExpertFloats weight{};
      const float* row = router + k * num_experts + first;
      std::memcpy(&weight, row, count == kExpertsAtATime ? sizeof(weight) : count * sizeof(float));
      sum += weight * x[k];
    };
    int64_t k = 0;
    for (; k + kRouterSums <= depth; k += kRouterSums) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRouterSums; ++i) add(k + i, sums[i]);
    }
    for (; k < depth; ++k) add(k, sums[k % kRouterSums]);
    for (int64_t i = 1; i < kRouterSums; ++i) sums[0] += sums[i];
    std::memcpy(out + first, &sums[0], count * sizeof(float));
  }
}

struct Router {
  const float* weights;  // [depth, experts]
  int64_t depth, num_experts, num_selected;
  float softcap;  // bounds the logits; 0 does not
  bool renormalize;
};

// Of each row.
struct Routed {
  float *logits, *probs;     // [rows, experts]
  int32_t* expert_indices;   // [rows, selected], the most probable first, of equals the lower one
  float* expert_weights;     // [rows, selected]
};

inline void choose(const Router& router, const float* logits, float* probs, int32_t* indices,
                   float* weights) {
  const int64_t num_experts = router.num_experts;
  const float largest = *std::max_element(logits, logits + num_experts);
  float total = 0, of_selected = 0;
  for (int64_t e = 0; e < num_experts; ++e) total += probs[e] = std::exp(logits[e] - largest);
  for (int64_t e = 0; e < num_experts; ++e) probs[e] /= total;
  std::vector<int32_t> order(num_experts);
  std::iota(order.begin(), order.end(), 0);
  // Of what is no number none comes before another: a sort must not compare it.
  if (total == total) {
    std::partial_sort(order.begin(), order.begin() + router.num_selected, order.end(),
                      [&](int32_t one, int32_t other) {
                        return probs[one] > probs[other] ||
                               (probs[one] == probs[other] && one < other);
                      });
  }
  for (int64_t i = 0; i < router.num_selected; ++i) {
    indices[i] = order[i];
    of_selected += weights[i] = probs[order[i]];
  }
  for (int64_t i = 0; router.renormalize && i < router.num_selected; ++i) weights[i] /= of_selected;
}

// Chooses the experts of x[num_rows, depth].
inline void route(xla::ffi::ThreadPool& pool, const Router& router, const float* x,
                  int64_t num_rows, const Routed& routed) {
  const int64_t num_units = (num_rows + kRoutedRowsOfUnit - 1) / kRoutedRowsOfUnit;
  run_units(pool, num_units, [&](int64_t unit) {
    const int64_t first = unit * kRoutedRowsOfUnit;
    for (int64_t m = first; m < std::min(num_rows, first + kRoutedRowsOfUnit); ++m) {
      float* logits = routed.logits + m * router.num_experts;
      route_row(x + m * router.depth, router.weights, router.depth, router.num_experts, logits);
      if (router.softcap != 0) {
        for (int64_t e = 0; e < router.num_experts; ++e) {
          logits[e] = router.softcap * std::tanh(logits[e] / router.softcap);
        }
      }
      choose(router, logits, routed.probs + m * router.num_experts,
             routed.expert_indices + m * router.num_selected,
             routed.expert_weights + m * router.num_selected);
    }
  });
}

}  // namespace grok1
