// From logits to a token for each row, as engine/sampling.py says, without sorting the vocabulary.
//
// What the filters keep ends at one place of the order from the most to the least probable token.
// Three histograms find it: of log-weights in steps of 1/32 octave, of those within the step that
// it lies in by 2^-16, and by the last bits; then come equals, of which lower ids count first.
// Random numbers are made for groups of tokens of which one is kept, and noise for the few that can
// still win the race.

#pragma once

#include <numeric>
#include <vector>

#include "race.h"
#include "threads.h"

namespace grok1 {

struct Sampling {
  const float* logits;       // [R, V]
  const bool* allowed;       // [V], or [R, V] where the stride is V
  const float* temperature;  // [R] and so on
  const float* top_p;
  const int32_t* top_k;
  const float* min_p;
  const uint32_t* keys;  // [R, 2]
  const int32_t* positions;
  int64_t vocab_size, allowed_stride;

  // Of one row alone, whose logits are elsewhere.
  Sampling of_row(int64_t row, const float* its_logits) const {
    return {its_logits,    allowed + row * allowed_stride,
            temperature + row, top_p + row,
            top_k + row,   min_p + row,
            keys + 2 * row, positions + row,
            vocab_size,    0};
  }
};

// In place of a token; see engine/sampling.py.
constexpr int32_t kNoneLeft = -1, kNotFinite = -2;

// The last token that is kept: those of the same log-weight with higher ids are not.
struct Last {
  int32_t log_weight = kLeast;
  int32_t id = std::numeric_limits<int32_t>::max();
};

// Finds the last token that is kept, going from the most probable one down. Forbidden tokens do not
// count.
//
//   measure  what a token adds to those before the next; `measure(log_weights, amounts)` for kLanes
//            of them. A token that adds nothing is not kept.
//   keeper   from the sum over all tokens makes a function that says whether a token is kept, given
//            the sum over those before it: true at 0, and once false never true again.
template <typename Measure, typename Keeper>
Last last_that(const int32_t* log_weights, int64_t size, Measure measure, Keeper keeper) {
  constexpr int kFirstStep = 19, kSecondStep = 8;
  constexpr int64_t kMost = 3841;  // 120 octaves in 32 steps each, and the lowest
  static thread_local std::vector<uint64_t> memory(kMost);
  uint64_t* steps = memory.data();
  std::fill_n(steps, kMost, 0);
  int64_t i = 0;
  uint64_t amounts[kLanes];
  for (; i + kLanes <= size; i += kLanes) {
    measure(log_weights + i, amounts);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (amounts[lane] != 0) steps[-log_weights[i + lane] >> kFirstStep] += amounts[lane];
    }
  }
  for (; i < size; ++i) {
    if (uint64_t amount = measure(log_weights[i])) steps[-log_weights[i] >> kFirstStep] += amount;
  }
  uint64_t before = 0;
  const auto is_kept = keeper(std::accumulate(steps, steps + kMost, before));
  auto last_step = [&](int64_t count) {
    int32_t found = 0;
    uint64_t sum = before;
    for (int64_t step = 0; step < count; ++step) {
      if (steps[step] == 0) continue;
      if (!is_kept(sum)) break;
      found = static_cast<int32_t>(step);
      before = sum;
      sum += steps[step];
    }
    return found;
  };
  int32_t high = -(last_step(kMost) << kFirstStep);

  // Most vectors have no token in the step.
  auto for_each_in = [&](int32_t low, int32_t high, auto use) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      Ints block;
      std::memcpy(&block, log_weights + i, sizeof(block));
      if (!any((block >= low) & (block <= high))) continue;
      for (int64_t id = i; id < i + kLanes; ++id) {
        if (log_weights[id] >= low && log_weights[id] <= high) use(log_weights[id], id);
      }
    }
    for (; i < size; ++i) {
      if (log_weights[i] >= low && log_weights[i] <= high) use(log_weights[i], i);
    }
  };
  auto refine = [&](int step, int next_step) {
    int64_t count = int64_t{1} << (step - next_step);
    std::fill_n(steps, count, 0);
    for_each_in(high - (1 << step) + 1, high, [&](int32_t log_weight, int64_t) {
      steps[(high - log_weight) >> next_step] += measure(log_weight);
    });
    int32_t found = last_step(count);
    high -= found << next_step;
    return steps[found];
  };
  refine(kFirstStep, kSecondStep);
  const uint64_t of_equals = refine(kSecondStep, 0);

  Last last{high};
  const uint64_t each = measure(high), num_equals = of_equals / each;
  uint64_t kept = 1, most = num_equals;  // more than `kept` in vain
  while (kept < most) {
    uint64_t middle = (kept + most + 1) / 2;
    is_kept(before + (middle - 1) * each) ? kept = middle : most = middle - 1;
  }
  if (kept < num_equals) {
    for_each_in(high, high, [&](int32_t, int64_t id) {
      if (kept-- == 1) last.id = static_cast<int32_t>(id);
    });
  }
  return last;
}

