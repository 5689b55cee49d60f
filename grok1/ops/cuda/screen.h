// The row of a float32 table with the largest product, for each of a few inputs, without reading the
// whole table: an int8 copy gives every product between two bounds, and only rows whose upper bound
// reaches the best lower bound are multiplied in float32. Of equal products the first row's counts.
//
// Products with the copy are of integers, on the tensor cores: int8 rows stand in the instruction's
// first operand as they are read, and an input is DIGITS signed bytes, each a column of the second.
// Its sums are exact. So bounds are apart by twice what the copy leaves out of a row, which the table
// says for an input of norm 1, roundings of float32 products included, and half of an input's last
// digit in each place.
//
// Dimension key: M input, V row of the table, D columns.
#pragma once

// A warp reads rows of the copy together, a piece of each at a time: columns, and bytes.
constexpr int PIECE = 256, ROWS_OF_WARP = 16;

DEVICE float lowest() { return float_of_bits(0xff800000u); }

// The largest over all threads of a block, in each of them, or what is no number; `shared` has a
// float for each warp.
template <int THREADS>
DEVICE float largest_of_block(float value, float* shared) {
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) value = larger(shuffle_xor(value, mask), value);
  barrier();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  barrier();
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) value = larger(shared[warp], value);
  return value;
}

// An input's digits `[M, DIGITS, D]`, the highest first, zeros up to a whole piece behind each, and
// what they are multiplied by and the input's norm `[M, 2]`; NaN where the input is no number.
// Grid: inputs.
//
// S has D, DIGITS, PIECES, THREADS.
template <class S>
DEVICE void screen_digits(const float* x, signed char* digits, float* factors) {
  constexpr int WIDTH = S::PIECES * PIECE, EACH = (S::D + S::THREADS - 1) / S::THREADS;
  __shared__ float shared[S::THREADS / 32];
  const long long input = blockIdx.x;
  float values[EACH], largest = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = threadIdx.x + i * S::THREADS;
    values[i] = at < S::D ? x[input * S::D + at] : 0;
    largest = larger(fabsf(values[i]), largest);
  }
  const Steps<S::DIGITS> steps(largest_of_block<S::THREADS>(largest, shared));
  const float inverse = steps.inverse(), factor = steps.template factor<0>();
  float squares = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    values[i] *= inverse;
    squares += values[i] * values[i];
  }
  barrier();  // nobody reads the largest any more
  const float norm = sqrtf(sum_of_block<S::THREADS>(squares, shared)) * factor;
  if (threadIdx.x == 0) {
    factors[2 * input] = factor;
    factors[2 * input + 1] = norm * (1 + 1e-5f);
  }
  signed char* to = digits + input * S::DIGITS * WIDTH;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = threadIdx.x + i * S::THREADS;
    if (at < S::D) steps.write(values[i], to + at, WIDTH);
  }
  for (int at = S::D + threadIdx.x; at < WIDTH; at += S::THREADS)
#pragma unroll
    for (int digit = 0; digit < S::DIGITS; ++digit) to[digit * WIDTH + at] = 0;
}

// sums[n]: of 16 rows of the copy and the digits of eight columns each. Lane (g, t) has rows g and
// g + 8, columns 2t and the next. All lanes of a warp call it; `ring` is its own.
//
// Every lane copies 16 bytes of every second row of a piece, while the pieces before are multiplied.
template <class S>
DEVICE void multiply_digits(int (&sums)[S::TILES][4], const signed char* values, int first,
                            const signed char* digits, Shared ring) {
  constexpr int OF_STAGE = ROWS_OF_WARP * PIECE, WIDTH = S::PIECES * PIECE;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int chunk = lane % 16, parity = lane / 16;
  // Chunks of every second row change places, so that two rows read at once are in different banks.
  const Shared to = ring + parity * PIECE + (chunk ^ 4 * parity) * 16;
  const Shared read_from = ring + g * PIECE;
  const signed char* x[S::TILES];
#pragma unroll
  for (int n = 0; n < S::TILES; ++n) {
    const int column = 8 * n + g;  // an input's digits are one after the other
    x[n] = column < S::M * S::DIGITS ? digits + (long long)column * WIDTH + 16 * t : nullptr;
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0;
  }
  const auto start = [&](int piece, int stage) {
    if (piece < S::PIECES) {
      // Outside, something else is read and multiplied by zeros, or its sums dropped.
      const int wanted = piece * PIECE + 16 * chunk, at = wanted < S::D ? wanted : 0;
#pragma unroll
      for (int i = 0; i < ROWS_OF_WARP / 2; ++i) {
        const int row = first + parity + 2 * i;
        const long long from = row < S::V ? row : S::V - 1;
        start_copy<16>(to + stage * OF_STAGE + 2 * i * PIECE, values + from * S::D + at);
      }
    }
    end_group();
  };
#pragma unroll
  for (int stage = 0; stage < S::STAGES - 1; ++stage) start(stage, stage);
  int stage = 0, free = S::STAGES - 1;
  for (int piece = 0; piece < S::PIECES; ++piece) {
    uint4 of_x[S::TILES][4];
#pragma unroll
    for (int n = 0; n < S::TILES; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        of_x[n][j].x = of_x[n][j].y = of_x[n][j].z = of_x[n][j].w = 0;
        if (x[n] != nullptr)
          of_x[n][j] = *reinterpret_cast<const uint4*>(x[n] + piece * PIECE + 64 * j);
      }
    }
    wait_for_all_but<S::STAGES - 2>();
    // What the other lanes have copied is there, and nobody reads the piece before any more.
    meet_warp();
    start(piece + S::STAGES - 1, free);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      unsigned row[4], other[4];
      const Shared at = read_from + stage * OF_STAGE + ((4 * j ^ g % 2 * 4) + t) * 16;
      read_shared(at, row);
      read_shared(at + 8 * PIECE, other);
#pragma unroll
      for (int n = 0; n < S::TILES; ++n) {
        const uint4& of = of_x[n][j];
        multiply_tile_of_bytes(sums[n], {row[0], other[0], row[1], other[1]}, {of.x, of.y});
        multiply_tile_of_bytes(sums[n], {row[2], other[2], row[3], other[3]}, {of.z, of.w});
      }
    }
    free = stage;
    stage = stage + 1 == S::STAGES ? 0 : stage + 1;
  }
}

