// A few rows of floats times one int8 matrix, which is read once, in place, by the warps of a block.
//
// A warp multiplies on the tensor cores: 16 columns of the matrix are the rows of the instruction's
// first operand, the inputs are its 8 columns. An int8 is exact in bfloat16; an input is the sum of
// its TERMS, each a column of its own, so that float32 inputs cost no second pass over the weights.
// Lane (g, t) = (lane / 4, lane % 4) takes BYTES columns of rows 4t to 4t + 3 of 16: the order of k
// within a product does not matter, nor does that of columns.
//
// Memory is fast where what is read together lies together. So ACROSS warps are a team: side by side
// they bring 16 rows at a time to shared memory, each row in one piece, while earlier ones are
// multiplied. What is under way does not depend on how many warps there are, nor on registers.
//
// Dimension key: K rows of the matrix, N columns, G groups of rows with a scale for each column.
#pragma once

// Inputs that TILES of 8 columns hold: bfloat16 has one term; float32 two, which leave 2**-17 of it,
// or three and a zero, which leave nothing.
template <int TERMS, int TILES>
struct Inputs {
  static constexpr int count = 8 * TILES / TERMS;
  static constexpr int bytes = 8 * TILES * 16 * 2;  // of their terms, in a tile of 16 rows
};

// How wide warps and teams are.
template <class S>
struct Widths {
  static constexpr int OF_WARP = 8 * S::BYTES, OF_TEAM = S::ACROSS * OF_WARP;
  static constexpr int THREADS = 32 * S::ACROSS;  // of a team
  static constexpr int ALL_THREADS = S::TEAMS * THREADS;
  // Bytes of a team in shared memory: of weights, and of inputs where these are copied too.
  static constexpr int WEIGHTS = S::STAGES * 16 * OF_TEAM;
  static constexpr int RING = WEIGHTS + S::COPIES * S::STAGES * Inputs<S::TERMS, S::TILES>::bytes;
};

// A warp in its block.
template <class S>
struct Place {
  int team, member, lane;

  DEVICE Place() {
    team = threadIdx.x / Widths<S>::THREADS;
    member = threadIdx.x / 32 % S::ACROSS;
    lane = threadIdx.x % 32;
  }
};

// One term of four inputs, in pairs: each is what the ones before leave, rounded. Lanes take different
// terms in the same instructions: what a lane does not take off is picked as zero.
template <int TERMS>
struct Term {
  unsigned low[TERMS], high[TERMS];  // how the two of a pair are picked, for each term but the last

  DEVICE explicit Term(int term) {
#pragma unroll
    for (int before = 0; before < TERMS - 1; ++before) {
      low[before] = kept(before < term ? 0x1044u : 0x4444u);
      high[before] = kept(before < term ? 0x3244u : 0x4444u);
    }
  }

  DEVICE void of(float (&left)[4], unsigned (&pair)[2]) const {
#pragma unroll
    for (int before = 0; before < TERMS - 1; ++before) {
      // The bits of a pair are taken apart, which no compiler takes for a conversion that it may drop.
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const unsigned both = bfloats(left[i], left[i + 1]);
        left[i] -= float_of_bits(pick_signed(both, 0, low[before]));
        left[i + 1] -= float_of_bits(pick_signed(both, 0, high[before]));
      }
    }
    pair[0] = bfloats(left[0], left[1]);
    pair[1] = bfloats(left[2], left[3]);
  }
};

// Turns int8 into bfloat16: |v| + 128, or v + 256 where the sign is set, less 128 or 256.
struct Converter {
  unsigned plus, minus;

  DEVICE Converter() {
    plus = in_register(0x43004300u);
    minus = in_register(0xc300c300u);
  }

  // Two int8 of one column, from bytes `column` of two words.
  DEVICE unsigned pair_of(unsigned row, unsigned next_row, int column) const {
    const unsigned both = pick_bytes(row, next_row, 0x4400u + 0x1111u * column);
    const unsigned moved = (both & 0x007f007fu) | plus, offset = (both & 0x00800080u) | minus;
    return multiply_add_bfloats(moved, 0x3f803f80u, offset);
  }
};

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

