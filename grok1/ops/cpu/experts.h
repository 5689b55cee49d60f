// out[M, D] = sum over a token's experts of weight * down(gelu(gate(x)) * up(x)), on all threads.
//
// Rows are grouped by expert, so that each chosen expert is read once for all of them, or once a
// pass where they are many. No row is dropped, an expert that no row chose is not read.

#pragma once

#include <utility>

#include "matmul.h"

namespace grok1 {

// Parts that the work on a slice of hidden columns is cut into, before and after the activation.
// More rows have more slices.
constexpr int64_t parts_for(int64_t num_rows) {
  return num_rows <= 2 ? 8 : num_rows <= 4 ? 4 : 2;
}

constexpr int64_t kSumColumns = 512;  // of a unit of the last sum

template <typename Matrix>
struct Expert {
  Matrix gate, up, down;
};

struct Dispatched {
  int64_t token;
  float weight;
};

// hidden = gelu(gate) * up, [num_rows, width] to a packed block of rows: hidden[width, num_rows].
inline void activate(const float* gate, const float* up, int64_t num_rows, int64_t width,
                     float* hidden) {
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

// A slice of an expert's hidden columns, for few rows. Parts of the model dimension are summed and
// activated by the thread that finishes the last; then parts of the slice go through `down`.
template <typename Matrix>
struct Slice {
  const Expert<Matrix>* expert;
  const std::vector<Dispatched>* rows;
  const float* packed;    // the expert's rows, [D, rows]
  int64_t begin, width;   // hidden columns
  float *gate, *up;       // [parts, rows, width]
  float* hidden;          // packed, [width, rows]
  float* out;             // [parts, rows, D]
  std::atomic<int64_t> parts_done{0};

  int64_t num_rows() const { return rows->size(); }
  int64_t num_parts() const { return parts_for(num_rows()); }

  void run_up(int64_t part) {
    int64_t depth = expert->gate.depth, size = num_rows() * width, parts = num_parts();
    int64_t first = depth * part / parts, last = depth * (part + 1) / parts;
    for (auto [matrix, to] : {std::pair{&expert->gate, gate}, std::pair{&expert->up, up}}) {
      multiply_few(*matrix, first, last, begin, width, packed + first * num_rows(), num_rows(),
                   false, to + part * size, width);
    }
    if (parts_done.fetch_add(1, std::memory_order_acq_rel) + 1 < parts) return;
    for (float* sum : {gate, up}) {
      for (int64_t other = 1; other < parts; ++other) {
        for (int64_t i = 0; i < size; ++i) sum[i] += sum[other * size + i];
      }
    }
    activate(gate, up, num_rows(), width, hidden);
    parts_done.fetch_add(1, std::memory_order_release);
  }

  void run_down(int64_t part) {
    // Every part of `up` was taken before this one, and is being worked on.
    int64_t depth = expert->down.columns, parts = num_parts();
    wait_until([&] { return parts_done.load(std::memory_order_acquire) > parts; });
    int64_t first = width * part / parts, last = width * (part + 1) / parts;
    multiply_few(expert->down, begin + first, begin + last, 0, depth, hidden + first * num_rows(),
                 num_rows(), false, out + part * num_rows() * depth, depth);
  }

  // total[token, D] += what came out for it, of columns `first` to `last`.
  void add_to(float* total, int64_t first, int64_t last) const {
    int64_t depth = expert->down.columns;
    for (int64_t part = 0; part < num_parts(); ++part) {
      for (int64_t m = 0; m < num_rows(); ++m) {
        const Dispatched& to = (*rows)[m];
        const float* result = out + (part * num_rows() + m) * depth;
        float* sum = total + to.token * depth;
        for (int64_t c = first; c < last; ++c) sum[c] += to.weight * result[c];
      }
    }
  }
};

// Experts of at most kFewRows rows each, all in one job.
template <typename Matrix>
void run_few(xla::ffi::ThreadPool& pool, const std::vector<Expert<Matrix>>& experts,
                    const std::vector<std::vector<Dispatched>>& rows, const float* x, float* out) {
  int64_t depth = experts[0].gate.depth, hidden_size = experts[0].gate.columns;
  auto is_few = [&](size_t e) { return !rows[e].empty() && rows[e].size() <= kFewRows; };
  auto slices_of = [&](size_t e) {
    int64_t width = panel_for(rows[e].size());
    return (hidden_size + width - 1) / width;
  };
  int64_t num_slices = 0, size = 0;
  for (size_t e = 0; e < experts.size(); ++e) {
    if (!is_few(e)) continue;
    int64_t parts = parts_for(rows[e].size());
    num_slices += slices_of(e);
    size +=
        rows[e].size() * (depth + (2 * parts + 1) * hidden_size + slices_of(e) * parts * depth);
  }
  if (num_slices == 0) return;
  static thread_local Scratch scratch;
  float* memory = scratch.floats(size);
  auto take = [&](int64_t count) { return std::exchange(memory, memory + count); };
  std::vector<Slice<Matrix>> slices(num_slices);
  std::vector<std::pair<Slice<Matrix>*, int64_t>> units;  // and which part of the slice
  auto slice = slices.begin();
  for (size_t e = 0; e < experts.size(); ++e) {
    if (!is_few(e)) continue;
    int64_t num_rows = rows[e].size(), parts = parts_for(num_rows);
    float* packed = take(num_rows * depth);
    auto row = [&](int64_t m) { return x + rows[e][m].token * depth; };
    pack_rows(row, num_rows, depth, packed);
    for (int64_t begin = 0; begin < hidden_size; begin += panel_for(num_rows), ++slice) {
      slice->expert = &experts[e];
      slice->rows = &rows[e];
      slice->packed = packed;
      slice->begin = begin;
      slice->width = std::min(panel_for(num_rows), hidden_size - begin);
      slice->gate = take(parts * num_rows * slice->width);
      slice->up = take(parts * num_rows * slice->width);
      slice->hidden = take(num_rows * slice->width);
      slice->out = take(parts * num_rows * depth);
      for (int64_t part = 0; part < parts; ++part) units.emplace_back(&*slice, part);
    }
  }
  // Experts of many rows are bound by arithmetic, those of few by memory: threads that take one and
  // the other have more of both.
  std::stable_sort(units.begin(), units.end(), [](const auto& one, const auto& other) {
    return one.first->num_rows() > other.first->num_rows();
  });
  int64_t num_units = units.size();
  run_units(pool, 2 * num_units, [&](int64_t unit) {
    int64_t place = unit % num_units;
    auto [of_unit, part] = units[place % 2 == 0 ? place / 2 : num_units - 1 - place / 2];
    unit < num_units ? of_unit->run_up(part) : of_unit->run_down(part);
  }, {experts[0].gate.stream().begin});
  run_units(pool, (depth + kSumColumns - 1) / kSumColumns, [&](int64_t unit) {
    int64_t first = unit * kSumColumns;
    for (const Slice<Matrix>& done : slices) done.add_to(out, first, std::min(first + kSumColumns, depth));
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
    run_units(pool, num_blocks(num_rows),
              [&](int64_t block) { pack_block(row, num_rows, block, depth, packed); });

    auto num_units = [](int64_t columns) { return (columns + kManyColumns - 1) / kManyColumns; };
    run_units(pool, num_units(hidden_size), [&](int64_t unit) {
      static thread_local Scratch sums;
      int64_t column = unit * kManyColumns;
      int64_t width = std::min(kManyColumns, hidden_size - column);
      float* gate = sums.floats(2 * num_rows * width);
      float* up = gate + num_rows * width;
      multiply(expert.gate, 0, depth, column, width, packed, depth, num_rows, false, gate, width);
      multiply(expert.up, 0, depth, column, width, packed, depth, num_rows, false, up, width);
      for (int64_t block = 0; block < num_blocks(num_rows); ++block) {
        int64_t start = block * kMaxRows, rows = rows_of_block(num_rows, block);
        activate(gate + start * width, up + start * width, rows, width,
                 hidden + start * hidden_size + column * rows);
      }
    });
    run_units(pool, num_units(depth), [&](int64_t unit) {
      static thread_local Scratch sums;
      int64_t column = unit * kManyColumns, width = std::min(kManyColumns, depth - column);
      float* result = sums.floats(num_rows * width);
      multiply(expert.down, 0, hidden_size, column, width, hidden, hidden_size, num_rows, false,
               result, width);
      for (int64_t m = 0; m < num_rows; ++m) {
        const Dispatched& to = dispatched[first + m];
        float* out_row = out + to.token * depth + column;
        for (int64_t c = 0; c < width; ++c) out_row[c] += to.weight * result[m * width + c];
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