// upper[M, V]: bounds; -infinity where a row is not allowed. lower[M, BLOCKS]: the largest lower bound
// of a block's rows that are allowed; NaN where a bound of any row is no number, since a damaged row
// is a damaged table. Grid: BLOCKS of WARPS times 16 rows.
//
// S has M, V, D, DIGITS, TILES, PIECES, STAGES, WARPS, BLOCKS, MASKED: V where each input has rows of
// its own that are allowed, 0 otherwise.
template <class S>
DEVICE void screen(const signed char* digits, const float* factors, const signed char* values,
                   const float* scales, const float* uncertainty, const unsigned char* allowed,
                   float* upper, float* lower) {
  // Half a step in each place, times the largest number of the copy.
  constexpr float LEFT = 1.001f * 0.5f * 127 * S::D;
  __shared__ float of_warps[S::WARPS][S::M];
  DYNAMIC_SHARED(ring);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = (blockIdx.x * S::WARPS + warp) * ROWS_OF_WARP;
  int sums[S::TILES][4];
  multiply_digits<S>(sums, values, first, digits,
                     shared_place(ring) + warp * S::STAGES * ROWS_OF_WARP * PIECE);
#pragma unroll
  for (int n = 0; n < S::TILES; ++n) {
    float best = lowest();
    int input = 4 * n + t;
    if (S::DIGITS == 4) input = t % 2 == 0 ? 2 * n + t / 2 : S::M;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value = (float)sums[n][2 * half] * 256 + (float)sums[n][2 * half + 1];
      // The other lane has the lower two digits.
      if (S::DIGITS == 4) value = value * 65536 + shuffle_xor(value, 1);
      const int row = first + g + 8 * half;
      if (input >= S::M || row >= S::V) continue;
      const float factor = factors[2 * input], norm = factors[2 * input + 1], scale = scales[row];
      const bool is_allowed = allowed[input * S::MASKED + row];
      const float bound = norm * uncertainty[row] + factor * LEFT * scale;
      value = value * factor * scale;
      upper[(long long)input * S::V + row] = is_allowed ? value + bound : lowest();
      if (is_allowed) best = larger(value - bound, best);
      if (bound != bound) best = bound;
    }
#pragma unroll
    for (int mask = 4; mask <= 16; mask *= 2) best = larger(shuffle_xor(best, mask), best);
    if (g == 0 && input < S::M) of_warps[warp][input] = best;
  }
  barrier();
  if (threadIdx.x >= S::M) return;
  float best = lowest();
#pragma unroll
  for (int of = 0; of < S::WARPS; ++of) best = larger(of_warps[of][threadIdx.x], best);
  lower[threadIdx.x * S::BLOCKS + blockIdx.x] = best;
}

// The largest product so far, and its row.
struct Largest {
  float product;
  int row;

  // Of equals the lower row counts, and what is no number stays.
  DEVICE void take(float of, int its_row) {
    const bool is_first = of == product && (unsigned)its_row < (unsigned)row;
    if (of > product || of != of || is_first) product = of, row = its_row;
  }

  DEVICE void take_of_lane(int mask) {
    const float other = shuffle_xor(product, mask);
    take(other, (int)bits_of_float(shuffle_xor(float_of_bits((unsigned)row), mask)));
  }
};

