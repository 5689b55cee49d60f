// Draws as sample.h does, from the products of a table that it reads as little of as it can.
//
// The screen gives each token's log-weight between two bounds. Few tokens can win the race by their
// upper bounds, and their float32 products say which would. Whether that one is kept, its
// more probable tokens' share of the weight decides, which bounds mostly decide too. Where they do
// not, the most uncertain rows become exact, if they are few, and at last all rows. What is drawn
// is what `RowSampler` draws from the float32 logits. Log-probabilities come from the same screen.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "sample.h"
#include "screen.h"
#include "screened_log_probabilities.h"

namespace grok1 {

constexpr int32_t kUndecided = -4;  // in place of a token, until all logits are known

class ScreenedRow {
 public:
  // `factor` makes logits of products, and is above 0.
  ScreenedRow(const ScreenedTable& table, const Sampling& sampling, float factor,
              const Screened& screened, int64_t row)
      : table_(table),
        input_(screened.inputs[row]),
        upper_(screened.upper + row * table.num_rows),
        lower_(screened.lower[row]),
        factor_(factor),
        temperature_(sampling.temperature[row]),
        top_p_(sampling.top_p[row]),
        min_p_(sampling.min_p[row]),
        top_k_(sampling.top_k[row]),
        key_(sampling.keys + 2 * row, sampling.positions[row]),
        sampling_(sampling),
        row_(row) {}

  int32_t draw() {
    if (std::isnan(lower_) || !(input_.norm <= std::numeric_limits<float>::max())) {
      return kNotFinite;
    }
    if (!(lower_ > kLowest)) return any_allowed() ? kUndecided : kNoneLeft;
    if (!find_largest()) return kNotFinite;
    if (temperature_ == 0) return most_probable_;
    if (!bound_log_weights()) return kUndecided;
    if (top_k_ < table_.num_rows) return drawn_from_top_k();
    int32_t token = winner(kept());
    for (double share : {4.0, 1.0, 0.25}) {
      if (token != kUndecided || top_p_ >= 1 || !refine(share)) break;
      token = winner(kept());
    }
    return token;
  }

 private:
  // What the filters keep: every log-weight from `surely` on, and none below `possibly`.
  struct Kept {
    int32_t surely = kLeast, possibly = kLeast;
  };

  // Of a share of the weight: sums of this accuracy do not decide what is nearer.
  static constexpr double kMargin = 1e-5;

  // Tokens this many octaves below the most probable have less than the margin together.
  static constexpr int32_t kOctaves = 40;
  static constexpr int kStep = 19;  // log-weights in steps of 1/32 octave
  static constexpr int64_t kSteps = (int64_t{kOctaves} * kOctave >> kStep) + 1;

  // Most rows of the table that are read beside the screen, unless all are.
  int64_t most_rows() const { return table_.num_rows / 4; }

  bool any_allowed() const {
    return std::any_of(upper_, upper_ + table_.num_rows, [](float upper) { return upper != kLowest; });
  }

  float logit(int64_t id) const { return table_.product(id, input_.x) * factor_; }

  // False if a logit is not finite.
  bool find_largest() {
    known_.clear();
    bool is_finite = true;
    largest_ = kLowest;
    for_each_from(upper_, table_.num_rows, lower_, [&](int64_t id) {
      float value = logit(id);
      is_finite &= std::isfinite(value);
      known_.push_back({static_cast<int32_t>(id), value});
      if (value > largest_) {
        largest_ = value;
        most_probable_ = static_cast<int32_t>(id);
      }
    });
    return is_finite;
  }

