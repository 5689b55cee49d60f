// Log-probabilities from the products of a table that is read as its int8 copy and the remainders.
//
// Exact, from float32 rows, are the logit of every token that is reported, which those are, and the
// part that probable tokens have in the normaliser. The others come into that from the copy. Each
// element of a remainder was rounded up or down at random, so that their errors have the mean 0
// whatever the input is, and those of many improbable tokens nearly cancel.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "log_probabilities.h"
#include "screen.h"

namespace grok1 {

class ScreenedLogProbabilities {
 public:
  // `upper` of all rows of a table with remainders, allowed or not; `factor`, above 0, makes logits
  // of products.
  ScreenedLogProbabilities(const ScreenedTable& table, const Input& input, const float* upper,
                           float factor)
      : table_(table), input_(input), upper_(upper), factor_(factor) {}

  // False if all logits are needed: one is not finite, or so large that bounds are not.
  bool measure() {
    if (!estimate()) return false;
    double total = sum_of_exponentials(estimates_, table_.num_rows, largest_);
    const float probable = largest_ + static_cast<float>(std::log(total / kProbable));
    bool exact_is_finite = true;
    for_each_from(estimates_, table_.num_rows, probable, [&](int64_t id) {
      const float exact = logit(id);
      exact_is_finite &= std::isfinite(exact);
      total += std::exp(double{exact} - largest_) - std::exp(double{estimates_[id]} - largest_);
    });
    log_total_ = std::log(total);
    return exact_is_finite;
  }

  float of_token(int64_t id) const { return of_logit(logit(id)); }

  // The `count` most probable ones, of equals the lower id first.
  void top(int64_t count, int32_t* tokens, float* found) const {
    if (count == 0) return;
    // The least that so many tokens reach in any case.
    float bar = std::numeric_limits<float>::infinity();
    for (int32_t id : largest_of(estimates_, table_.num_rows, count)) {
      bar = std::min(bar, upper_[id] - 2 * width(id));
    }
    std::vector<std::pair<float, int32_t>> best;
    for_each_from(upper_, table_.num_rows, bar, [&](int64_t id) {
      best.emplace_back(-logit(id), static_cast<int32_t>(id));
    });
    std::partial_sort(best.begin(), best.begin() + count, best.end());
    for (int64_t place = 0; place < count; ++place) {
      tokens[place] = best[place].second;
      found[place] = of_logit(-best[place].first);
    }
  }

 private:
  static constexpr double kProbable = 1024;  // one in this many is

  float width(int64_t id) const { return input_.norm * table_.uncertainty[id]; }
  float logit(int64_t id) const { return table_.product(id, input_.x) * factor_; }
  float of_logit(float logit) const { return log_probability(logit, largest_, log_total_); }

  // Every logit by the copy; false if one is not finite.
  bool estimate() {
    static thread_local std::vector<float> memory;
    memory.resize(table_.num_rows);
    estimates_ = memory.data();
    constexpr float kMost = std::numeric_limits<float>::max();
    Floats largest = Floats{} - kMost;
    Ints is_finite = Ints{} - 1;
    int64_t id = 0;
    for (; id + kLanes <= table_.num_rows; id += kLanes) {
      const Floats width = input_.norm * load(table_.uncertainty + id);
      const Floats estimate = (load(upper_ + id) - width) * factor_;
      is_finite &= (estimate <= kMost) & (estimate >= -kMost);
      largest = estimate > largest ? estimate : largest;
      store_floats(memory.data() + id, estimate);
    }
    largest_ = -kMost;
    bool all_are = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      largest_ = std::max(largest_, largest[lane]);
      all_are &= is_finite[lane] != 0;
    }
    for (; id < table_.num_rows; ++id) {
      memory[id] = (upper_[id] - width(id)) * factor_;
      largest_ = std::max(largest_, memory[id]);
      all_are &= std::isfinite(memory[id]);
    }
    return all_are;
  }

  const ScreenedTable& table_;
  const Input& input_;
  const float* upper_;
  const float factor_;
  const float* estimates_ = nullptr;
  float largest_ = 0;
  double log_total_ = 0;
};

}  // namespace grok1