// Calls run(j, first, second) with a group's scales of a lane's columns, by pairs; `column` is the lane's
// first.
template <class S, class Run>
DEVICE void with_scales(const unsigned short* scales, int column, Run run) {
#pragma unroll
  for (int i = 0; i < S::BYTES / 8; ++i) {
    uint4 eight = {0, 0, 0, 0};
    if (column < S::N) eight = *reinterpret_cast<const uint4*>(scales + column + 8 * i);
    const unsigned pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      run(4 * i + j, float_of_bits(pairs[j] << 16), float_of_bits(pairs[j] & 0xffff0000u));
  }
}

// Where the inputs of a block are: input i is row `rows[i]` of x, 0 <= i < count.
template <class X>
struct Rows {
  X x;
  const int* rows;
  int count;
};

// The products of a share of the rows of a matrix, each group's times its scales.
//
// S has K, N, G, BYTES, TERMS, STAGES, ACROSS, TEAMS, SHARES, of which `share` is one, and COPIES: whether
// inputs come in terms (terms.h), and to shared memory too, so that no turn of the loop waits for them and
// no warp makes terms that others make as well. `column` is the team's first. Rows are walked by tiles of
// 16, which do not cross groups. Every thread of the team calls it.
template <class S, int TILES, class X>
DEVICE void multiply(Sums<S::BYTES, TILES>& total, const signed char* matrix,
                     const unsigned short* scales, int column, const Rows<X>& inputs, int share,
                     unsigned char* ring) {
  constexpr int GROUP = S::K / S::G, IN_GROUP = (GROUP + 15) / 16, WORDS = S::BYTES / 4;
  constexpr int TILES_OF_K = IN_GROUP * S::G, IN_ROW = Widths<S>::OF_TEAM / S::BYTES;
  constexpr int OF_STAGE = 16 * Widths<S>::OF_TEAM;
  constexpr bool IS_OF_ONE_GROUP = S::SHARES % S::G == 0, IS_WHOLE = GROUP % 16 == 0;
  constexpr int PIECES = S::COPIES * Inputs<S::TERMS, TILES>::bytes / 16;
  static_assert(!S::COPIES || IS_WHOLE, "groups must be a multiple of 16 rows");
  const int begin = (int)((long long)share * TILES_OF_K / S::SHARES);
  const int end = (int)((long long)(share + 1) * TILES_OF_K / S::SHARES);
  const Place<S> place;
  // A thread copies four pieces of a tile, each BYTES of one of every fourth row.
  const int thread = threadIdx.x % Widths<S>::THREADS, piece = thread % IN_ROW;
  const int first_row = thread / IN_ROW, wanted = column + piece * S::BYTES;
  // Outside, the last columns are read again and their sums dropped.
  const signed char* from = matrix + (wanted < S::N ? wanted : S::N - S::BYTES);
  // Pieces change places within a row, so that rows that a warp reads at once are in different banks.
  Shared to[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    to[i] = kept(shared_place(ring) + ((first_row + 4 * i) * IN_ROW + (piece ^ 2 * i)) * S::BYTES);
  const Shared copied = shared_place(ring + Widths<S>::WEIGHTS);
  const auto start = [&](int tile, int stage) {
    if (tile < end) {
      const signed char* rows = from + (long long)(16 * tile + first_row) * S::N;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!IS_WHOLE) {
          const int in_group = tile % IN_GROUP * 16 + first_row + 4 * i;
          const int k = tile / IN_GROUP * GROUP + (in_group < GROUP ? in_group : GROUP - 1);
          rows = from + (long long)(k - 4 * i) * S::N;
        }
        start_copy<S::BYTES>(to[i] + stage * OF_STAGE, rows + (long long)(4 * i) * S::N);
      }
#pragma unroll
      for (int i = thread; i < PIECES; i += Widths<S>::THREADS) {
        const int input = i / 2 / S::TERMS, of_input = i % (2 * S::TERMS);
        const bool is_there = input < inputs.count;
        const long long row = is_there ? inputs.rows[input] : 0;
        start_copy_or_zeros(copied + stage * 16 * PIECES + 16 * i,
                            inputs.x + (row * S::K + 16 * tile) * S::TERMS + 8 * of_input, is_there);
      }
    }
    end_group();
  };
  // Before anything else, so that weights are on their way while it is made ready.
