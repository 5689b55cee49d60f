// Soft-capped attention over a float32 cache, on all threads.
//
// One head's keys are walked a tile at a time and the softmax is accumulated (Milakov & Gimelshein,
// arXiv 1805.02867); keys beyond the last position are not read.

#pragma once

#include <limits>

#include "product.h"
#include "threads.h"

namespace grok1 {

struct Attention {
  const float* query;        // [B, T, C, G, H]
  const float* keys;         // [slots, C, S, H], of one layer
  const float* values;       // [slots, C, S, H]
  const int32_t* slots;      // [B], which row of the cache a row sees; one outside it sees nothing
  const int32_t* positions;  // [B, T]; a query sees keys at positions up to its own
  float* out;                // [B, T, C, G, H]
  int64_t num_slots, batch, length, heads, group, capacity, head_size;
  float scale, soft_cap;
};

constexpr int64_t kKeys = kTileColumns;      // keys of a tile
constexpr int64_t kChunkKeys = 16 * kKeys;   // keys of a unit where queries are few
constexpr int kHeadSums = 16 / kLanes;       // sums of a product, for the latency of an addition
constexpr int64_t kBlocksOfUnit = 16;        // blocks of queries of a unit where they are many

// The softmax so far of a block of rows: the largest logit, the sum of weights, the mixed values.
struct Softmax {
  float top[kMaxRows], total[kMaxRows];
  float* mixed;  // [rows, head_size]