// Of a row and an input, in float32, in all threads of a block; the same whatever else is asked for.
template <class S>
DEVICE float exact_product(const float* x, const float* row, float* shared) {
  constexpr int STEPS = (S::D / 4 + S::THREADS - 1) / S::THREADS, TOGETHER = STEPS < 8 ? STEPS : 8;
  float sum = 0;
  for (int step = 0; step < STEPS; step += TOGETHER) {
    float4 w[TOGETHER];
    // Everything is asked for before anything is waited for.
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const int at = 4 * (threadIdx.x + (step + i) * S::THREADS);
      w[i].x = w[i].y = w[i].z = w[i].w = 0;
      if (at < S::D) w[i] = *reinterpret_cast<const float4*>(row + at);
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const int at = 4 * (threadIdx.x + (step + i) * S::THREADS);
      if (at >= S::D) continue;
      const float4 v = *reinterpret_cast<const float4*>(x + at);
      sum += w[i].x * v.x + w[i].y * v.y + (w[i].z * v.z + w[i].w * v.w);
    }
  }
  barrier();  // nobody reads the product before any more
  return sum_of_block<S::THREADS>(sum, shared);
}

// index[M] and product[M] of the largest product; -1 and -infinity where no row is allowed, and a
// product that is no number where the bounds are none. Each part of a grid has some of an input's
// rows, by eights from all over the table, and multiplies those of them that can be the largest; the
// last compares what all have written to `indices` and `products` [M, PARTS]. Grid: parts, inputs.
//
// S has M, V, D, BLOCKS, PARTS, up to THREADS, and EACH, how many rows a thread looks at at a time.
template <class S>
DEVICE void choose(const float* x, const float* rows, const float* upper, const float* lower,
                   int* index, float* product, int* indices, float* products) {
  constexpr int WARPS = S::THREADS / 32, MASKS = S::EACH * WARPS;
  constexpr int OF_PART = 8 * ((S::V + 8 * S::PARTS - 1) / (8 * S::PARTS));
  static_assert(MASKS % 32 == 0, "a warp reads 32 masks at a time");
  __shared__ float shared[WARPS];
  __shared__ unsigned masks[MASKS];
  __shared__ float of_warps[WARPS];
  __shared__ int rows_of_warps[WARPS];
  const int part = blockIdx.x, input = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float least = lowest();
  for (int i = threadIdx.x; i < S::BLOCKS; i += S::THREADS)
    least = larger(lower[input * S::BLOCKS + i], least);
  least = largest_of_block<S::THREADS>(least, shared);
  const bool is_number = least == least;
  Largest best = {is_number ? lowest() : least, -1};
  for (int begin = 0; is_number && begin < OF_PART; begin += S::EACH * S::THREADS) {
    const auto row_of = [&](int i) {
      const int of_part = begin + i;
      return (of_part / 8 * S::PARTS + part) * 8 + of_part % 8;
    };
    float bounds[S::EACH];
#pragma unroll
    for (int i = 0; i < S::EACH; ++i) {
      const int row = row_of(i * S::THREADS + threadIdx.x);
      bounds[i] = row < S::V ? upper[(long long)input * S::V + row] : lowest();
    }
    barrier();  // nobody reads the masks before any more
#pragma unroll
    for (int i = 0; i < S::EACH; ++i) {
      const unsigned can_win = vote(!(bounds[i] < least) && bounds[i] != lowest());
      if (lane == 0) masks[i * WARPS + warp] = can_win;
    }
    barrier();
    for (int start = 0; start < MASKS; start += 32) {
      for (unsigned any = vote(masks[start + lane] != 0); any != 0; any &= any - 1) {
        const int mask = start + lowest_bit(any);
        for (unsigned left = masks[mask]; left != 0; left &= left - 1) {
          const int row = row_of(32 * mask + lowest_bit(left));
          const float* from = rows + (long long)row * S::D;
          best.take(exact_product<S>(x + (long long)input * S::D, from, shared), row);
        }
      }
    }
  }
  if (threadIdx.x == 0) {
    products[input * S::PARTS + part] = best.product;
    indices[input * S::PARTS + part] = best.row;
  }
  if (!is_last_of<S, S::M>(input, S::PARTS)) return;
  best = {lowest(), -1};
  if (threadIdx.x < S::PARTS) {
    const int at = input * S::PARTS + threadIdx.x;
    best = {read_published(products + at), read_published(indices + at)};
  }
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) best.take_of_lane(mask);
  if (lane == 0) of_warps[warp] = best.product, rows_of_warps[warp] = best.row;
  barrier();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int of = 0; of < WARPS; ++of) best.take(of_warps[of], rows_of_warps[of]);
  index[input] = best.row, product[input] = best.product;
}
