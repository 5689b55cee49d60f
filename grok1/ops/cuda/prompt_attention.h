// Attention over the filled cache for many queries, on the tensor cores: float16, sums in float32.
//
// The queries of a key head are rows of a matrix, position after position, in each the G that share the
// head. A warp has 16 of them; the warps of a block go through the keys together, a tile at a time, up
// to the last that any of their rows sees, while the next tile is on its way to shared memory. Weights
// are relative to the largest logit so far, since float16 does not hold exp(-2 * CAP).
//
// Lane (g, t) = (lane / 4, lane % 4) has rows g and g + 8 of its warp, and of them columns 2t and 2t + 1
// of every 8, as the instruction lays them out. What the first product gives is so what the second takes.
//
// S has R, T, C, G, H, B, CAPACITY, SCALE, CAP, KEYS (of a tile), WARPS.
#pragma once

struct alignas(8) TwoFloats {
  float first, second;
};

// A tile of keys or values in shared memory. Of a row's chunks of 16 bytes, c lies at c ^ row % 8: eight
// rows of a chunk are then in different banks. A tile begins at a multiple of ROW, so that an even chunk
// more is an exclusive or of its place.
template <class S>
struct KeyTile {
  static constexpr int CHUNKS = S::H / 8, ROW = 16 * CHUNKS, BYTES = S::KEYS * ROW;

  static DEVICE int place(int row, int chunk) { return row * ROW + (chunk ^ row % 8) * 16; }

  // Starts the copy of rows from `begin` on. Those after `last` may be no numbers, and are zeros here.
  static DEVICE void start(Shared tile, const unsigned short* rows, int begin, int last) {
    constexpr int AT_ONCE = 32 * S::WARPS / CHUNKS;  // a multiple of 8
    const int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const unsigned short* from = rows + (long long)(begin + first) * S::H + chunk * 8;
    const Shared to = tile + place(first, chunk);
#pragma unroll
    for (int i = 0; i < (S::KEYS + AT_ONCE - 1) / AT_ONCE; ++i)
      if (S::KEYS % AT_ONCE == 0 || first + i * AT_ONCE < S::KEYS)
        start_copy_or_zeros(to + i * AT_ONCE * ROW, from + i * AT_ONCE * S::H,
                            begin + first + i * AT_ONCE <= last);
  }
};

// Logits in units of log(2), bounded by LIMIT: tanh(z) is 1 - 2 / (exp(2z) + 1).
template <class S>
struct Bounded {
  static constexpr float OF_E = 1.4426950408889634f, LIMIT = S::CAP * OF_E;
  static constexpr float FACTOR = 2 * OF_E * S::SCALE / S::CAP;

  static DEVICE float less(float product, float offset) {
    return (LIMIT - offset) - 2 * LIMIT * reciprocal(power_of_two(product * FACTOR) + 1);
  }
};

// A warp's rows: what they see, the largest logit so far, and their sums.
template <class S>
struct PromptRows {
  static constexpr int STEPS = S::H / 16, COLUMNS = S::KEYS / 8, SUMS = S::H / 8;
  unsigned query[STEPS][4];
  float sums[SUMS][4], total[2], top[2];
  int upto[2];

  // Products with a tile of keys.
  DEVICE void multiply(float (&products)[COLUMNS][4], Shared shared, int keys) const {
    const int lane = threadIdx.x % 32;
    const int place = keys + KeyTile<S>::place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) products[j][i] = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Shared from = shared + (place ^ step * 32);
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 2) {
        unsigned words[4];
        load_matrices(words, from + j * 8 * KeyTile<S>::ROW);
        multiply_tile_of_halves(products[j], query[step], words[0], words[1]);
        multiply_tile_of_halves(products[j + 1], query[step], words[2], words[3]);
      }
    }
  }

  // Whether row i sees what is in column j of a tile, of the lane's numbers the first or second.
  DEVICE bool sees(int i, int begin, int j) const {
    return begin + 8 * j + 2 * (threadIdx.x % 4) + i % 2 <= upto[i / 2];
  }

  // Turns products into weights; at a border of what the rows see, some are 0.
  DEVICE void weigh(float (&products)[COLUMNS][4], int begin, bool is_border) {
    const float none = -float_of_bits(0x7f800000u);
    if (is_border) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!sees(i, begin, j)) products[j][i] = none;
    }
    float before[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = none;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
        most = fmaxf(most, fmaxf(products[j][2 * half], products[j][2 * half + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      before[half] = top[half];
      top[half] = fmaxf(top[half], Bounded<S>::less(most, 0));
    }
    if (vote(top[0] > before[0] || top[1] > before[1])) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shrink = power_of_two(before[half] - top[half]);
        total[half] *= shrink;
#pragma unroll
        for (int j = 0; j < SUMS; ++j) {
          sums[j][2 * half] *= shrink;
          sums[j][2 * half + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        products[j][i] = power_of_two(Bounded<S>::less(products[j][i], top[i / 2]));
    if (is_border) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!sees(i, begin, j)) products[j][i] = 0;
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i / 2] += products[j][i];
  }

  // Adds the weighted values of a tile.
  DEVICE void add(const float (&weights)[COLUMNS][4], Shared shared, int values) {
    const int lane = threadIdx.x % 32;
    const int place = values + KeyTile<S>::place(lane % 16, lane / 16);
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 2) {
      const unsigned pairs[4] = {halves(weights[j][0], weights[j][1]), halves(weights[j][2], weights[j][3]),
                                 halves(weights[j + 1][0], weights[j + 1][1]),
                                 halves(weights[j + 1][2], weights[j + 1][3])};
#pragma unroll
      for (int column = 0; column < SUMS; column += 2) {
        unsigned words[4];
        load_transposed(words, shared + (place ^ column * 16) + j * 8 * KeyTile<S>::ROW);
        multiply_tile_of_halves(sums[column], pairs, words[0], words[1]);
        multiply_tile_of_halves(sums[column + 1], pairs, words[2], words[3]);
      }
    }
  }
};

