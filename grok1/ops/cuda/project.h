// A few rows times one matrix of a stack, or one each of three: the projections of attention.
//
// Dimension key: M row, K rows of the matrices, N columns of all of them, P parts of K.
#pragma once

// Writes the sums of the first team by rows, in whole pieces. Every thread of the block calls it.
template <class S, class Of, int TILES>
DEVICE void write_rows(const Sums<Of::BYTES, TILES>& sums, int column, int count, int team, float* out,
                       float* shared) {
  constexpr int WIDTH = Widths<Of>::OF_TEAM, PITCH = WIDTH + 2;  // lanes meet in a bank by twos
  static_assert(4 * PITCH * Inputs<Of::TERMS, TILES>::count <= Of::TEAMS * Widths<Of>::RING,
                "the rows take more room than there is");
  if (team == 0) {
    visit_sums<Of, TILES>(sums, column, count, [&](int at, int input, const auto& values) {
      for_each(values, [&](int i, float value) { shared[input * PITCH + at - column + i] = value; });
    });
  }
  barrier();
  for (int i = threadIdx.x; i < count * WIDTH; i += blockDim.x) {
    const int input = i / WIDTH, at = column + i % WIDTH;
    if (at < Of::N) out[(long long)input * S::N + at] = shared[input * PITCH + at - column];
  }
}

template <class S, class Of, class X>
DEVICE void project_one(X x, const signed char* values, const unsigned short* scales,
                        const int* index, float* out, int tile, int begin_column, int* rows,
                        unsigned char* ring) {
  constexpr int INPUTS = Inputs<Of::TERMS, Of::TILES>::count;
  const int team = threadIdx.x / Widths<Of>::THREADS, column = tile * Widths<Of>::OF_TEAM;
  const long long matrix = index[0];
  for (int first = 0; first < S::M; first += INPUTS) {
    const int count = S::M - first < INPUTS ? S::M - first : INPUTS;
    if (threadIdx.x < count) rows[threadIdx.x] = first + threadIdx.x;
    barrier();
    with_tiles<Of>(count, [&](auto tiles) {
      constexpr int TILES = decltype(tiles)::count;
      Sums<Of::BYTES, TILES> sums;
      const Rows<X> inputs = {x, rows, count};
      multiply<Of, TILES>(sums, values + matrix * Of::K * Of::N, scales + matrix * Of::G * Of::N, column,
                          inputs, blockIdx.y * Of::TEAMS + team, ring + team * Widths<Of>::RING);
      add_up<Of>(sums, team, reinterpret_cast<float*>(ring));
      float* part = out + ((long long)blockIdx.y * S::M + first) * S::N + begin_column;
      if constexpr (Of::COPIES) {
        write_rows<S, Of, TILES>(sums, column, count, team, part, reinterpret_cast<float*>(ring));
      } else if (team == 0) {
        visit_sums<Of, TILES>(sums, column, count, [&](int at, int input, const auto& values) {
          write_floats(values, part + (long long)input * S::N + at);
        });
      }
    });
    barrier();
  }
}

// out[part] = what a part of the rows adds to x, or to its terms, times each matrix, side by side. Grid:
// tiles of columns, parts.
template <class S, class First, class Second, class Third, class X>
DEVICE void project(X x, const signed char* first, const unsigned short* first_scales,
                    const int* first_index, const signed char* second,
                    const unsigned short* second_scales, const int* second_index,
                    const signed char* third, const unsigned short* third_scales,
                    const int* third_index, float* out) {
  constexpr int COLUMNS = Widths<First>::OF_TEAM;
  constexpr int FIRST = (First::N + COLUMNS - 1) / COLUMNS;
  constexpr int SECOND = (Second::N + COLUMNS - 1) / COLUMNS;
  __shared__ int rows[Inputs<First::TERMS, First::TILES>::count];
  DYNAMIC_SHARED(ring);
  const int tile = blockIdx.x;
  if (tile < FIRST) {
    project_one<S, First>(x, first, first_scales, first_index, out, tile, 0, rows, ring);
  } else if (tile < FIRST + SECOND) {
    project_one<S, Second>(x, second, second_scales, second_index, out, tile - FIRST, First::N, rows,
                           ring);
  } else {
    project_one<S, Third>(x, third, third_scales, third_index, out, tile - FIRST - SECOND,
                          First::N + Second::N, rows, ring);
  }
}

// out = x times one matrix; blocks write parts of it.
template <class S, class Only, class X>
DEVICE void project(X x, const signed char* values, const unsigned short* scales,
                    const int* index, float* out, float* parts) {
  constexpr int PARTS = Only::SHARES / Only::TEAMS, WIDTH = Widths<Only>::OF_TEAM;
  __shared__ int rows[Inputs<Only::TERMS, Only::TILES>::count];
  DYNAMIC_SHARED(ring);
  project_one<S, Only>(x, values, scales, index, parts, blockIdx.x, 0, rows, ring);
  if (!is_last_of<Only>(blockIdx.x, PARTS)) return;
  constexpr int FOURS = WIDTH / 4;
  for (int i = threadIdx.x; i < S::M * FOURS; i += blockDim.x) {
    const int row = i / FOURS, at = blockIdx.x * WIDTH + i % FOURS * 4;
    if (at >= S::N) continue;
    float4 sum = {0, 0, 0, 0};
    add_published<PARTS>(sum, [&](int of) { return parts + ((long long)of * S::M + row) * S::N + at; });
    *reinterpret_cast<float4*>(out + (long long)row * S::N + at) = sum;
  }
}
