// A few rows times up to three matrices of stacks, in one launch: the projections of attention.
//
// Dimension key: M row, K rows of the matrices, N columns of all of them, P parts of K.
#pragma once

template <class S, class Of>
DEVICE void project_one(const float* x, const signed char* values, const unsigned short* scales,
                        const int* index, float* out, int tile, int begin_column, int* rows,
                        float* shared) {
  constexpr int INPUTS = Inputs<Of::TERMS, Of::TILES>::count, COLUMNS = Columns<Of::BYTES>::count;
  constexpr int TILES_OF_K = (Of::K / Of::G + 15) / 16 * Of::G, PARTS = S::PARTS * Of::WARPS;
  const int warp = threadIdx.x / 32, column = tile * COLUMNS;
  const int part = blockIdx.y * Of::WARPS + warp;
  const long long matrix = index[0];
  for (int first = 0; first < S::M; first += INPUTS) {
    const int count = S::M - first < INPUTS ? S::M - first : INPUTS;
    if (threadIdx.x < count) rows[threadIdx.x] = first + threadIdx.x;
    barrier();
    Sums<Of::BYTES, Of::TILES> sums;
    const Rows inputs = {x, rows, count};
    multiply<Of>(sums, values + matrix * Of::K * Of::N, scales + matrix * Of::G * Of::N, column, inputs,
                 (int)((long long)part * TILES_OF_K / PARTS),
                 (int)((long long)(part + 1) * TILES_OF_K / PARTS));
    add_up<Of>(sums, warp, shared);
    if (warp == 0) {
      visit_sums<Of>(sums, column, count, [&](int at, int input, float value) {
        out[((long long)blockIdx.y * S::M + first + input) * S::N + begin_column + at] = value;
      });
    }
    barrier();
  }
}

// out[part] = what a part of the rows adds to x times each matrix, side by side. Grid: tiles of
// columns, parts.
template <class S, class First, class Second, class Third>
DEVICE void project(const float* x, const signed char* first, const unsigned short* first_scales,
                    const int* first_index, const signed char* second,
                    const unsigned short* second_scales, const int* second_index,
                    const signed char* third, const unsigned short* third_scales,
                    const int* third_index, float* out) {
  constexpr int COLUMNS = Columns<First::BYTES>::count;
  constexpr int FIRST = (First::N + COLUMNS - 1) / COLUMNS;
  constexpr int SECOND = (Second::N + COLUMNS - 1) / COLUMNS;
  __shared__ int rows[Inputs<First::TERMS, First::TILES>::count];
  __shared__ float shared[First::WARPS / 2 * COLUMNS * 8 * First::TILES];
  const int tile = blockIdx.x;
  if (tile < FIRST) {
    project_one<S, First>(x, first, first_scales, first_index, out, tile, 0, rows, shared);
  } else if (tile < FIRST + SECOND) {
    project_one<S, Second>(x, second, second_scales, second_index, out, tile - FIRST, First::N, rows,
                           shared);
  } else {
    project_one<S, Third>(x, third, third_scales, third_index, out, tile - FIRST - SECOND,
                          First::N + Second::N, rows, shared);
  }
}

template <class S, class Only>
DEVICE void project(const float* x, const signed char* values, const unsigned short* scales,
                    const int* index, float* out) {
  __shared__ int rows[Inputs<Only::TERMS, Only::TILES>::count];
  __shared__ float shared[Only::WARPS / 2 * Columns<Only::BYTES>::count * 8 * Only::TILES];
  project_one<S, Only>(x, values, scales, index, out, blockIdx.x, 0, rows, shared);
}
