// out[M, D] = sum over a token's experts of weight * down(gelu(gate(x)) * up(x)), on all threads.
//
// Rows are grouped by expert, so that each chosen expert is read once for all of them, or once a
// pass where they are many. No row is dropped, an expert that no row chose is not read.

#pragma once

#include <utility>

#include "matmul.h"

namespace grok1 {

constexpr int64_t kUpSegments = 8;      // of gate and up, where they are deep enough
constexpr int64_t kDownSegment = 1024;  // hidden columns of a segment of down
constexpr int64_t kSumColumns = 512;    // of a unit of the last sum

template <typename Matrix>
struct Expert {
  Matrix gate, up, down;
};

struct Dispatched {
  int64_t token;
  float weight;
};

// hidden = gelu(gate) * up, [num_rows, width] to a packed block of rows: hidden[width, num_rows].
// Never inlined: the same instructions, and so the same bits, for few rows and for many.
__attribute__((noinline)) inline void activate(const float* gate, const float* up, int64_t num_rows,
                                               int64_t width, float* hidden) {
  for (int64_t m = 0; m < num_rows; ++m, gate += width, up += width) {
    for (int64_t column = 0; column < width; column += kLanes) {
      int64_t count = std::min<int64_t>(kLanes, width - column);
      Floats gated{}, factor{};
      std::memcpy(&gated, gate + column, count * sizeof(float));
      std::memcpy(&factor, up + column, count * sizeof(float));
      Floats product = gelu(gated) * factor;
      for (int64_t lane = 0; lane < count; ++lane) {
        hidden[(column + lane) * num_rows + m] = product[lane];
      }
    }
  }
}

// total[width] += weight * result. The product is rounded before it is added, so that it does not
// matter which of a token's two experts comes first.
inline void add_weighted(float weight, const float* result, int64_t width, float* total) {
  for (int64_t column = 0; column < width; column += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, width - column);
    Floats product{}, sum{};
    std::memcpy(&product, result + column, count * sizeof(float));
    std::memcpy(&sum, total + column, count * sizeof(float));
    product *= weight;
    hold(product);
    sum += product;
    std::memcpy(total + column, &sum, count * sizeof(float));
  }
}

// A slice of an expert's hidden columns, for few rows. Segments of the model dimension are summed
// and activated by the thread that finishes the last; then segments of the slice go through `down`.
template <typename Matrix>
struct Slice {
  const Expert<Matrix>* expert;
  int64_t num_rows;
  const float* packed;    // the expert's rows, [D, rows]
  int64_t begin, width;   // hidden columns
  float *gate, *up;       // [segments of gate, rows, width]
  float* hidden;          // packed, [width, rows]
  float* out;             // [segments of the slice, rows, D]
  std::atomic<int64_t> num_done{0};

  void run_up(int64_t number) {
    const int64_t depth = expert->gate.depth, size = num_rows * width;
    const int64_t segment = segment_depth(depth, kUpSegments);
    const int64_t num_segments = (depth + segment - 1) / segment, first = number * segment;
    for (auto [matrix, to] : {std::pair{&expert->gate, gate}, std::pair{&expert->up, up}}) {
      multiply_few(*matrix, first, std::min(depth, first + segment), begin, width,
                   packed + first * num_rows, num_rows, to + number * size, width);
    }
    if (num_done.fetch_add(1, std::memory_order_acq_rel) + 1 < num_segments) return;
    for (float* sum : {gate, up}) {
      for (int64_t other = 1; other < num_segments; ++other) {
        for (int64_t i = 0; i < size; ++i) sum[i] += sum[other * size + i];
      }
    }
    activate(gate, up, num_rows, width, hidden);
    prepare(expert->down, hidden, num_rows, width);
    num_done.fetch_add(1, std::memory_order_release);
  }

  void run_down(int64_t number, int64_t num_up_segments) {
    // Every segment of `up` was taken before this one, and is being worked on.
    wait_until([&] { return num_done.load(std::memory_order_acquire) > num_up_segments; });
    const int64_t depth = expert->down.columns, first = number * kDownSegment;
    multiply_few(expert->down, begin + first, begin + std::min(width, first + kDownSegment), 0,
                 depth, hidden + first * num_rows, num_rows, out + number * num_rows * depth,
                 depth);
  }
};

