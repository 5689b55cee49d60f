// A few rows of floats times one int8 matrix, which is read once, in place, by the warps of a block.
//
// A warp multiplies on the tensor cores: 16 columns of the matrix are the rows of the instruction's
// first operand, the inputs are its 8 columns. An int8 is exact in bfloat16; an input is the sum of
// its TERMS, each a column of its own, so that float32 inputs cost no second pass over the weights.
// Lane (g, t) = (lane / 4, lane % 4) reads BYTES columns of rows 4t to 4t + 3 of 16: the order of k
// within a product does not matter, nor does that of columns.
//
// Dimension key: K rows of the matrix, N columns, G groups of rows with a scale for each column.
#pragma once

// Columns that a block multiplies; BYTES is 8 or 16.
template <int BYTES>
struct Columns {
  static constexpr int count = 8 * BYTES;
};

// Inputs that TILES of 8 columns hold: bfloat16 has one term; float32 two, which leave 2**-17 of it,
// or three and a zero, which leave nothing.
template <int TERMS, int TILES>
struct Inputs {
  static constexpr int count = 8 * TILES / TERMS;
};

// One term of four inputs, in pairs: each is what the ones before leave, rounded.
template <int TERMS>
DEVICE void term_of(const float (&x)[4], int term, unsigned (&pair)[2]) {
  float left[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = x[i];
#pragma unroll
  for (int before = 0; before < TERMS - 1; ++before) {
    if (before < term) {
      // The bits of a pair are taken apart, which no compiler takes for a conversion that it may drop.
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const unsigned high = bfloats(left[i], left[i + 1]);
        left[i] -= float_of_bits(high << 16);
        left[i + 1] -= float_of_bits(high & 0xffff0000u);
      }
    }
  }
  pair[0] = bfloats(left[0], left[1]);
  pair[1] = bfloats(left[2], left[3]);
}

// Two int8 of one column, from bytes `column` of two words, as bfloat16: |v| + 128, or v + 256 where
// the sign is set, less 128 or 256.
DEVICE unsigned pair_of_weights(unsigned row, unsigned next_row, int column) {
  const unsigned both = pick_bytes(row, next_row, 0x4400u + 0x1111u * column);
  const unsigned moved = (both & 0x007f007fu) | 0x43004300u;
  const unsigned offset = (both & 0x00800080u) | 0xc300c300u;
  return multiply_add_bfloats(moved, 0x3f803f80u, offset);
}

// The sums of a warp: [pair of columns][tile of inputs][of the instruction].
template <int BYTES, int TILES>
using Sums = float[BYTES / 2][TILES][4];

template <int BYTES, int TILES>
DEVICE void clear(Sums<BYTES, TILES>& sums) {
#pragma unroll
  for (int j = 0; j < BYTES / 2; ++j)
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][tile][i] = 0;
}

// Where the inputs of a block are: input i is row `rows[i]` of x, 0 <= i < count.
struct Rows {
  const float* x;
  const int* rows;
  int count;
};