#pragma unroll
  for (int stage = 0; stage < S::STAGES - 1; ++stage) start(begin + stage, stage);
  const int g = place.lane / 4, t = place.lane % 4;
  const int mine = column + place.member * Widths<S>::OF_WARP + g * S::BYTES;
  if (S::TILES == 1 && IS_OF_ONE_GROUP && begin < end && mine < S::N)
    prefetch(scales + begin / IN_GROUP * S::N + mine);
  const Converter converter;
  const Shared read_from =
      kept(shared_place(ring) + (4 * t * IN_ROW + (place.member * 8 + g ^ 2 * t)) * S::BYTES);
  const Term<S::TERMS> term(g % S::TERMS);
  X x[TILES];
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const int input = (8 * n + g) / S::TERMS;
    x[n] = input < inputs.count ? inputs.x + (long long)inputs.rows[input] * S::K : nullptr;
  }
  const auto read_inputs = [&](int tile, auto& four) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      four[n][0] = four[n][1] = four[n][2] = four[n][3] = 0;
      if (x[n] == nullptr) continue;
      if constexpr (IS_WHOLE) {
        read_floats(x[n] + 16 * tile + 4 * t, four[n]);
      } else {
        const int first = tile % IN_GROUP * 16 + 4 * t;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + i < GROUP) four[n][i] = x[n][tile / IN_GROUP * GROUP + first + i];
      }
    }
  };
  clear<S::BYTES, TILES>(total);
  Sums<S::BYTES, TILES> of_group;
  clear<S::BYTES, TILES>(of_group);
  Sums<S::BYTES, TILES>& sums = IS_OF_ONE_GROUP ? total : of_group;
  int stage = 0, free = S::STAGES - 1;
  for (int tile = begin; tile < end; ++tile) {
    float four[TILES][4];
    if constexpr (!S::COPIES) read_inputs(tile, four);
    wait_for_all_but<S::STAGES - 2>();
    // What the others have copied is there, and nobody reads the tile before any more.
    team_barrier<Widths<S>::THREADS>(place.team);
    unsigned words[4][WORDS];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      read_shared(read_from + stage * OF_STAGE + i * IN_ROW * S::BYTES, words[i]);
    start(tile + S::STAGES - 1, free);
    unsigned b[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      if constexpr (S::COPIES) {
        read_shared(copied + stage * 16 * PIECES + (8 * n + g) * 32 + 8 * t, b[n]);
      } else {
        term.of(four[n], b[n]);
      }
    }
    free = stage;
    stage = stage + 1 == S::STAGES ? 0 : stage + 1;
#pragma unroll
    for (int j = 0; j < S::BYTES / 2; ++j) {
      const int word = j / 2, byte = 2 * j % 4;
      unsigned a[4];
      a[0] = converter.pair_of(words[0][word], words[1][word], byte);
      a[1] = converter.pair_of(words[0][word], words[1][word], byte + 1);
      a[2] = converter.pair_of(words[2][word], words[3][word], byte);
      a[3] = converter.pair_of(words[2][word], words[3][word], byte + 1);
#pragma unroll
      for (int n = 0; n < TILES; ++n) multiply_tile(sums[j][n], a, b[n]);
    }
    if (!IS_OF_ONE_GROUP && ((tile + 1) % IN_GROUP == 0 || tile + 1 == end)) {
      const long long group = tile / IN_GROUP;
      with_scales<S>(scales + group * S::N, mine, [&](int j, float first, float second) {
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i)
          total[j][i / 4][i % 4] += of_group[j][i / 4][i % 4] * (i % 4 < 2 ? first : second);
      });
      clear<S::BYTES, TILES>(of_group);
    }
  }
  if (IS_OF_ONE_GROUP && begin < end) {
    const long long group = begin / IN_GROUP;
    with_scales<S>(scales + group * S::N, mine, [&](int j, float first, float second) {
#pragma unroll
      for (int i = 0; i < 4 * TILES; ++i)
        total[j][i / 4][i % 4] *= i % 4 < 2 ? first : second;
    });
  }
}