  // False if a bound is no number.
  bool bound_log_weights() {
    static thread_local std::vector<int32_t> low_memory, high_memory;
    low_ = groups_of(low_memory, table_.num_rows);
    high_ = groups_of(high_memory, table_.num_rows);
    log_weights_ = LogWeights(largest_, temperature_);
    Ints numbers = Ints{} - 1;
    auto bound = [&](const float* upper, const float* uncertainty, const float* scales,
                     int32_t* low, int32_t* high) {
      Floats most = load(upper);
      Floats width = input_.norm * load(uncertainty) + input_.uncertainty * load(scales);
      Floats least = most - 2.0f * width;
      numbers &= least == least;
      Ints allowed = most > kLowest;
      numbers |= ~allowed;
      Ints at_most = log_weights_.of(most * factor_), at_least = log_weights_.of(least * factor_);
      at_most = allowed ? at_most : Ints{} + kForbidden;
      at_least = allowed ? at_least : Ints{} + kForbidden;
      std::memcpy(high, &at_most, sizeof(at_most));
      std::memcpy(low, &at_least, sizeof(at_least));
    };
    int64_t i = 0;
    for (; i + kLanes <= table_.num_rows; i += kLanes) {
      bound(upper_ + i, table_.uncertainty + i, table_.scales + i, low_ + i, high_ + i);
    }
    if (int64_t rest = table_.num_rows - i) {
      float upper[kLanes], uncertainty[kLanes] = {}, scales[kLanes] = {};
      std::fill_n(upper, kLanes, kLowest);
      std::copy_n(upper_ + i, rest, upper);
      std::copy_n(table_.uncertainty + i, rest, uncertainty);
      std::copy_n(table_.scales + i, rest, scales);
      bound(upper, uncertainty, scales, low_ + i, high_ + i);  // a group has room
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (numbers[lane] == 0) return false;
    }
    for (const auto& [id, value] : known_) low_[id] = high_[id] = log_weights_.of(value);
    // Of those with the largest log-weight the first stays, whatever the filters are.
    for (int32_t id = 0; id < most_probable_; ++id) {
      if (high_[id] == 0 && exact(id) == 0) most_probable_ = id;
    }
    return true;
  }

  int32_t exact(int64_t id) {
    if (low_[id] != high_[id]) low_[id] = high_[id] = log_weights_.of(logit(id));
    return low_[id];
  }

  // Sums of weights by the step of their upper and of their lower bound, the largest weight being 1.
  struct Sums {
    double most_of_high = 0, least_of_high = 0, most_of_low = 0, least_of_low = 0;
  };

  void sum_weights() {
    static thread_local std::vector<Sums> memory;
    memory.assign(kSteps, {});
    sums_ = memory.data();
    total_ = {};
    constexpr float kUnit = 4.1313926e-8f;  // ln 2 / kOctave
    constexpr int32_t kFaint = -kOctaves * kOctave;
    const int64_t size = (table_.num_rows + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < size; i += kLanes) {
      Ints low, high;
      std::memcpy(&low, low_ + i, sizeof(low));
      std::memcpy(&high, high_ + i, sizeof(high));
      if (!any(high > kFaint)) continue;
      Floats most = exp(__builtin_convertvector(high, Floats) * kUnit);
      Floats least = exp(__builtin_convertvector(low, Floats) * kUnit);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (high[lane] <= kFaint) continue;
        Sums& of_high = sums_[-high[lane] >> kStep];
        of_high.most_of_high += most[lane];
        of_high.least_of_high += least[lane];
        Sums& of_low = sums_[std::min<int64_t>(-int64_t{low[lane]} >> kStep, kSteps - 1)];
        of_low.most_of_low += most[lane];
        of_low.least_of_low += least[lane];
      }
    }
    for (int64_t step = 0; step < kSteps; ++step) {
      total_.most_of_high += sums_[step].most_of_high;
      total_.least_of_high += sums_[step].least_of_high;
    }
  }

  Kept kept() {
    Kept kept;
    if (top_p_ < 1) {
      sum_weights();
      constexpr auto lowest_of = [](int64_t step) {
        return static_cast<int32_t>(std::max<int64_t>(kLeast, 1 - ((step + 1) << kStep)));
      };
      // Of a token in the step, what is more probable is at most what may be in this step or above.
      double before = 0, rest = total_.least_of_high;
      kept.surely = 1;
      for (int64_t step = 0; step < kSteps; ++step) {
        before += sums_[step].most_of_high;
        rest -= sums_[step].least_of_high;
        if (!(before < (top_p_ - kMargin) * (before + std::max(rest, 0.0)))) break;
        kept.surely = lowest_of(step);
      }
      // Of a token below the step, at least what must be in this step or above.
      before = 0, rest = total_.most_of_high;
      for (int64_t step = 0; step < kSteps; ++step) {
        before += sums_[step].least_of_low;
        rest -= sums_[step].most_of_low;
        if (before < (top_p_ + kMargin) * (before + std::max(rest, 0.0))) continue;
        kept.possibly = lowest_of(step);
        break;
      }
    }
    const int32_t least = least_kept(min_p_);
    return {std::max(kept.surely, least), std::max(kept.possibly, least)};
  }

