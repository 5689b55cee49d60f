// A few rows of digits times one 4-bit matrix, which is read once, in place, by the warps of a block.
//
// Turning a code into a float takes more instructions than a multiprocessor has while the next one
// comes from memory. So products are of integers: a code picks one of 16 bytes, an input is the sum
// of DIGITS signed bytes, and a group of 32 rows, whose scale is an integer too, adds up exactly.
// What a block of groups has come to is scaled in float32.
//
// A word of codes is two rows of four columns. Half of it picks, in this order, two rows of a column
// and two of the next, and so stands in the instruction: 16 such pairs of columns are the rows of its
// first operand, with 16 rows of the matrix. The inputs are columns of the second: four digits with
// zeros in the places of the other column, and the same four for that column.
//
// Teams and copies under way are those of product.h. S has BLOCK, the rows of a block, UNIT, which
// divides it, those of a factor of the inputs, TERMS, the columns of the instruction that an input
// takes, twice its digits, and STAGES, one of which holds the scales of two blocks.
#pragma once

// Digits of inputs: `digits[row][digit][k]`, the highest first, and for each unit of k what they are
// multiplied by, `factors[row][unit]`.
struct Digits {
  const signed char* digits;
  const float* factors;

  // What a lane multiplies: of 32 rows a digit of eight.
  template <class S, int TILES>
  struct Mine {
    const signed char* x[TILES];
    const float* factors[TILES];

    // Every thread of the block calls it, with its team's share.
    DEVICE Mine(const Rows<Digits>& inputs, int) {
      constexpr int DIGITS = S::TERMS / 2;
      const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const int slot = 4 * n + g % 4, input = slot / DIGITS, summed = (4 * n + 2 * (t % 2)) / DIGITS;
        x[n] = nullptr, factors[n] = nullptr;
        if (input < inputs.count)
          x[n] = inputs.x.digits + ((long long)inputs.rows[input] * DIGITS + slot % DIGITS) * S::K + 8 * t;
        if (summed < inputs.count)
          factors[n] = inputs.x.factors + (long long)inputs.rows[summed] * (S::K / S::UNIT);
      }
    }

    DEVICE void read(int n, unsigned tile, unsigned (&four)[2]) const {
      four[0] = four[1] = 0;
      if (x[n] == nullptr) return;
      const uint2 loaded = *reinterpret_cast<const uint2*>(x[n] + 32 * tile);
      four[0] = loaded.x, four[1] = loaded.y;
    }

    DEVICE float factor(int n, unsigned unit) const { return factors[n] == nullptr ? 0 : factors[n][unit]; }
  };
};

// The scales of a group, of the two in each word of columns that a lane has sums of, times 4.
//
// `rows` has the six rows of bytes of a block for the lane's columns, `apart` bytes from each other;
// `mine` picks those of two words that the sums are of, the first or second of each pair.
template <int WORDS>
DEVICE void scales_of_group(int (&scales)[2 * WORDS], Shared rows, unsigned apart, unsigned group, unsigned mine) {
  unsigned low[WORDS], high[WORDS];
  read_shared(rows + group / 2 * apart, low);
  read_shared(rows + (4 + group / 4) * apart, high);
#pragma unroll
  for (int i = 0; i < WORDS; i += 2) {
    const unsigned of_low = pick_signed(low[i], low[i + 1], mine);
    const unsigned of_high = pick_signed(high[i], high[i + 1], mine);
    // Six bits, 32 more than the scale, are its two's complement but for the first; times 4 they are
    // that of a byte.
    const unsigned four = (group % 2 ? of_low >> 2 : of_low << 2) & 0x3c3c3c3cu;
    const unsigned all = (four | 0x80808080u) ^ (of_high << (6 - group % 4 * 2) & 0xc0c0c0c0u);
    scales[2 * i] = pick_signed(all, all, 0x8880u);
    scales[2 * i + 1] = pick_signed(all, all, 0x9991u);
    scales[2 * i + 2] = pick_signed(all, all, 0xaaa2u);
    scales[2 * i + 3] = pick_signed(all, all, 0xbbb3u);
  }
}

// One matrix of a stack of 4-bit ones, or the stack.
struct Int4Matrix {
  const unsigned char* values;
  const unsigned char* subscales;
  const unsigned short* scales;

  // [columns of a word][tile of inputs][first pair of columns, second; for each two of sums].
  template <class S, int TILES>
  using Total = float[S::BYTES / 8][TILES][4];

  template <class S>
  DEVICE Int4Matrix of(long long number) const {
    constexpr int BLOCKS = S::K / S::BLOCK;
    return {values + number * (S::K / 2) * S::N, subscales + number * (6 * BLOCKS) * S::N,
            scales + number * BLOCKS * S::N};
  }