  void clear(int64_t rows, int64_t head_size) {
    std::fill_n(top, rows, std::numeric_limits<float>::lowest());
    std::fill_n(total, rows, 0.0f);
    std::fill_n(mixed, rows * head_size, 0.0f);
  }
};

// Turns a tile's products [rows, kKeys] into weights, packed [kKeys, rows], of which row m has the
// first visible[m]; rescales what has been accumulated to the new largest logit.
inline void weigh(const Attention& a, const float* products, int64_t rows, const int64_t* visible,
                  Softmax& softmax, float* weights) {
  for (int64_t m = 0; m < rows; ++m) {
    alignas(kCacheLine) float logits[kKeys];
    float top = softmax.top[m];
    for (int64_t key = 0; key < kKeys; key += kLanes) {
      Floats logit = load(products + m * kKeys + key) * (a.scale / a.soft_cap);
      store_floats(logits + key, a.soft_cap * tanh(logit));
    }
    for (int64_t key = 0; key < visible[m]; ++key) top = std::max(top, logits[key]);
    float sum = 0;
    for (int64_t key = 0; key < kKeys; key += kLanes) {
      store_floats(logits + key, exp(load(logits + key) - top));
    }
    for (int64_t key = 0; key < kKeys; ++key) {
      float weight = key < visible[m] ? logits[key] : 0.0f;
      weights[key * rows + m] = weight;
      sum += weight;
    }
    float shrink = exp(Floats{} + (softmax.top[m] - top))[0];
    softmax.top[m] = top;
    softmax.total[m] = softmax.total[m] * shrink + sum;
    if (shrink == 1) continue;
    for (int64_t h = 0; h < a.head_size; ++h) softmax.mixed[m * a.head_size + h] *= shrink;
  }
}

struct Head {
  const float *keys, *values;
};

inline Head head_of(const Attention& a, int64_t b, int64_t c) {
  int64_t start = (a.slots[b] * a.heads + c) * a.capacity * a.head_size;
  return {a.keys + start, a.values + start};
}

// Row m of a head's queries, [T * G] of them, is at position positions[m / G].
inline int64_t offset_of(const Attention& a, int64_t b, int64_t c, int64_t m) {
  return (((b * a.length + m / a.group) * a.heads + c) * a.group + m % a.group) * a.head_size;
}

inline int64_t num_visible(const Attention& a, int64_t b, int64_t m) {
  if (a.slots[b] < 0 || a.slots[b] >= a.num_slots) return 0;
  return std::clamp<int64_t>(a.positions[b * a.length + m / a.group] + int64_t{1}, 0, a.capacity);
}

// A few rows: products and sums straight from the cache, which is read once.
inline void attend_few(const Attention& a, int64_t b, int64_t c, int64_t first_row, int64_t rows,
                       int64_t begin, int64_t end, Softmax& softmax) {
  Head head = head_of(a, b, c);
  alignas(kCacheLine) float products[kMaxRows * kKeys] = {}, weights[kKeys * kMaxRows];
  for (int64_t start = begin; start < end; start += kKeys) {
    int64_t count = std::min(kKeys, end - start), visible[kMaxRows];
    for (int64_t m = 0; m < rows; ++m) {
      const float* query = a.query + offset_of(a, b, c, first_row + m);
      visible[m] = std::clamp<int64_t>(num_visible(a, b, first_row + m) - start, 0, count);
      for (int64_t key = 0; key < visible[m]; ++key) {
        const float* key_row = head.keys + (start + key) * a.head_size;
        Floats sums[kHeadSums] = {};
        int64_t h = 0;
        for (; h + kHeadSums * kLanes <= a.head_size; h += kHeadSums * kLanes) {
          for (int s = 0; s < kHeadSums; ++s) {
            sums[s] += load(query + h + s * kLanes) * load(key_row + h + s * kLanes);
          }
        }
        for (int s = 1; s < kHeadSums; ++s) sums[0] += sums[s];
        for (; h + kLanes <= a.head_size; h += kLanes) {
          sums[0] += load(query + h) * load(key_row + h);
        }
        float product = sum_of(sums[0]);
        for (; h < a.head_size; ++h) product += query[h] * key_row[h];
        products[m * kKeys + key] = product;
      }
    }
    weigh(a, products, rows, visible, softmax, weights);
    for (int64_t m = 0; m < rows; ++m) {
      float* mixed = softmax.mixed + m * a.head_size;
      for (int64_t key = 0; key < visible[m]; ++key) {
        const float* value_row = head.values + (start + key) * a.head_size;
        float weight = weights[key * rows + m];
        for (int64_t h = 0; h < a.head_size; ++h) mixed[h] += weight * value_row[h];
      }
    }
  }
}

// Many rows, in packed blocks: keys and values of a tile are laid out for all blocks.
inline void attend_many(const Attention& a, int64_t b, int64_t c, int64_t first_row,
                        int64_t num_rows, const float* packed, Softmax* softmax) {
  Head head = head_of(a, b, c);
  static thread_local Scratch scratch;
  int64_t value_tiles = (a.head_size + kTileColumns - 1) / kTileColumns;
  float* key_tile = scratch.floats((a.head_size + value_tiles * kKeys) * kTileColumns);
  float* value_tile = key_tile + a.head_size * kKeys;  // [value_tiles, kKeys, kTileColumns]
  int64_t end = num_visible(a, b, first_row + num_rows - 1);
  for (int64_t m = 0; m < num_rows; ++m) end = std::max(end, num_visible(a, b, first_row + m));
  for (int64_t start = 0; start < end; start += kKeys) {
    int64_t count = std::min(kKeys, end - start);
    for (int64_t key = 0; key < kKeys; ++key) {
      for (int64_t h = 0; h < a.head_size; ++h) {
        key_tile[h * kKeys + key] =
            key < count ? head.keys[(start + key) * a.head_size + h] : 0.0f;
      }
      for (int64_t h = 0; h < value_tiles * kTileColumns; ++h) {
        value_tile[(h / kTileColumns * kKeys + key) * kTileColumns + h % kTileColumns] =
            key < count && h < a.head_size ? head.values[(start + key) * a.head_size + h] : 0.0f;
      }
    }
    for (int64_t block = 0; block < num_blocks(num_rows); ++block) {
      int64_t rows = rows_of_block(num_rows, block), visible[kMaxRows], most = 0;
      for (int64_t m = 0; m < rows; ++m) {
        int64_t row = first_row + block * kMaxRows + m;
        visible[m] = std::clamp<int64_t>(num_visible(a, b, row) - start, 0, count);
        most = std::max(most, visible[m]);
      }
      if (most == 0) continue;
      alignas(kCacheLine) float products[kMaxRows * kKeys], weights[kKeys * kMaxRows];
      alignas(kCacheLine) float mixed[kMaxRows * kTileColumns];
      kMultiplyTile[rows]({key_tile, kOnes.values, a.head_size},
                          packed + block * kMaxRows * a.head_size, false, products, kKeys, nullptr,
                          0);
      weigh(a, products, rows, visible, softmax[block], weights);
      for (int64_t tile = 0; tile < value_tiles; ++tile) {
        int64_t first = tile * kTileColumns, width = std::min(kTileColumns, a.head_size - first);
        kMultiplyTile[rows]({value_tile + tile * kKeys * kTileColumns, kOnes.values, kKeys},
                            weights, false, mixed, kTileColumns, nullptr, 0);
        for (int64_t m = 0; m < rows; ++m) {
          float* to = softmax[block].mixed + m * a.head_size + first;
          for (int64_t h = 0; h < width; ++h) to[h] += mixed[m * kTileColumns + h];
        }
      }
    }
  }
}

inline void write_out(const Attention& a, int64_t b, int64_t c, int64_t row, const float* mixed,
                      float total) {
  float* out = a.out + offset_of(a, b, c, row);
  // A query that sees no key mixes nothing; a total that is no number is not 0, and stays so.
  for (int64_t h = 0; h < a.head_size; ++h) out[h] = total == 0 ? 0.0f : mixed[h] / total;
}

// One block of rows a head: keys are cut into chunks, whose softmaxes are joined in order.
inline void attend_decode(xla::ffi::ThreadPool& pool, const Attention& a) {
  int64_t rows = a.length * a.group, num_heads = a.batch * a.heads, most_keys = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t m = 0; m < rows; ++m) most_keys = std::max(most_keys, num_visible(a, b, m));
  }
  int64_t num_chunks = std::max<int64_t>(1, (most_keys + kChunkKeys - 1) / kChunkKeys);
  static thread_local Scratch scratch;
  float* mixed = scratch.floats(num_heads * num_chunks * rows * a.head_size);
  std::vector<Softmax> parts(num_heads * num_chunks);
  run_units(pool, num_heads * num_chunks, [&](int64_t unit) {
    int64_t head = unit / num_chunks, b = head / a.heads, c = head % a.heads, end = 0;
    int64_t begin = unit % num_chunks * kChunkKeys;
    for (int64_t m = 0; m < rows; ++m) end = std::max(end, num_visible(a, b, m));
    parts[unit].mixed = mixed + unit * rows * a.head_size;
    parts[unit].clear(rows, a.head_size);
    attend_few(a, b, c, 0, rows, begin, std::min(end, begin + kChunkKeys), parts[unit]);
  });
  for (int64_t head = 0; head < num_heads; ++head) {
    Softmax& all = parts[head * num_chunks];
    for (int64_t m = 0; m < rows; ++m) {
      float* sum = all.mixed + m * a.head_size;
      for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
        const Softmax& part = parts[head * num_chunks + chunk];
        if (part.total[m] == 0) continue;
        float top = std::max(all.top[m], part.top[m]);
        float shrink = exp(Floats{} + (all.top[m] - top))[0];
        float factor = exp(Floats{} + (part.top[m] - top))[0];
        const float* more = part.mixed + m * a.head_size;
        for (int64_t h = 0; h < a.head_size; ++h) sum[h] = sum[h] * shrink + more[h] * factor;
        all.total[m] = all.total[m] * shrink + part.total[m] * factor;
        all.top[m] = top;
      }
      write_out(a, head / a.heads, head % a.heads, m, sum, all.total[m]);
    }
  }
}