// Adds the products of this warp's share of the rows of a matrix, each group's times its scales.
//
// S has K, N, G, BYTES, TILES, TERMS, UNROLL. `warp` of `warps` share the rows from tile `begin` to
// `end` of 16 rows; tiles do not cross groups.
template <class S>
DEVICE void multiply(Sums<S::BYTES, S::TILES>& total, const signed char* matrix,
                     const unsigned short* scales, int column, const Rows& inputs, int begin, int end) {
  constexpr int GROUP = S::K / S::G, IN_GROUP = (GROUP + 15) / 16, WORDS = S::BYTES / 4;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_column = column + g * S::BYTES;
  const bool is_inside = first_column < S::N;
  // Outside, the last columns are read again and their sums dropped.
  const signed char* mine = matrix + (is_inside ? first_column : S::N - S::BYTES);
  const int active = (inputs.count * S::TERMS + 7) / 8;
  const float* x[S::TILES];
#pragma unroll
  for (int tile = 0; tile < S::TILES; ++tile) {
    const int input = (8 * tile + g) / S::TERMS;
    x[tile] = input < inputs.count ? inputs.x + (long long)inputs.rows[input] * S::K : nullptr;
  }
  clear<S::BYTES, S::TILES>(total);
  while (begin < end) {
    const int group = begin / IN_GROUP, limit = (group + 1) * GROUP;
    const int stop = end < (group + 1) * IN_GROUP ? end : (group + 1) * IN_GROUP;
    Sums<S::BYTES, S::TILES> sums;
    clear<S::BYTES, S::TILES>(sums);
    for (int tile = begin; tile < stop; tile += S::UNROLL) {
      unsigned words[S::UNROLL][4][WORDS];
      const int first = group * GROUP + (tile - group * IN_GROUP) * 16 + 4 * t;
#pragma unroll
      for (int u = 0; u < S::UNROLL; ++u) {
        if (tile + u < stop) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            int k = first + 16 * u + i;
            if (GROUP % 16 != 0 && k >= limit) k = limit - 1;
            load_once(mine + (long long)k * S::N, words[u][i]);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < S::UNROLL; ++u) {
        if (tile + u >= stop) continue;
        unsigned b[S::TILES][2];
#pragma unroll
        for (int n = 0; n < S::TILES; ++n) {
          const int k = first + 16 * u;
          float four[4] = {0, 0, 0, 0};
          if (n < active && x[n] != nullptr) {
            if (GROUP % 16 == 0) {
              const float4 loaded = *reinterpret_cast<const float4*>(x[n] + k);
              four[0] = loaded.x, four[1] = loaded.y, four[2] = loaded.z, four[3] = loaded.w;
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i)
                if (k + i < limit) four[i] = x[n][k + i];
            }
          }
          term_of<S::TERMS>(four, (8 * n + g) % S::TERMS, b[n]);
        }
#pragma unroll
        for (int j = 0; j < S::BYTES / 2; ++j) {
          const int word = j / 2, at = 2 * j % 4;
          unsigned a[4];
          a[0] = pair_of_weights(words[u][0][word], words[u][1][word], at);
          a[1] = pair_of_weights(words[u][0][word], words[u][1][word], at + 1);
          a[2] = pair_of_weights(words[u][2][word], words[u][3][word], at);
          a[3] = pair_of_weights(words[u][2][word], words[u][3][word], at + 1);
#pragma unroll
          for (int n = 0; n < S::TILES; ++n)
            if (n < active) multiply_tile(sums[j][n], a, b[n]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < S::BYTES / 2; ++j) {
      const unsigned short* scale = scales + (long long)group * S::N + first_column + 2 * j;
      const float first_scale = is_inside ? float_of_bits((unsigned)scale[0] << 16) : 0;
      const float second_scale = is_inside ? float_of_bits((unsigned)scale[1] << 16) : 0;
#pragma unroll
      for (int n = 0; n < S::TILES; ++n) {
        total[j][n][0] += sums[j][n][0] * first_scale;
        total[j][n][1] += sums[j][n][1] * first_scale;
        total[j][n][2] += sums[j][n][2] * second_scale;
        total[j][n][3] += sums[j][n][3] * second_scale;
      }
    }
    begin = stop;
  }
}

// Adds up the sums of `S::WARPS` warps in the first of them, always in the same order. Every thread
// of the block calls it; `shared` has half of the warps' sums.
template <class S>
DEVICE void add_up(Sums<S::BYTES, S::TILES>& sums, int warp, float* shared) {
  constexpr int EACH = S::BYTES / 2 * S::TILES * 4;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = S::WARPS / 2; half >= 1; half /= 2) {
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        shared[((warp - half) * EACH + i) * 32 + lane] = sums[i / (4 * S::TILES)][i / 4 % S::TILES][i % 4];
    }
    barrier();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        sums[i / (4 * S::TILES)][i / 4 % S::TILES][i % 4] += shared[(warp * EACH + i) * 32 + lane];
    }
    barrier();
  }
}

// Calls visit(column, input, value) for what this lane has of a warp's sums, terms added up. All
// lanes of the warp call it.
template <class S, class Visit>
DEVICE void visit_sums(Sums<S::BYTES, S::TILES>& sums, int column, int count, Visit visit) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < S::BYTES / 2; ++j) {
#pragma unroll
    for (int n = 0; n < S::TILES; ++n) {
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int at = column + g * S::BYTES + 2 * j + next;
        const float first = sums[j][n][2 * next], second = sums[j][n][2 * next + 1];
        if constexpr (S::TERMS == 1) {
          const int input = 8 * n + 2 * t;
          if (at < S::N && input < count) visit(at, input, first);
          if (at < S::N && input + 1 < count) visit(at, input + 1, second);
        } else if constexpr (S::TERMS == 2) {
          const int input = 4 * n + t;
          if (at < S::N && input < count) visit(at, input, first + second);
        } else {
          const float both = first + second;
          const float all = both + shuffle_xor(both, 1);
          const int input = 2 * n + t / 2;
          if (at < S::N && input < count && t % 2 == 0) visit(at, input, all);
        }
      }
    }
  }
}