// Grid: blocks of rows times C, those that see most first; R.
template <class S>
DEVICE void attend_prompt(const unsigned short* query, const unsigned short* keys,
                          const unsigned short* values, const int* layer, const int* slots,
                          const int* positions, float* out) {
  using Tile = KeyTile<S>;
  constexpr int M = S::G * S::T, OF_BLOCK = 16 * S::WARPS, BLOCKS = (M + OF_BLOCK - 1) / OF_BLOCK;
  DYNAMIC_SHARED(memory);
  const Shared shared = shared_place(memory);
  const int lane = threadIdx.x % 32, head = blockIdx.x % S::C, row = blockIdx.y, slot = slots[row];
  const int first = (BLOCKS - 1 - blockIdx.x / S::C) * OF_BLOCK;
  const int behind = first + OF_BLOCK < M ? first + OF_BLOCK : M;
  const int number = first + threadIdx.x / 32 * 16 + lane / 4;

  float latest = -1;
  for (int t = first / S::G + lane; t <= (behind - 1) / S::G; t += 32)
    latest = fmaxf(latest, (float)positions[row * S::T + t]);
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) latest = fmaxf(latest, shuffle_xor(latest, mask));
  int last = (int)fminf(latest, (float)(S::CAPACITY - 1));
  if (slot < 0 || slot >= S::B) last = -1;

  PromptRows<S> rows;
  int vectors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = number + 8 * half < M ? number + 8 * half : M - 1;
    const int position = positions[row * S::T + at / S::G];
    rows.upto[half] = position < last ? position : last;
    rows.top[half] = -Bounded<S>::LIMIT;  // the least it can be
    rows.total[half] = 0;
    vectors[half] = ((row * S::T + at / S::G) * S::C + head) * S::G + at % S::G;
    const unsigned short* from = query + (long long)vectors[half] * S::H + 2 * (lane % 4);
#pragma unroll
    for (int step = 0; step < PromptRows<S>::STEPS; ++step)
#pragma unroll
      for (int part = 0; part < 2; ++part)
        rows.query[step][2 * part + half] = *(const unsigned*)(from + 16 * step + 8 * part);
  }
#pragma unroll
  for (int j = 0; j < PromptRows<S>::SUMS; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.sums[j][i] = 0;
  float least = (float)(rows.upto[0] < rows.upto[1] ? rows.upto[0] : rows.upto[1]);
  float most = (float)(rows.upto[0] < rows.upto[1] ? rows.upto[1] : rows.upto[0]);
#pragma unroll
  for (int mask = 16; mask >= 4; mask /= 2) {
    least = fminf(least, shuffle_xor(least, mask));
    most = fmaxf(most, shuffle_xor(most, mask));
  }

  const long long heads = ((long long)layer[0] * S::B + (last < 0 ? 0 : slot)) * S::C + head;
  const unsigned short* key_rows = keys + heads * S::CAPACITY * S::H;
  const unsigned short* value_rows = values + heads * S::CAPACITY * S::H;
  const int tiles = (last + S::KEYS) / S::KEYS;
  for (int next = 0; next <= tiles; ++next) {
    // Here every warp is done with the tile before the one that has come, whose place the next takes.
    wait_for_all_but<0>();
    barrier();
    if (next < tiles) {
      const Shared to = shared + next % 2 * 2 * Tile::BYTES;
      Tile::start(to, key_rows, next * S::KEYS, last);
      Tile::start(to + Tile::BYTES, value_rows, next * S::KEYS, last);
      end_group();
    }
    const int begin = (next - 1) * S::KEYS;
    if (next == 0 || begin > (int)most) continue;
    const int tile = (next - 1) % 2 * 2 * Tile::BYTES;
    float products[PromptRows<S>::COLUMNS][4];
    rows.multiply(products, shared, tile);
    rows.weigh(products, begin, begin + S::KEYS - 1 > (int)least);
    rows.add(products, shared, tile + Tile::BYTES);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = rows.total[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    if (number + 8 * half >= M) continue;
    const float factor = last < 0 ? 0 : 1 / total;
    float* to = out + (long long)vectors[half] * S::H + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < PromptRows<S>::SUMS; ++j)
      *(TwoFloats*)(to + 8 * j) =
          TwoFloats{rows.sums[j][2 * half] * factor, rows.sums[j][2 * half + 1] * factor};
  }
}
