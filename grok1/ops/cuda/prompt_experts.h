// The experts of many tokens, whose rows are sorted by expert, in two launches: gate, up and GELU; down.
//
// The weight goes from int8 to bfloat16 in registers, on its way to the tensor cores: no copy of it is
// written to memory. A block multiplies two slabs of 128 columns, one a group of four warps, by up to
// 128 rows of an expert, which both groups share. 64 rows of the slabs and as many numbers of the
// inputs are a stage; stages that come next are copied while one is multiplied.
//
// Lane (g, t) = (lane / 4, lane % 4) of warp w turns rows 2t, 2t + 1, 2t + 8 and 2t + 9 of 16 of
// columns 32w + 4g to 32w + 4g + 3: two products of 64 columns, whose order does not matter.
//
// Dimension key: R sorted row, E expert, K rows of the matrix, N columns, G groups of rows with a scale
// for each column.
#pragma once

constexpr int SLAB = 128, DEPTH = 64, MOST_TOKENS = 128;
constexpr int SLAB_BYTES = DEPTH * SLAB, TILE_BYTES = MOST_TOKENS * DEPTH * 2;
constexpr int STAGE_BYTES = 2 * SLAB_BYTES + TILE_BYTES;

// Which rows and columns a block multiplies: the tiles of an expert's rows are neighbours, so that
// they read the same weights at about the same time.
struct PromptTile {
  int expert, first, count, column;
};