  struct Contender {
    int64_t most;  // that it can reach in the race
    int32_t id, noise;
  };

  // The token that wins, or kUndecided.
  int32_t winner(const Kept& kept) {
    static thread_local std::vector<Contender> contenders;
    contenders.clear();
    // The most probable token is kept in any case.
    int64_t bar = noise(key_.bits(most_probable_));
    Contender best{bar, most_probable_, 0};
    race(key_, high_, padded(), kept.possibly, bar, [&](int64_t id, uint32_t bits) {
      int32_t its_noise = noise(bits);
      int64_t most = int64_t{high_[id]} + its_noise;
      if (most < bar) return;
      contenders.push_back({most, static_cast<int32_t>(id), its_noise});
      if (low_[id] >= kept.surely) bar = std::max(bar, int64_t{low_[id]} + its_noise);
    });
    std::sort(contenders.begin(), contenders.end(),
              [](const Contender& one, const Contender& other) { return one.most > other.most; });
    auto beats = [](const Contender& one, const Contender& other) {
      return one.most > other.most || (one.most == other.most && one.id < other.id);
    };
    Contender undecided{kForbidden, 0, 0};
    int64_t num_read = 0;
    for (Contender& contender : contenders) {
      if (contender.most < best.most) break;
      if (++num_read > most_rows()) return kUndecided;
      const int32_t log_weight = exact(contender.id);
      contender.most = int64_t{log_weight} + contender.noise;
      if (log_weight < kept.possibly) continue;
      Contender& place = log_weight >= kept.surely ? best : undecided;
      if (beats(contender, place)) place = contender;
    }
    return beats(undecided, best) && undecided.most > kForbidden ? kUndecided : best.id;
  }

  // Makes rows exact until what is uncertain is this small beside what the nucleus leaves out;
  // false if that would be too many.
  bool refine(double share) {
    const double enough = share * (1 - top_p_) * total_.least_of_high;
    double left = 0;
    int64_t step = kSteps - 1;
    for (; step >= 0 && left + sums_[step].most_of_high <= enough; --step) {
      left += sums_[step].most_of_high;
    }
    const int64_t least = -((step + 1) << kStep);
    std::vector<int32_t> rows;
    for (int64_t id = 0; id < table_.num_rows; ++id) {
      if (high_[id] > least && low_[id] != high_[id]) rows.push_back(static_cast<int32_t>(id));
    }
    if (static_cast<int64_t>(rows.size()) > most_rows()) return false;
    for (int32_t id : rows) exact(id);
    return true;
  }

  // The nucleus is that of what top-k leaves, and only those tokens count which it may leave.
  int32_t drawn_from_top_k() {
    const int64_t k = std::max(top_k_, 1);
    std::vector<int32_t> sorted(low_, low_ + table_.num_rows);
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
    const int32_t least = std::max(sorted[k - 1], kLeast);
    std::vector<int32_t> rows;
    for (int64_t id = 0; id < table_.num_rows; ++id) {
      if (high_[id] >= least) rows.push_back(static_cast<int32_t>(id));
    }
    if (static_cast<int64_t>(rows.size()) > std::max<int64_t>(most_rows(), 1)) return kUndecided;
    std::vector<float> logits(table_.num_rows, kLowest);
    for (int32_t id : rows) logits[id] = logit(id);
    return RowSampler(sampling_.of_row(row_, logits.data()), 0).draw();
  }