// What came out for an expert's few rows, in segments of the hidden size.
struct Result {
  const std::vector<Dispatched>* rows;
  const float* segments;  // [segments, rows, D]
  int64_t num_segments, depth;

  // total[token, D] += what came out for it, of at most kSumColumns columns from `first` on.
  void add_to(float* total, int64_t first) const {
    const int64_t width = std::min(kSumColumns, depth - first), num_rows = rows->size();
    for (int64_t m = 0; m < num_rows; ++m) {
      float sum[kSumColumns] = {};
      for (int64_t number = 0; number < num_segments; ++number) {
        const float* segment = segments + (number * num_rows + m) * depth + first;
        for (int64_t c = 0; c < width; ++c) sum[c] += segment[c];
      }
      const Dispatched& to = (*rows)[m];
      add_weighted(to.weight, sum, width, total + to.token * depth + first);
    }
  }
};

// Experts of at most kFewRows rows each, all in one job.
template <typename Matrix>
void run_few(xla::ffi::ThreadPool& pool, const std::vector<Expert<Matrix>>& experts,
                    const std::vector<std::vector<Dispatched>>& rows, const float* x, float* out) {
  const int64_t depth = experts[0].gate.depth, hidden_size = experts[0].gate.columns;
  const int64_t up_segment = segment_depth(depth, kUpSegments);
  const int64_t num_up = (depth + up_segment - 1) / up_segment;
  auto down_segments = [](int64_t width) { return (width + kDownSegment - 1) / kDownSegment; };
  const int64_t num_down = down_segments(hidden_size);
  auto is_few = [&](size_t e) { return !rows[e].empty() && rows[e].size() <= kFewRows; };
  auto width_of = [&](size_t e) {
    const int64_t width = panel_for(rows[e].size());
    return std::max(kDownSegment, width / kDownSegment * kDownSegment);
  };
  int64_t num_slices = 0, size = 0;
  for (size_t e = 0; e < experts.size(); ++e) {
    if (!is_few(e)) continue;
    num_slices += (hidden_size + width_of(e) - 1) / width_of(e);
    size += rows[e].size() * (depth + (2 * num_up + 1) * hidden_size + num_down * depth);
  }
  if (num_slices == 0) return;
  static thread_local Scratch scratch;
  float* memory = scratch.floats(size);
  auto take = [&](int64_t count) { return std::exchange(memory, memory + count); };
  std::vector<Slice<Matrix>> slices(num_slices);
  std::vector<Result> results;
  using Units = std::vector<std::pair<Slice<Matrix>*, int64_t>>;  // and which segment of the slice
  Units up, down;
  auto slice = slices.begin();
  for (size_t e = 0; e < experts.size(); ++e) {
    if (!is_few(e)) continue;
    const int64_t num_rows = rows[e].size();
    float* packed = take(num_rows * depth);
    auto row = [&](int64_t m) { return x + rows[e][m].token * depth; };
    pack_rows(row, num_rows, depth, packed);
    prepare(experts[e].gate, packed, num_rows, depth);
    float* segments = take(num_down * num_rows * depth);
    results.push_back({&rows[e], segments, num_down, depth});
    for (int64_t begin = 0; begin < hidden_size; begin += width_of(e), ++slice) {
      slice->expert = &experts[e];
      slice->num_rows = num_rows;
      slice->packed = packed;
      slice->begin = begin;
      slice->width = std::min(width_of(e), hidden_size - begin);
      slice->gate = take(num_up * num_rows * slice->width);
      slice->up = take(num_up * num_rows * slice->width);
      slice->hidden = take(num_rows * slice->width);
      slice->out = segments + begin / kDownSegment * num_rows * depth;
      for (int64_t number = 0; number < num_up; ++number) up.emplace_back(&*slice, number);
      const int64_t of_slice = down_segments(slice->width);
      for (int64_t number = 0; number < of_slice; ++number) down.emplace_back(&*slice, number);
    }
  }
  // Experts of many rows are bound by arithmetic, those of few by memory: threads that take one and
  // the other have more of both.
  auto by_turns = [](Units& units) {
    std::stable_sort(units.begin(), units.end(), [](const auto& one, const auto& other) {
      return one.first->num_rows > other.first->num_rows;
    });
    Units sorted;
    for (size_t place = 0; place < units.size(); ++place) {
      sorted.push_back(units[place % 2 == 0 ? place / 2 : units.size() - 1 - place / 2]);
    }
    units = std::move(sorted);
  };
  by_turns(up);
  by_turns(down);
  const int64_t all_up = up.size(), all_down = down.size();
  run_units(pool, all_up + all_down, [&](int64_t unit) {
    if (unit < all_up) return up[unit].first->run_up(up[unit].second);
    auto [of_slice, number] = down[unit - all_up];
    of_slice->run_down(number, num_up);
  }, {experts[0].gate.stream().begin});
  run_units(pool, (depth + kSumColumns - 1) / kSumColumns, [&](int64_t unit) {
    for (const Result& result : results) result.add_to(out, unit * kSumColumns);
  });
}