template <class S>
DEVICE bool find_tile(PromptTile& tile, const int* first_rows, const int* counts) {
  int left = blockIdx.x;
  for (int expert = 0; expert < S::E; ++expert) {
    const int rows = counts[expert], tiles = (rows + MOST_TOKENS - 1) / MOST_TOKENS;
    if (left < tiles * S::COLUMN_TILES) {
      const int before = left % tiles * MOST_TOKENS;
      tile.expert = expert, tile.column = left / tiles;
      tile.first = first_rows[expert] + before;
      tile.count = rows - before < MOST_TOKENS ? rows - before : MOST_TOKENS;
      return true;
    }
    left -= tiles * S::COLUMN_TILES;
  }
  return false;
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// [product][8 tokens][of the instruction].
template <int TOKENS>
using PromptSums = float[2][TOKENS / 8][4];

// The products of one slab. S has K, N, G, STAGES. `matrix` and `scales` are of the slab's matrix,
// `column` is the slab's first, x the first input. Every thread of the block calls it.
template <class S, int TOKENS>
DEVICE void multiply_slab(PromptSums<TOKENS>& sums, const signed char* matrix,
                          const unsigned short* scales, int column, const unsigned short* x, int count,
                          Shared ring) {
  constexpr int TILES = S::K / DEPTH, TILES_OF_GROUP = TILES / S::G;
  const Converter converter;
  const int thread = threadIdx.x % SLAB, group = threadIdx.x / SLAB;
  const int lane = thread % 32, g = lane / 4, t = lane % 4;

  // Outside, the last columns and rows are read again and their sums dropped.
  const int row = thread / 8, wanted = column + thread % 8 * 16;
  const signed char* from = matrix + (long long)row * S::N + (wanted < S::N ? wanted : S::N - 16);
  // Pieces of 32 bytes change places, so that the rows that a warp reads at once are in different banks.
  const Shared to = ring + group * SLAB_BYTES + row * SLAB + ((thread % 8 / 2 ^ row / 2 % 4) * 32) +
                    thread % 2 * 16;
  const int token = threadIdx.x / 8, piece = threadIdx.x % 8;
  const Shared token_to = ring + 2 * SLAB_BYTES + token * 128 + (piece ^ token % 8) * 16;
  const auto start = [&](int tile, int stage) {
    if (tile < TILES) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        start_copy<16>(to + stage * STAGE_BYTES + i * 16 * SLAB,
                       from + ((long long)tile * DEPTH + i * 16) * S::N);
#pragma unroll
      for (int i = 0; i < TOKENS / 32; ++i) {
        const int of = token + 32 * i < count ? token + 32 * i : count - 1;
        start_copy<16>(token_to + stage * STAGE_BYTES + i * 32 * 128,
                       x + (long long)of * S::K + tile * DEPTH + piece * 8);
      }
    }
    end_group();
  };

  const Shared words_from = ring + group * SLAB_BYTES + 2 * t * SLAB + (thread / 32 ^ t) * 32 + 4 * g;
  const int mine = column + thread / 32 * 32 + 4 * g;
  unsigned factors[4];
  const auto convert = [&](Shared at, unsigned (&a)[2][4]) {
    unsigned words[4][1];
#pragma unroll
    for (int i = 0; i < 4; ++i) read_shared(at + (i % 2 + i / 2 * 8) * SLAB, words[i]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int byte = i / 4 * 2 + i % 2, pair = i % 4 / 2 * 2;
      unsigned both = converter.pair_of(words[pair][0], words[pair + 1][0], byte);
      if (S::G > 1) both = multiply_add_bfloats(both, factors[byte], 0x80008000u);
      a[i / 4][i % 4] = both;
    }
  };

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] = 0;
#pragma unroll
  for (int stage = 0; stage < S::STAGES - 1; ++stage) start(stage, stage);
  const auto meet = [&](auto under_way) {
    wait_for_all_but<decltype(under_way)::value>();
    show_tiles();
    barrier();
  };
  meet(Count<S::STAGES - 2>());
  int stage = 0, free = S::STAGES - 1;
  unsigned a[2][2][4];
  for (int tile = 0; tile < TILES; ++tile) {
    if (S::G > 1 && tile % TILES_OF_GROUP == 0) {
      const unsigned short* of = scales + (long long)(tile / TILES_OF_GROUP) * S::N + mine;
#pragma unroll
      for (int i = 0; i < 4; ++i) factors[i] = mine + i < S::N ? of[i] * 0x10001u : 0;
    }
    const Shared words = words_from + stage * STAGE_BYTES;
    const Shared inputs = ring + stage * STAGE_BYTES + 2 * SLAB_BYTES;
#pragma unroll
    for (int step = 0; step < DEPTH / 16; ++step) {
      convert(words + step * 16 * SLAB, a[step % 2]);
      begin_products();
#pragma unroll
      for (int i = 0; i < 2; ++i) start_product<TOKENS>(sums[i], a[step % 2][i], inputs + step * 32);
      end_products();
      wait_for_products<1>();
      if (step == 1) {
        // While products are under way: what all have copied of the next tile is there, and nobody
        // multiplies the one before any more, whose place another takes.
        meet(Count<S::STAGES - 3>());
        start(tile + S::STAGES - 1, free);
      }
    }
    stage = stage + 1 == S::STAGES ? 0 : stage + 1;
    free = free + 1 == S::STAGES ? 0 : free + 1;
  }
  wait_for_products<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) settle(sums[i][j][k]);
  if (S::G == 1) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float factor = mine + c < S::N ? float_of_bits((unsigned)scales[mine + c] << 16) : 0;
#pragma unroll
      for (int j = 0; j < TOKENS / 8; ++j) {
        sums[c / 2][j][c % 2 * 2] *= factor;
        sums[c / 2][j][c % 2 * 2 + 1] *= factor;
      }
    }
  }
}

// Calls run(Count<n>()) for the fewest tokens that a product can have.
template <class Run>
DEVICE void with_tokens(int count, Run run) {
  if (count <= 32) {
    run(Count<32>());
  } else if (count <= 64) {
    run(Count<64>());
  } else if (count <= 96) {
    run(Count<96>());
  } else {
    run(Count<128>());
  }
}

DEVICE float quick_gelu(float x) {  // x / (1 + exp(-2u)), the same as its tanh form
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x * reciprocal(1 + power_of_two(-2 * 1.4426950408889634f * u));
}

struct alignas(8) FourBfloats {
  unsigned pairs[2];
};

struct alignas(16) FourFloats {
  float values[4];
};