// Adds up the sums of the teams in the first of `S::TEAMS`, always in the same order. Every thread of
// the block calls it; `shared` has half of the teams' sums, and may be what weights were copied to.
template <class S, int COUNT, int TILES>
DEVICE void add_up(float (&sums)[COUNT][TILES][4], int team, float* shared) {
  constexpr int FOURS = COUNT * TILES, THREADS = Widths<S>::THREADS;
  static_assert(S::TEAMS / 2 * FOURS * 16 * THREADS <= S::TEAMS * Widths<S>::RING,
                "the sums take more room than there is");
  float* const own = shared + threadIdx.x % THREADS * 4;
  barrier();
#pragma unroll
  for (int half = S::TEAMS / 2; half >= 1; half /= 2) {
    if (team >= half && team < 2 * half) {
#pragma unroll
      for (int i = 0; i < FOURS; ++i)
        write_floats(sums[i / TILES][i % TILES], own + ((team - half) * FOURS + i) * THREADS * 4);
    }
    barrier();
    if (team < half) {
#pragma unroll
      for (int i = 0; i < FOURS; ++i) {
        float more[4];
        read_floats(own + (team * FOURS + i) * THREADS * 4, more);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i / TILES][i % TILES][j] += more[j];
      }
    }
    barrier();
  }
}

// Calls visit(column, input, values) for what this lane has of a team's sums, terms added up: of columns
// side by side, from that one on. `column` is the team's first. All lanes of a warp call it.
template <class S, int TILES, class Visit>
DEVICE void visit_sums(const Sums<S::BYTES, TILES>& sums, int column, int count, Visit visit) {
  // Of four terms two lanes have two each; each of them gets half of the columns.
  constexpr int EACH = S::TERMS == 4 ? S::BYTES / 2 : S::BYTES;
  const Place<S> place;
  const int g = place.lane / 4, t = place.lane % 4;
  const int mine = column + place.member * Widths<S>::OF_WARP + g * S::BYTES + t % 2 * (S::BYTES - EACH);
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const auto sum = [&](int at, int i) { return sums[at / 2][n][at % 2 * 2 + i]; };
    float values[EACH];
#pragma unroll
    for (int next = 0; next < (S::TERMS == 1 ? 2 : 1); ++next) {
      const int input = (8 * n + 2 * t) / S::TERMS + next;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        if constexpr (S::TERMS == 1) {
          values[i] = sum(i, next);
        } else if constexpr (S::TERMS == 2) {
          values[i] = sum(i, 0) + sum(i, 1);
        } else {
          const float first = sum(i, 0) + sum(i, 1), second = sum(i + EACH, 0) + sum(i + EACH, 1);
          values[i] = (t % 2 ? second : first) + shuffle_xor(t % 2 ? first : second, 1);
        }
      }
      if (mine < S::N && input < count) visit(mine, input, values);
    }
  }
}

// One matrix of a stack of int8 ones, or the stack.
struct Int8Matrix {
  const signed char* values;
  const unsigned short* scales;

  template <class S, int TILES>
  using Total = Sums<S::BYTES, TILES>;

  template <class S>
  DEVICE Int8Matrix of(long long number) const {
    return {values + number * S::K * S::N, scales + number * S::G * S::N};
  }

  template <class S, int TILES>
  DEVICE void multiply_by(Sums<S::BYTES, TILES>& total, int column, const Rows<const float*>& inputs,
                          int share, unsigned char* ring) const {
    multiply<S, TILES>(total, values, scales, column, inputs, share, ring);
  }

  template <class S, int TILES, class Visit>
  static DEVICE void visit(const Sums<S::BYTES, TILES>& sums, int column, int count, Visit visit) {
    visit_sums<S, TILES>(sums, column, count, visit);
  }
};

// Calls run(Tiles<n>()) for the fewest tiles that hold so many inputs, S::TILES at most.
template <int TILES>
struct Tiles {
  static constexpr int count = TILES;
};

template <class S, class Run>
DEVICE void with_tiles(int inputs, Run run) {
  if (S::TILES == 1 || inputs <= Inputs<S::TERMS, 1>::count) {
    run(Tiles<1>());
  } else if constexpr (S::TILES == 2) {
    run(Tiles<2>());
  } else if constexpr (S::TILES > 2) {
    if (inputs <= Inputs<S::TERMS, 2>::count) {
      run(Tiles<2>());
    } else {
      run(Tiles<S::TILES>());
    }
  }
}