struct Count {
  uint64_t operator()(int32_t log_weight) const { return log_weight != kForbidden; }
  void operator()(const int32_t* log_weights, uint64_t* amounts) const {
    for (int lane = 0; lane < kLanes; ++lane) amounts[lane] = (*this)(log_weights[lane]);
  }
};

struct Weight {
  uint64_t operator()(int32_t log_weight) const { return weight(log_weight); }
  void operator()(const int32_t* log_weights, uint64_t* amounts) const {
    Ints block;
    std::memcpy(&block, log_weights, sizeof(block));
    Words mantissas = mantissa((Words)block), octaves = (Words)(-(block >> 24));
    octaves = octaves > 63u ? Words{} + 63u : octaves;
    uint32_t upper[kLanes], shifts[kLanes];
    std::memcpy(upper, &mantissas, sizeof(upper));
    std::memcpy(shifts, &octaves, sizeof(shifts));
    for (int lane = 0; lane < kLanes; ++lane) {
      amounts[lane] = uint64_t{upper[lane]} << 14 >> shifts[lane];
    }
  }
};

// What one row draws.
class RowSampler {
 public:
  RowSampler(const Sampling& sampling, int64_t row)
      : size_(sampling.vocab_size),
        logits_(sampling.logits + row * size_),
        allowed_(sampling.allowed + row * sampling.allowed_stride),
        temperature_(sampling.temperature[row]),
        top_p_(sampling.top_p[row]),
        min_p_(sampling.min_p[row]),
        top_k_(sampling.top_k[row]),
        key_(sampling.keys + 2 * row, sampling.positions[row]) {}

  int32_t draw() {
    if (!find_most_probable()) return kNotFinite;
    if (most_probable_ < 0) return kNoneLeft;
    return temperature_ == 0 ? most_probable_ : winner(last_kept());
  }

  // False if a logit is NaN or +infinity; the most probable is -1 if nothing may be drawn.
  bool find_most_probable() {
    constexpr int64_t kPart = 4096;
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    int64_t place = 0;
    bool is_finite = true;
    largest_ = -kInfinity;
    for (int64_t begin = 0; begin < size_; begin += kPart) {
      const float largest = largest_of(begin, std::min(begin + kPart, size_), is_finite);
      if (largest > largest_) {
        largest_ = largest;
        place = begin;
      }
    }
    most_probable_ = -1;
    if (!is_finite) return false;
    for (int64_t i = place; largest_ > -kInfinity && most_probable_ < 0; ++i) {
      if (logits_[i] == largest_ && allowed_[i]) most_probable_ = static_cast<int32_t>(i);
    }
    return true;
  }

  // What the filters keep of a row from which a token can be drawn.
  Last last_kept() {
    set_log_weights();
    return filtered();
  }

  // [V], after `last_kept` of this thread and before that of another row.
  const int32_t* log_weights() const { return log_weights_; }