  int64_t padded() const {
    return (table_.num_rows + RowKey::kGroup - 1) / RowKey::kGroup * RowKey::kGroup;
  }

  const ScreenedTable& table_;
  const Input& input_;
  const float* upper_;  // of the products
  const float lower_, factor_, temperature_, top_p_, min_p_;
  const int32_t top_k_;
  const RowKey key_;
  const Sampling& sampling_;
  const int64_t row_;

  struct Known {
    int32_t id;
    float logit;
  };
  std::vector<Known> known_;
  float largest_ = 0;
  int32_t most_probable_ = -1;
  LogWeights log_weights_{0, 1};
  int32_t *low_ = nullptr, *high_ = nullptr;  // bounds of log-weights, in whole groups
  Sums* sums_ = nullptr;                      // [kSteps]
  Sums total_;
};

// All logits of some inputs, each as `ScreenedRow` computes it.
inline void multiply_all(xla::ffi::ThreadPool& pool, const ScreenedTable& table, float factor,
                         const std::vector<const float*>& inputs, float* logits) {
  run_units(pool, table.num_units(), [&](int64_t unit) {
    auto [unit_begin, unit_end] = table.unit(unit);
    for (int64_t begin = unit_begin; begin < unit_end; begin += kNearRows) {
      const int64_t end = std::min(begin + kNearRows, unit_end);
      for (size_t m = 0; m < inputs.size(); ++m) {
        for (int64_t row = begin; row < end; ++row) {
          logits[m * table.num_rows + row] = table.product(row, inputs[m]) * factor;
        }
      }
    }
  });
}

// tokens[M]: what each row draws of the logits factor * (rows @ x). If log-probabilities are asked
// for, of a table with remainders, `asked` holds where they go, and no logits.
inline void draw(xla::ffi::ThreadPool& pool, const ScreenedTable& table, const float* x,
                 float factor, const Sampling& sampling, int64_t num_inputs, int32_t* tokens,
                 const LogProbabilities* asked = nullptr) {
  const Screened found = screened(pool, table, x, num_inputs);
  std::vector<char> needs_logits(num_inputs);
  run_units(pool, num_inputs, [&](int64_t row) {
    float* upper = found.upper + row * table.num_rows;
    ScreenedLogProbabilities measured(table, found.inputs[row], upper, factor);
    const bool is_measured = !asked || measured.measure(pool);
    if (asked) {
      if (is_measured) {
        const int64_t first = row * asked->num_top;
        measured.top(asked->num_top, asked->top_tokens + first, asked->top + first);
      }
      const bool* allowed = table.allowed + row * table.allowed_stride;
      for (int64_t id = 0; id < table.num_rows; ++id) {
        upper[id] = allowed[id] ? upper[id] : kLowest;
      }
    }
    tokens[row] = ScreenedRow(table, sampling, factor, found, row).draw();
    needs_logits[row] = tokens[row] == kUndecided || !is_measured;
    // Where no token can be drawn there is none to look up.
    if (asked && is_measured) asked->chosen[row] = measured.of_token(std::max(tokens[row], 0));
  });
  std::vector<int64_t> undecided;
  std::vector<const float*> inputs;
  for (int64_t row = 0; row < num_inputs; ++row) {
    if (!needs_logits[row]) continue;
    undecided.push_back(row);
    inputs.push_back(x + row * table.depth);
  }
  if (undecided.empty()) return;
  static thread_local Scratch scratch;
  float* logits = scratch.floats(undecided.size() * table.num_rows);
  multiply_all(pool, table, factor, inputs, logits);
  run_units(pool, undecided.size(), [&](int64_t number) {
    const int64_t row = undecided[number];
    const float* its_logits = logits + number * table.num_rows;
    bool is_finite = true;
    for (int64_t i = 0; i < table.num_rows; ++i) is_finite &= std::isfinite(its_logits[i]);
    tokens[row] = is_finite ? RowSampler(sampling.of_row(row, its_logits), 0).draw() : kNotFinite;
    if (asked) log_probabilities_of_row(asked->of_row(row, its_logits, tokens + row), 0);
  });
}

}  // namespace grok1