  // The products of a share of the rows, as `multiply`.
  template <class S, int TILES, class X>
  DEVICE void multiply_by(float (&total)[S::BYTES / 8][TILES][4], int column, const Rows<X>& inputs,
                          int share, unsigned char* ring) const;

  template <class S, int TILES, class Visit>
  static DEVICE void visit(const float (&sums)[S::BYTES / 8][TILES][4], int column, int count,
                           Visit visit);
};

template <class S, int TILES, class X>
DEVICE void Int4Matrix::multiply_by(float (&total)[S::BYTES / 8][TILES][4], int column,
                                    const Rows<X>& inputs, int share, unsigned char* ring) const {
  constexpr int GROUPS = S::BLOCK / 32, TILES_OF_K = S::K / 32, IN_UNIT = S::UNIT / 32;
  constexpr int WORDS = S::BYTES / 4, OF_TEAM = Widths<S>::OF_TEAM, IN_ROW = OF_TEAM / S::BYTES;
  constexpr int STAGES = S::STAGES - 1, OF_STAGE = 16 * OF_TEAM;
  // Few products add up both picks of a code more quickly than bytes are added.
  constexpr int PICKS = TILES <= 4 ? 2 : 1;
  static_assert(STAGES <= GROUPS + 1, "scales are copied in the place of others that are read");
  // Without a sign, since a part of a number with one takes more instructions.
  const unsigned begin = (unsigned)((long long)share * TILES_OF_K / S::SHARES);
  const unsigned end = (unsigned)((long long)(share + 1) * TILES_OF_K / S::SHARES);
  const Place<S> place;
  const int g = place.lane / 4, t = place.lane % 4;
  const int own = place.member * Widths<S>::OF_WARP + g * S::BYTES;
  // A thread copies four pieces of a tile, each BYTES of one of every fourth row.
  const int thread = threadIdx.x % Widths<S>::THREADS, piece = thread % IN_ROW;
  const int first_row = thread / IN_ROW, wanted = column + piece * S::BYTES;
  // Outside, the last columns are read again and their sums dropped.
  const int from = wanted < S::N ? wanted : S::N - S::BYTES;
  // Pieces change places within a row, so that rows that a warp reads at once are in different banks.
  Shared to[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    to[i] = kept(shared_place(ring) + ((first_row + 4 * i) * IN_ROW + (piece ^ 2 * i)) * S::BYTES);
  const Shared of_blocks = shared_place(ring) + STAGES * OF_STAGE;
  const auto start = [&](unsigned tile, int stage) {
    if (tile < end) {
      const unsigned char* rows = values + (long long)(16 * tile + first_row) * S::N + from;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        start_copy<S::BYTES>(to[i] + stage * OF_STAGE, rows + (long long)(4 * i) * S::N);
      if (tile % GROUPS == 0 || tile == begin) {
        // Six rows of groups' scales, and two that hold the block's, of two bytes.
        const unsigned block = tile / GROUPS;
        const Shared place = of_blocks + block % 2 * (OF_STAGE / 2) + thread * S::BYTES;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = first_row + 4 * i;
          const unsigned char* bytes = subscales + (long long)(6 * block + row) * S::N + from;
          if (row >= 6) {
            const int of_half = column + ((row - 6) * IN_ROW + piece) * (S::BYTES / 2);
            const int at = of_half < S::N ? of_half : S::N - S::BYTES / 2;
            bytes = reinterpret_cast<const unsigned char*>(scales + (long long)block * S::N + at);
          }
          start_copy<S::BYTES>(place + 4 * i * OF_TEAM, bytes);
        }
      }
    }
    end_group();
  };
  // Before anything else, so that weights are on their way while it is made ready.
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) start(begin + stage, stage);
  const typename X::template Mine<S, TILES> x(inputs, share);
  const Book book;
  const Shared read_from = kept(
      shared_place(ring) + (4 * t * IN_ROW + (place.member * 8 + g ^ 2 * t)) * S::BYTES);
  const Shared of_own = kept(of_blocks + own), of_mine = kept(of_blocks + 6 * OF_TEAM + 2 * (own + t / 2));

  // Digits of two rows, with zeros for the other column of a pair.
  const unsigned first_pair = kept(g < 4 ? 0x4410u : 0x1044u);
  const unsigned second_pair = kept(g < 4 ? 0x4432u : 0x3244u), mine = kept(t >= 2 ? 0x7531u : 0x6420u);