// One expert of many rows, a pass of them at a time.
template <typename Matrix>
void run_many(xla::ffi::ThreadPool& pool, const Expert<Matrix>& expert,
                     const std::vector<Dispatched>& dispatched, const float* x, float* out) {
  static thread_local Scratch scratch;
  int64_t depth = expert.gate.depth, hidden_size = expert.gate.columns;
  int64_t total = dispatched.size();
  // Passes of equal size, so that none has few rows.
  int64_t num_passes = (total + kRowsOfPass - 1) / kRowsOfPass;
  int64_t most_rows = (total + num_passes - 1) / num_passes;
  float* packed = scratch.floats(most_rows * (depth + hidden_size));
  float* hidden = packed + most_rows * depth;
  for (int64_t pass = 0; pass < num_passes; ++pass) {
    int64_t first = total * pass / num_passes, num_rows = total * (pass + 1) / num_passes - first;
    auto row = [&](int64_t m) { return x + dispatched[first + m].token * depth; };
    run_units(pool, num_blocks(num_rows), [&](int64_t block) {
      pack_block(row, num_rows, block, depth, packed);
      prepare(expert.gate, packed + block * kMaxRows * depth, rows_of_block(num_rows, block), depth);
    });

    auto num_units = [](int64_t columns) { return (columns + kManyColumns - 1) / kManyColumns; };
    run_units(pool, num_units(hidden_size), [&](int64_t unit) {
      static thread_local Scratch sums;
      int64_t column = unit * kManyColumns;
      int64_t width = std::min(kManyColumns, hidden_size - column);
      float* gate = sums.floats(3 * num_rows * width);
      float *up = gate + num_rows * width, *segment = up + num_rows * width;
      const Packed rows_of_pass = {packed, num_rows, depth};
      const int64_t up_segment = segment_depth(depth, kUpSegments);
      multiply(expert.gate, up_segment, column, width, rows_of_pass, segment, gate, width);
      multiply(expert.up, up_segment, column, width, rows_of_pass, segment, up, width);
      for (int64_t block = 0; block < num_blocks(num_rows); ++block) {
        int64_t start = block * kMaxRows, rows = rows_of_block(num_rows, block);
        float* of_block = hidden + start * hidden_size + column * rows;
        activate(gate + start * width, up + start * width, rows, width, of_block);
        prepare(expert.down, of_block, rows, width);
      }
    });
    run_units(pool, num_units(depth), [&](int64_t unit) {
      static thread_local Scratch sums;
      int64_t column = unit * kManyColumns, width = std::min(kManyColumns, depth - column);
      float* result = sums.floats(2 * num_rows * width);
      multiply(expert.down, kDownSegment, column, width, Packed{hidden, num_rows, hidden_size},
               result + num_rows * width, result, width);
      for (int64_t m = 0; m < num_rows; ++m) {
        const Dispatched& to = dispatched[first + m];
        add_weighted(to.weight, result + m * width, width, out + to.token * depth + column);
      }
    });
  }
}

template <typename Matrix>
void run_experts(xla::ffi::ThreadPool& pool, const std::vector<Expert<Matrix>>& experts,
                        const std::vector<std::vector<Dispatched>>& rows, const float* x,
                        float* out) {
  run_few(pool, experts, rows, x, out);
  for (size_t e = 0; e < experts.size(); ++e) {
    if (rows[e].size() > kFewRows) run_many(pool, experts[e], rows[e], x, out);
  }
}

}  // namespace grok1