inline void attend_prefill(xla::ffi::ThreadPool& pool, const Attention& a) {
  int64_t rows = a.length * a.group, rows_of_unit = kBlocksOfUnit * kMaxRows;
  int64_t units_of_head = (rows + rows_of_unit - 1) / rows_of_unit;
  run_units(pool, a.batch * a.heads * units_of_head, [&](int64_t unit) {
    static thread_local Scratch scratch;
    // The last queries see the most keys: they come first, so that no thread ends alone.
    int64_t part = units_of_head - 1 - unit / (a.batch * a.heads);
    int64_t head = unit % (a.batch * a.heads), b = head / a.heads, c = head % a.heads;
    int64_t first = part * rows_of_unit, num_rows = std::min(rows_of_unit, rows - first);
    float* packed = scratch.floats(2 * num_rows * a.head_size);
    Softmax softmax[kBlocksOfUnit];
    for (int64_t block = 0; block < num_blocks(num_rows); ++block) {
      auto row = [&](int64_t m) { return a.query + offset_of(a, b, c, first + m); };
      pack_block(row, num_rows, block, a.head_size, packed);
      softmax[block].mixed = packed + (num_rows + block * kMaxRows) * a.head_size;
      softmax[block].clear(rows_of_block(num_rows, block), a.head_size);
    }
    attend_many(a, b, c, first, num_rows, packed, softmax);
    for (int64_t m = 0; m < num_rows; ++m) {
      const Softmax& block = softmax[m / kMaxRows];
      int64_t place = m % kMaxRows;
      write_out(a, b, c, first + m, block.mixed + place * a.head_size, block.total[place]);
    }
  });
}

inline void attend(xla::ffi::ThreadPool& pool, const Attention& a) {
  (a.length * a.group <= kMaxRows ? attend_decode : attend_prefill)(pool, a);
}

}  // namespace grok1
