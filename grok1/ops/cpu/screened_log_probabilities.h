// Log-probabilities from the products of a table that is read as its int8 copy and the remainders.
//
// Exact, from float32 rows, are the logit of every token that is reported, which those are, and the
// part that probable tokens have in the normaliser. The others come into that from the copy. Each
// remainder was rounded up or down at random, so that the errors of their logits have the mean 0
// whatever the input is, are independent, and nearly cancel. Of a row's error the length is known,
// and in how many directions it may point, so how far off the sum may be is known too: as many
// tokens count as probable as that is more than `kError` for.

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
  bool measure(xla::ffi::ThreadPool& pool) {
    if (!estimate()) return false;
    double total = weigh();
    const std::vector<int32_t> probable = find_probable(total);
    const std::vector<float> exact = logits(pool, probable);
    bool exact_is_finite = true;
    for (size_t i = 0; i < probable.size(); ++i) {
      exact_is_finite &= std::isfinite(exact[i]);
      total += std::exp(double{exact[i]} - largest_) - weights_[probable[i]];
    }
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
  static constexpr double kError = 3e-6;     // most that the normaliser's logarithm is off, on average

  float width(int64_t id) const { return input_.norm * table_.uncertainty[id]; }
  float logit(int64_t id) const { return table_.product(id, input_.x) * factor_; }
  float of_logit(float logit) const { return log_probability(logit, largest_, log_total_); }

  // Every logit by the copy; false if one is not finite.
  bool estimate() {
    static thread_local std::vector<float> memory;
    memory.resize(2 * table_.num_rows);
    estimates_ = memory.data();
    weights_ = estimates_ + table_.num_rows;
    constexpr float kMost = std::numeric_limits<float>::max();
    Floats largest = Floats{} - kMost;
    Ints is_finite = Ints{} - 1;
    int64_t id = 0;
    for (; id + kLanes <= table_.num_rows; id += kLanes) {
      const Floats width = input_.norm * load(table_.uncertainty + id);
      const Floats estimate = (load(upper_ + id) - width) * factor_;
      is_finite &= (estimate <= kMost) & (estimate >= -kMost);
      largest = estimate > largest ? estimate : largest;
      store_floats(estimates_ + id, estimate);
    }
    largest_ = -kMost;
    bool all_are = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      largest_ = std::max(largest_, largest[lane]);
      all_are &= is_finite[lane] != 0;
    }
    for (; id < table_.num_rows; ++id) {
      estimates_[id] = (upper_[id] - width(id)) * factor_;
      largest_ = std::max(largest_, estimates_[id]);
      all_are &= std::isfinite(estimates_[id]);
    }
    return all_are;
  }

  // e^(logit - largest) of every token by the copy; their sum.
  double weigh() {
    constexpr int64_t kBlock = 64 * kLanes;
    double total = 0;
    int64_t id = 0;
    while (id + kLanes <= table_.num_rows) {
      Floats sum{};
      const int64_t end = std::min(id + kBlock, table_.num_rows);
      for (; id + kLanes <= end; id += kLanes) {
        const Floats weight = exp(load(estimates_ + id) - largest_);
        store_floats(weights_ + id, weight);
        sum += weight;
      }
      total += sum_of(sum);
    }
    for (; id < table_.num_rows; ++id) total += weights_[id] = std::exp(estimates_[id] - largest_);
    return total;
  }

  // The tokens without which the sum of the others is not off by too much.
  std::vector<int32_t> find_probable(double total) const {
    const double enough = std::pow(kError * total, 2);
    auto least = static_cast<float>(total / kProbable);
    while (variance_below(least) > enough) least /= 2;
    std::vector<int32_t> probable;
    for_each_from(weights_, table_.num_rows, least, [&](int64_t id) {
      probable.push_back(static_cast<int32_t>(id));
    });
    return probable;
  }

  // Of the sum of the weights below `least`. The error of a row is as long as its uncertainty, and
  // of its `depth` directions the input's is one.
  double variance_below(float least) const {
    const float scale = factor_ * input_.norm / std::sqrt(static_cast<float>(table_.depth));
    constexpr int64_t kBlock = 64 * kLanes;
    double variance = 0;
    int64_t id = 0;
    while (id + kLanes <= table_.num_rows) {
      Floats sum{};
      const int64_t end = std::min(id + kBlock, table_.num_rows);
      for (; id + kLanes <= end; id += kLanes) {
        const Floats weight = load(weights_ + id);
        const Floats error = weight * load(table_.uncertainty + id) * scale;
        sum += weight < least ? error * error : Floats{};
      }
      variance += sum_of(sum);
    }
    for (; id < table_.num_rows; ++id) {
      if (weights_[id] >= least) continue;
      variance += std::pow(double{weights_[id]} * table_.uncertainty[id] * scale, 2);
    }
    return variance;
  }

  std::vector<float> logits(xla::ffi::ThreadPool& pool, const std::vector<int32_t>& ids) const {
    constexpr int64_t kUnit = 32;
    const auto size = static_cast<int64_t>(ids.size());
    std::vector<float> found(size);
    run_units(pool, (size + kUnit - 1) / kUnit, [&](int64_t unit) {
      const int64_t end = std::min((unit + 1) * kUnit, size);
      for (int64_t i = unit * kUnit; i < end; ++i) found[i] = logit(ids[i]);
    });
    return found;
  }

  const ScreenedTable& table_;
  const Input& input_;
  const float* upper_;
  const float factor_;
  float *estimates_ = nullptr, *weights_ = nullptr;  // [V]
  float largest_ = 0;
  double log_total_ = 0;
};

}  // namespace grok1