// hidden[row] = gelu(x gate) * (x up), in bfloat16. One group of warps multiplies by gate, the other
// by up; each then finishes half of the tokens. Grid: tiles.
template <class S>
DEVICE void prompt_gate_up(const unsigned short* x, const signed char* gate,
                           const unsigned short* gate_scales, const signed char* up,
                           const unsigned short* up_scales, const int* layer, const int* first_rows,
                           const int* counts, unsigned short* hidden) {
  DYNAMIC_SHARED(memory);
  const Shared ring = tiles_place(memory);
  PromptTile tile;
  if (!find_tile<S>(tile, first_rows, counts)) return;
  const int thread = threadIdx.x % SLAB, lane = thread % 32;
  const bool is_up = threadIdx.x >= SLAB;
  const long long expert = (long long)layer[0] * S::E + tile.expert;
  const int column = tile.column * SLAB;
  const signed char* matrix = (is_up ? up : gate) + expert * S::K * S::N;
  const unsigned short* scales = (is_up ? up_scales : gate_scales) + expert * S::G * S::N;
  with_tokens(tile.count, [&](auto tokens) {
    constexpr int TOKENS = decltype(tokens)::value, HALF = TOKENS / 16;
    PromptSums<TOKENS> sums;
    multiply_slab<S, TOKENS>(sums, matrix, scales, column, x + (long long)tile.first * S::K, tile.count,
                             ring);
    barrier();
    // What the other group needs: of each thread the sums of half of the tokens.
    FourFloats* given = reinterpret_cast<FourFloats*>(memory);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < HALF; ++j) {
        FourFloats of;
#pragma unroll
        for (int k = 0; k < 4; ++k) of.values[k] = is_up ? sums[i][j][k] : sums[i][j + HALF][k];
        given[((is_up * 2 + i) * HALF + j) * SLAB + thread] = of;
      }
    barrier();
    const int at = column + thread / 32 * 32 + lane / 4 * 4;
    if (at >= S::N) return;
#pragma unroll
    for (int j = 0; j < HALF; ++j) {
      float numbers[2][4];  // [token][column]
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const FourFloats others = given[((!is_up * 2 + i) * HALF + j) * SLAB + thread];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float mine = is_up ? sums[i][j + HALF][k] : sums[i][j][k];
          const float of_gate = is_up ? others.values[k] : mine;
          numbers[k % 2][2 * i + k / 2] = quick_gelu(of_gate) * (is_up ? mine : others.values[k]);
        }
      }
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int token = 8 * (is_up ? j + HALF : j) + 2 * (lane % 4) + next;
        if (token >= tile.count) continue;
        const float(&four)[4] = numbers[next];
        *reinterpret_cast<FourBfloats*>(hidden + (long long)(tile.first + token) * S::N + at) =
            FourBfloats{{bfloats(four[0], four[1]), bfloats(four[2], four[3])}};
      }
    }
  });
}

// out[row] = hidden down. Grid: tiles.
template <class S>
DEVICE void prompt_down(const unsigned short* hidden, const signed char* down,
                        const unsigned short* down_scales, const int* layer, const int* first_rows,
                        const int* counts, float* out) {
  DYNAMIC_SHARED(memory);
  const Shared ring = tiles_place(memory);
  PromptTile tile;
  if (!find_tile<S>(tile, first_rows, counts)) return;
  const int thread = threadIdx.x % SLAB, lane = thread % 32;
  const long long expert = (long long)layer[0] * S::E + tile.expert;
  const int column = (2 * tile.column + threadIdx.x / SLAB) * SLAB;
  with_tokens(tile.count, [&](auto tokens) {
    constexpr int TOKENS = decltype(tokens)::value;
    PromptSums<TOKENS> sums;
    multiply_slab<S, TOKENS>(sums, down + expert * S::K * S::N, down_scales + expert * S::G * S::N, column,
                             hidden + (long long)tile.first * S::K, tile.count, ring);
    const int at = column + thread / 32 * 32 + lane / 4 * 4;
    if (at >= S::N) return;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int token = 8 * j + 2 * (lane % 4) + next;
        if (token >= tile.count) continue;
        *reinterpret_cast<FourFloats*>(out + (long long)(tile.first + token) * S::N + at) = FourFloats{
            {sums[0][j][next], sums[0][j][2 + next], sums[1][j][next], sums[1][j][2 + next]}};
      }
    }
  });
}
