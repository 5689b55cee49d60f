// The chosen experts of a few tokens, in two launches: gate, up and GELU; down and the router's
// weights. Each block finds out for itself which experts are chosen and by whom.
//
// Dimension key: M token, A experts a token, R = M * A dispatched rows, E expert, D model dim, F
// hidden dim.
#pragma once

// The rows of one expert.
template <class S>
struct Chosen {
  static constexpr int ROWS = S::M * S::A;
  int indices[ROWS];
  int rows[ROWS];
  int expert;
  int count;
};

template <class S>
DEVICE void read_indices(Chosen<S>& chosen, const int* indices, const unsigned char* valid) {
  for (int i = threadIdx.x; i < Chosen<S>::ROWS; i += blockDim.x) {
    // Without a branch, behind which one would be asked for when the other has come.
    const int is_real = valid[i / S::A], index = indices[i];
    chosen.indices[i] = index | (is_real - 1);
  }
  barrier();
}

// Fills in the rows of the number-th expert that is chosen at all, by index; none where there are
// fewer. Every thread of the block calls it.
template <class S>
DEVICE void find_expert(Chosen<S>& chosen, int number) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    bool is_chosen = false;
    for (int i = 0; i < Chosen<S>::ROWS; ++i) is_chosen |= lane < S::E && chosen.indices[i] == lane;
    unsigned left = vote(is_chosen);
    for (int before = 0; before < number; ++before) left &= left - 1;
    const int expert = left == 0 ? -1 : lowest_bit(left);
    int count = 0;
    for (int start = 0; start < Chosen<S>::ROWS; start += 32) {
      const int i = start + lane;
      const bool is_mine = i < Chosen<S>::ROWS && expert >= 0 && chosen.indices[i] == expert;
      const unsigned all = vote(is_mine);
      if (is_mine) chosen.rows[count + count_bits(all & ((1u << lane) - 1))] = i;
      count += count_bits(all);
    }
    if (lane == 0) chosen.expert = expert, chosen.count = count;
  }
  barrier();
}