 private:
  // Of the logits from `begin` to `end` that may be drawn. In several chains: the next maximum of
  // one has to wait for the last.
  float largest_of(int64_t begin, int64_t end, bool& is_finite) const {
    constexpr int kChains = 4;
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    Floats largest[kChains];
    Ints finite[kChains];
    for (int chain = 0; chain < kChains; ++chain) {
      largest[chain] = Floats{} - kInfinity;
      finite[chain] = Ints{} - 1;
    }
    int64_t i = begin;
    for (; i + kChains * kLanes <= end; i += kChains * kLanes) {
      // Unrolled, or the chains would not stay in registers.
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        Floats block = load(logits_ + i + chain * kLanes);
        finite[chain] &= block < kInfinity;
        block = flags(i + chain * kLanes) ? block : Floats{} - kInfinity;
        largest[chain] = block > largest[chain] ? block : largest[chain];
      }
    }
    float rest = -kInfinity;
    for (; i < end; ++i) {
      is_finite &= logits_[i] < kInfinity;
      if (allowed_[i]) rest = std::max(rest, logits_[i]);
    }
    for (int chain = 0; chain < kChains; ++chain) {
      for (int lane = 0; lane < kLanes; ++lane) {
        is_finite &= finite[chain][lane] != 0;
        rest = std::max(rest, largest[chain][lane]);
      }
    }
    return rest;
  }

  Ints flags(int64_t i) const {
    return load(reinterpret_cast<const int8_t*>(allowed_ + i)) != 0.0f;
  }

  void set_log_weights() {
    static thread_local std::vector<int32_t> memory;
    log_weights_ = groups_of(memory, size_);
    const LogWeights log_weights(largest_, temperature_);
    int64_t i = 0;
    for (; i + kLanes <= size_; i += kLanes) {
      Floats block = load(logits_ + i);
      Ints drawable = flags(i) & (block > -std::numeric_limits<float>::infinity());
      Ints whole = drawable ? log_weights.of(block) : Ints{} + kForbidden;
      std::memcpy(log_weights_ + i, &whole, sizeof(whole));
    }
    for (; i < size_; ++i) {
      bool drawable = allowed_[i] && logits_[i] > -std::numeric_limits<float>::infinity();
      log_weights_[i] = drawable ? log_weights.of(logits_[i]) : kForbidden;
    }
  }

  Last filtered() {
    Last last;
    if (top_k_ < size_) {
      last = last_that(log_weights_, size_, Count{}, [&](uint64_t) {
        return [&](uint64_t before) { return before < static_cast<uint64_t>(std::max(top_k_, 1)); };
      });
      // The nucleus is that of what top-k leaves.
      if (top_p_ < 1) forbid_after(last);
    }
    if (top_p_ < 1) {
      last = last_that(log_weights_, size_, Weight{}, [&](uint64_t all) {
        float limit = std::max(top_p_ * value_of(all), std::numeric_limits<float>::min());
        return [=](uint64_t before) { return value_of(before) < limit; };
      });
    }
    if (min_p_ > 0) {
      const int32_t least = least_kept(min_p_);
      if (least > last.log_weight) last = {least};
    }
    return last;
  }

  void forbid_after(const Last& last) {
    for (int64_t i = 0; i < size_; ++i) {
      bool keeps = log_weights_[i] > last.log_weight ||
                   (log_weights_[i] == last.log_weight && i <= last.id);
      log_weights_[i] = keeps ? log_weights_[i] : kForbidden;
    }
  }

  int32_t winner(const Last& last) {
    int64_t best_score = int64_t{kForbidden} - 1;
    int32_t winner = most_probable_;
    auto enter = [&](int64_t id, uint32_t bits) {
      if (log_weights_[id] == last.log_weight && id > last.id) return;
      int64_t score = int64_t{log_weights_[id]} + noise(bits);
      if (score > best_score || (score == best_score && id < winner)) {
        best_score = score;
        winner = static_cast<int32_t>(id);
      }
    };
    // A good result to begin with spares the others' noise.
    enter(most_probable_, key_.bits(most_probable_));
    race(key_, log_weights_, size_, last.log_weight, best_score, enter);
    return winner;
  }

  const int64_t size_;
  const float* logits_;
  const bool* allowed_;
  const float temperature_, top_p_, min_p_;
  const int32_t top_k_;
  const RowKey key_;
  float largest_ = 0;
  int32_t most_probable_ = -1;
  int32_t* log_weights_ = nullptr;  // [V]
};

inline void sample(xla::ffi::ThreadPool& pool, const Sampling& sampling, int64_t num_rows,
                   int32_t* tokens) {
  run_units(pool, num_rows,
            [&](int64_t row) { tokens[row] = RowSampler(sampling, row).draw(); });
}

}  // namespace grok1