#pragma unroll
  for (int p = 0; p < WORDS / 2; ++p)
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[p][n][i] = 0;
  int of_block[WORDS][TILES][4] = {};
  int stage = 0, free = STAGES - 1;
  for (unsigned tile = begin; tile < end; ++tile) {
    const unsigned block = tile / GROUPS, group = tile % GROUPS;
    unsigned four[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; ++n) x.read(n, tile, four[n]);
    wait_for_all_but<STAGES - 2>();
    // What the others have copied is there, and nobody reads the tile before any more.
    team_barrier<Widths<S>::THREADS>(place.team);
    unsigned words[4][WORDS];
#pragma unroll
    for (int i = 0; i < 4; ++i) read_shared(read_from + stage * OF_STAGE + i * OF_TEAM, words[i]);
    const Shared rows_of_scales = of_own + block % 2 * (OF_STAGE / 2);
    int scale[2 * WORDS];
    scales_of_group<WORDS>(scale, rows_of_scales, OF_TEAM, group, mine);
    start(tile + STAGES - 1, free);
    free = stage;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    unsigned b[TILES][2][2];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b[n][i][0] = pick_signed(four[n][i], 0, first_pair);
        b[n][i][1] = pick_signed(four[n][i], 0, second_pair);
      }
    }
#pragma unroll
    for (int p = 0; p < WORDS; ++p) {
      unsigned a[2][PICKS][4];  // [rows][pick][of the instruction]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned lower[2], upper[2];
        book.read(words[i][p], lower, upper);
#pragma unroll
        for (int pick = 0; pick < PICKS; ++pick) {
          a[i / 2][pick][i % 2 * 2] = PICKS == 2 ? lower[pick] : Book::together(lower);
          a[i / 2][pick][i % 2 * 2 + 1] = PICKS == 2 ? upper[pick] : Book::together(upper);
        }
      }
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        int sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 2 * PICKS; ++i)
          multiply_tile_of_bytes(sum, a[i / PICKS][i % PICKS], b[n][i / PICKS]);
#pragma unroll
        for (int i = 0; i < 4; ++i) of_block[p][n][i] += sum[i] * scale[2 * p + i / 2];
      }
    }
    if ((tile + 1) % IN_UNIT == 0 || tile + 1 == end) {
      float factor[TILES];
#pragma unroll
      for (int n = 0; n < TILES; ++n) factor[n] = x.factor(n, tile / IN_UNIT);
#pragma unroll
      for (int p = 0; p < WORDS; ++p) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Shared place = of_mine + block % 2 * (OF_STAGE / 2) + 8 * p + 4 * half;
          const float scale = float_of_half(read_short(place));
#pragma unroll
          for (int n = 0; n < TILES; ++n) {
            // Of two digits the first counts 256 times.
            const float both =
                (float)of_block[p][n][2 * half] * 256 + (float)of_block[p][n][2 * half + 1];
            total[p / 2][n][p % 2 * 2 + half] += both * (scale * factor[n]);
            of_block[p][n][2 * half] = of_block[p][n][2 * half + 1] = 0;
          }
        }
      }
    }
  }
}

template <class S, int TILES, class Visit>
DEVICE void Int4Matrix::visit(const float (&sums)[S::BYTES / 8][TILES][4], int column, int count,
                              Visit visit) {
  // A lane has sums of every second of its columns, the lane two further those between. Of four digits the
  // next lane has the lower two, and gets half of the columns.
  constexpr int HALF = S::TERMS == 8 ? S::BYTES / 4 : S::BYTES / 2, EACH = HALF / 2;
  const Place<S> place;
  const int g = place.lane / 4, t = place.lane % 4;
  const bool is_odd = t >= 2, is_next = S::TERMS == 8 && t % 2 == 1;
  const int mine = column + place.member * Widths<S>::OF_WARP + g * S::BYTES;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const auto sum = [&](int pair) { return sums[pair / 4][n][pair % 4]; };
    float own[HALF], values[HALF];
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      own[i] = sum(i);
      if constexpr (S::TERMS == 8) {
        const float second = sum(i + HALF), other = shuffle_xor(is_next ? sum(i) : second, 1);
        own[i] = is_next ? other * 65536 + second : sum(i) * 65536 + other;
      }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const float kept = is_odd ? own[i + EACH] : own[i];
      const float other = shuffle_xor(is_odd ? own[i] : own[i + EACH], 2);
      values[2 * i] = is_odd ? other : kept, values[2 * i + 1] = is_odd ? kept : other;
    }
    const int input = S::TERMS == 8 ? n : 2 * n + t % 2;
    const int at = mine + is_next * 2 * HALF + is_odd * HALF;
    if (at < S::N && input < count) visit(at, input, values);
  }
}