DEVICE float gelu(float x) {  // in its tanh form, as trained
  return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// Where hidden numbers go: to memory, at once.
struct Floats {
  float* hidden;

  template <class Of>
  DEVICE void put(float value, long long row, int at, float*) const {
    hidden[row * Of::N + at] = value;
  }

  template <class Of, int INPUTS>
  DEVICE void finish(const float*, int, const int*, int) const {}
};

// hidden[row] = gelu(x gate) * (x up). Half of the teams each for gate and up. Of the parts that share
// the rows of the matrices the last one adds up what all have written to `parts`, of gate, then of up,
// for each row. Grid: tiles of columns, parts of each expert.
template <class S, class Weight, class X, class Hidden>
DEVICE void gate_up_of(X x, const Weight& gate, const Weight& up, const int* layer,
                       const int* indices, const unsigned char* valid, const Hidden& hidden,
                       float* parts) {
  using Of = typename S::Hidden;
  constexpr int INPUTS = Inputs<Of::TERMS, Of::TILES>::count, PARTS = Of::SHARES / Of::TEAMS;
  constexpr int WIDTH = Widths<Of>::OF_TEAM;
  static_assert(4 * INPUTS <= 32 * Of::STAGES * Of::TEAMS, "no room for what up has come to");
  __shared__ Chosen<S> chosen;
  __shared__ int tokens[INPUTS];
  DYNAMIC_SHARED(ring);
  const int number = layer[0];
  read_indices<S>(chosen, indices, valid);
  find_expert<S>(chosen, blockIdx.y / PARTS);
  if (chosen.count == 0) return;
  const int in_all = threadIdx.x / Widths<Of>::THREADS, team = in_all % Of::TEAMS;
  const bool is_up = in_all >= Of::TEAMS;
  const int part = blockIdx.y % PARTS, column = blockIdx.x * WIDTH;
  const long long expert = (long long)number * S::E + chosen.expert;
  const Weight matrix = (is_up ? up : gate).template of<Of>(expert);
  float* ups = reinterpret_cast<float*>(ring);
  const auto part_of = [&](bool of_up, int of, int row) {
    return parts + ((long long)(of_up * PARTS + of) * Chosen<S>::ROWS + row) * Of::N;
  };
  for (int first = 0; first < chosen.count; first += INPUTS) {
    const int count = chosen.count - first < INPUTS ? chosen.count - first : INPUTS;
    if (threadIdx.x < count) tokens[threadIdx.x] = chosen.rows[first + threadIdx.x] / S::A;
    barrier();
    with_tiles<Of>(count, [&](auto tiles) {
      constexpr int TILES = decltype(tiles)::count;
      typename Weight::template Total<Of, TILES> sums;
      const Rows<X> inputs = {x, tokens, count};
      matrix.template multiply_by<Of, TILES>(sums, column, inputs, part * Of::TEAMS + team,
                                             ring + in_all * Widths<Of>::RING);
      add_up<Of>(sums, team,
                 reinterpret_cast<float*>(ring + is_up * Of::TEAMS * Widths<Of>::RING));
      if constexpr (PARTS > 1) {
        if (team > 0) return;
        Weight::template visit<Of, TILES>(sums, column, count, [&](int at, int input, const auto& values) {
          write_floats(values, part_of(is_up, part, chosen.rows[first + input]) + at);
        });
      } else {
        if (is_up && team == 0) {
          Weight::template visit<Of, TILES>(sums, column, count, [&](int at, int input, const auto& values) {
            float* place = ups + (at - column) * INPUTS + input;
            for_each(values, [&](int i, float value) { place[i * INPUTS] = value; });
          });
        }
        barrier();
        if (!is_up && team == 0) {
          Weight::template visit<Of, TILES>(sums, column, count, [&](int at, int input, const auto& values) {
            const long long row = chosen.rows[first + input];
            float* place = ups + (at - column) * INPUTS + input;
            for_each(values, [&](int i, float value) {
              hidden.template put<Of>(gelu(value) * place[i * INPUTS], row, at + i, place + i * INPUTS);
            });
          });
        }
        hidden.template finish<Of, INPUTS>(ups, column, chosen.rows + first, count);
        barrier();
      }
    });
  }
  if constexpr (PARTS > 1) {
    constexpr int TILES = S::CHOSEN * Of::COLUMN_TILES;
    if (!is_last_of<Of, TILES>(blockIdx.y / PARTS * Of::COLUMN_TILES + blockIdx.x, PARTS)) return;
    for (int first = 0; first < chosen.count; first += INPUTS) {
      const int count = chosen.count - first < INPUTS ? chosen.count - first : INPUTS;
      for (int i = threadIdx.x; i < count * WIDTH; i += blockDim.x) {
        const int input = i / WIDTH, at = column + i % WIDTH, row = chosen.rows[first + input];
        if (at >= Of::N) continue;
        float of_gate = 0, of_up = 0;
#pragma unroll
        for (int of = 0; of < PARTS; ++of) {
          of_gate += read_published(part_of(false, of, row) + at);
          of_up += read_published(part_of(true, of, row) + at);
        }
        float* place = ups + (at - column) * INPUTS + input;
        hidden.template put<Of>(gelu(of_gate) * of_up, row, at, place);
      }
      hidden.template finish<Of, INPUTS>(ups, column, chosen.rows + first, count);
      barrier();
    }
  }
}

// out[token] = the sum of weight * (hidden[row] down) over the token's rows, of which blocks write
// parts: by a part of the matrix's rows, for each row. Grid: tiles of columns, parts of each expert.
template <class S, class Weight, class X>
DEVICE void down_of(X hidden, const Weight& down, const int* layer, const int* indices,
                    const unsigned char* valid, const float* weights, float* out, float* parts) {
  using Of = typename S::Out;
  constexpr int INPUTS = Inputs<Of::TERMS, Of::TILES>::count, PARTS = Of::SHARES / Of::TEAMS;
  constexpr int WIDTH = Widths<Of>::OF_TEAM;
  __shared__ Chosen<S> chosen;
  __shared__ float of_rows[Chosen<S>::ROWS];
  static_assert(INPUTS <= 32, "a thread each reads the weight of a row");
  DYNAMIC_SHARED(ring);
  const int number = layer[0];
  read_indices<S>(chosen, indices, valid);
  find_expert<S>(chosen, blockIdx.y / PARTS);
  const int team = threadIdx.x / Widths<Of>::THREADS, part = blockIdx.y % PARTS;
  const int column = blockIdx.x * WIDTH;
  const long long expert = (long long)number * S::E + chosen.expert;
  const auto part_of = [&](int of, int row) {
    return parts + ((long long)of * Chosen<S>::ROWS + row) * Of::N;
  };
  for (int first = 0; first < chosen.count; first += INPUTS) {
    const int count = chosen.count - first < INPUTS ? chosen.count - first : INPUTS;
    with_tiles<Of>(count, [&](auto tiles) {
      constexpr int TILES = decltype(tiles)::count;
      typename Weight::template Total<Of, TILES> sums;
      const Rows<X> inputs = {hidden, chosen.rows + first, count};
      // Read before the products, so that nothing waits for it behind them.
      const float weight = threadIdx.x < count ? weights[chosen.rows[first + threadIdx.x]] : 0;
      down.template of<Of>(expert).template multiply_by<Of, TILES>(
          sums, column, inputs, part * Of::TEAMS + team, ring + team * Widths<Of>::RING);
      if (threadIdx.x < count) of_rows[first + threadIdx.x] = weight;
      add_up<Of>(sums, team, reinterpret_cast<float*>(ring));
      if (team == 0) {
        Weight::template visit<Of, TILES>(sums, column, count, [&](int at, int input, auto& values) {
          const int row = chosen.rows[first + input];
          for_each(values, [&](int i, float value) { values[i] = of_rows[first + input] * value; });
          write_floats(values, part_of(part, row) + at);
        });
      }
    });
  }
  if (!is_last_of<Of>(blockIdx.x, S::CHOSEN * PARTS)) return;
  constexpr int FOURS = WIDTH / 4;
  for (int i = threadIdx.x; i < S::M * FOURS; i += blockDim.x) {
    const int token = i / FOURS, at = column + i % FOURS * 4;
    if (at >= Of::N) continue;
    float4 sum = {0, 0, 0, 0};
    add_published<S::A * PARTS>(sum, [&](int i) -> const float* {
      const int row = token * S::A + i / PARTS, index = chosen.indices[row];
      return 0 <= index && index < S::E ? part_of(i % PARTS, row) + at : nullptr;
    });
    *reinterpret_cast<float4*>(out + (long long)token * Of::N + at) = sum;
  }
}

template <class S>
DEVICE void gate_up(const float* x, const signed char* gate, const unsigned short* gate_scales,
                    const signed char* up, const unsigned short* up_scales, const int* layer,
                    const int* indices, const unsigned char* valid, float* hidden,
                    float* parts = nullptr) {
  gate_up_of<S, Int8Matrix>(x, {gate, gate_scales}, {up, up_scales}, layer, indices, valid,
                            Floats{hidden}, parts);
}

template <class S>
DEVICE void down(const float* hidden, const signed char* down, const unsigned short* down_scales,
                 const int* layer, const int* indices, const unsigned char* valid,
                 const float* weights, float* out, float* parts) {
  down_of<S, Int8Matrix>(hidden, {down, down_scales}, layer, indices, valid, weights, out, parts);
}
