// Products of float32 rows with one int8 matrix of a stack, for XLA's CPU backend.
//
// out[M, N] = x[M, K] @ (values[K, N] * scales[G, N]), group g of the scales for rows g*K/G to
// (g+1)*K/G; everything row-major, as XLA holds it. At small M the time is that of reading the
// weight once, so the loops are laid out for the memory bus: the matrix is cut into units, a panel
// of columns by a slot of rows, that any thread may take; inside a unit a few rows are walked side
// by side, and each cache line is fetched one such block of rows ahead of its use.
//
// The cut depends on the shape alone and partial sums are added in a fixed order, so that results
// do not depend on the number of threads or on which thread was faster.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Lanes of a vector register, and how many registers may hold sums.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kSums = 24;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kSums = 12;
#else
constexpr int kLanes = 4;
constexpr int kSums = 12;
#endif

constexpr int kCacheLine = 64;
constexpr int64_t kMaxRows = 16;         // input rows multiplied at a time
constexpr int64_t kSegmentBytes = 1 << 18;  // weights that stay in cache while inputs take turns
constexpr int64_t kUnitBytes = 1 << 17;     // least size of a unit
constexpr int64_t kUnits = 32;  // units to have, where the matrix is large enough for them

// Columns of a unit. The longer the runs of memory the better, but sums must stay in cache.
constexpr int64_t panel_for(int64_t num_rows) {
  return num_rows <= 2 ? 4096 : num_rows <= 6 ? 2048 : 1024;
}

// Weight rows walked side by side, 16 KiB with the panel.
constexpr int64_t block_for(int64_t num_rows) { return (1 << 14) / panel_for(num_rows); }

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));

inline Floats load_floats(const float* from) {
  Floats floats;
  std::memcpy(&floats, from, sizeof(floats));
  return floats;
}

inline void store_floats(float* to, Floats floats) { std::memcpy(to, &floats, sizeof(floats)); }

inline Floats load_values(const int8_t* from) {
#if defined(__AVX512F__)
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, Floats);
#endif
}

inline float to_float(uint16_t bfloat16) {
  uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

constexpr int power_of_two_up_to(int limit) {
  int power = 1;
  while (power * 2 <= limit) power *= 2;
  return power;
}

struct Matrix {
  const int8_t* values;    // [K, N]
  const uint16_t* scales;  // [G, N], bfloat16
  int64_t rows, columns, rows_per_group;
};

// sums[kRows, panel] += x @ values, for `count` rows of the weight and `width` columns of a panel.
// x is transposed, [count, kRows].
template <int kRows>
void multiply_block(const int8_t* values, int64_t stride, int64_t count, int64_t width,
                    const float* x, float* sums) {
  constexpr int64_t kPanel = panel_for(kRows);
  constexpr int64_t kBlock = block_for(kRows);
  constexpr int kVectors = power_of_two_up_to(std::min(kCacheLine / kLanes, kSums / kRows));
  constexpr int kColumns = kVectors * kLanes;
  int64_t column = 0;
  for (; column + kColumns <= width; column += kColumns) {
    Floats sum[kRows][kVectors];
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        sum[m][v] = load_floats(sums + m * kPanel + column + v * kLanes);
      }
    }
    const int8_t* row = values + column;
    for (int64_t k = 0; k < count; ++k, row += stride) {
      // An address past the weight's end is harmless: a prefetch does not fault.
      __builtin_prefetch(row + kBlock * stride);
      Floats weight[kVectors];
      for (int v = 0; v < kVectors; ++v) weight[v] = load_values(row + v * kLanes);
      for (int m = 0; m < kRows; ++m) {
        for (int v = 0; v < kVectors; ++v) sum[m][v] += weight[v] * x[k * kRows + m];
      }
    }
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        store_floats(sums + m * kPanel + column + v * kLanes, sum[m][v]);
      }
    }
  }
  for (int64_t k = 0; k < count && column < width; ++k) {
    for (int m = 0; m < kRows; ++m) {
      for (int64_t c = column; c < width; ++c) {
        sums[m * kPanel + c] += x[k * kRows + m] * values[k * stride + c];
      }
    }
  }
}

// out[num_rows, width] (+)= x @ weight over weight rows `begin` to `end`, all of one scale group.
template <int kRows>
void multiply_segment(const Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                      int64_t width, const float* x, int64_t num_rows, bool add, float* out) {
  constexpr int64_t kPanel = panel_for(kRows);
  constexpr int64_t kBlock = block_for(kRows);
  alignas(kCacheLine) float sums[kRows * kPanel] = {};
  for (int64_t k = begin; k < end; k += kBlock) {
    multiply_block<kRows>(matrix.values + k * matrix.columns + column, matrix.columns,
                          std::min(kBlock, end - k), width, x + k * kRows, sums);
  }
  const uint16_t* scales =
      matrix.scales + begin / matrix.rows_per_group * matrix.columns + column;
  for (int64_t m = 0; m < num_rows; ++m) {
    float* out_row = out + m * matrix.columns + column;
    for (int64_t c = 0; c < width; ++c) {
      float scaled = sums[m * kPanel + c] * to_float(scales[c]);
      out_row[c] = add ? out_row[c] + scaled : scaled;
    }
  }
}

using MultiplySegment = void (*)(const Matrix&, int64_t, int64_t, int64_t, int64_t, const float*,
                                 int64_t, bool, float*);

struct Kernel {
  int64_t rows;
  MultiplySegment multiply;
};

// Inputs are padded with zeros to one of these numbers of rows.
constexpr Kernel kKernels[] = {
    {1, multiply_segment<1>}, {2, multiply_segment<2>},   {3, multiply_segment<3>},
    {4, multiply_segment<4>}, {6, multiply_segment<6>},   {8, multiply_segment<8>},
    {12, multiply_segment<12>}, {kMaxRows, multiply_segment<kMaxRows>}};

const Kernel& kernel_for(int64_t num_rows) {
  const Kernel* kernel = kKernels;
  while (kernel->rows < std::min(num_rows, kMaxRows)) ++kernel;
  return *kernel;
}

// x[M, K] as blocks of at most kMaxRows rows, each transposed and padded: [K, kernel's rows].
void pack_inputs(const float* x, int64_t num_rows, int64_t depth, float* packed) {
  for (int64_t first = 0; first < num_rows; first += kMaxRows) {
    int64_t count = std::min(kMaxRows, num_rows - first);
    int64_t padded = kernel_for(count).rows;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t m = 0; m < padded; ++m) {
        packed[k * padded + m] = m < count ? x[(first + m) * depth + k] : 0.0f;
      }
    }
    packed += padded * depth;
  }
}

// One product, shared by the threads that work on it.
struct Job {
  Matrix matrix;
  const float* x;  // packed
  int64_t num_rows;
  float* out;
  float* partial;  // [num_slots - 1, M, N]: the sums of all slots but the first
  int64_t panel, num_panels, num_slots;
  std::atomic<int64_t> next_unit{0};
  std::atomic<int64_t> num_done{0};
  std::unique_ptr<std::atomic<int64_t>[]> slots_done;  // of each panel

  void run_unit(int64_t unit) {
    int64_t slot = unit % num_slots;
    int64_t column = unit / num_slots * panel;
    int64_t width = std::min(panel, matrix.columns - column);
    int64_t size = num_rows * matrix.columns;
    int64_t first = matrix.rows * slot / num_slots, last = matrix.rows * (slot + 1) / num_slots;
    float* slot_out = slot == 0 ? out : partial + (slot - 1) * size;
    for (int64_t begin = first, end; begin < last; begin = end) {
      int64_t group_end = (begin / matrix.rows_per_group + 1) * matrix.rows_per_group;
      end = std::min({last, group_end, begin + kSegmentBytes / panel});
      const float* block = x;
      for (int64_t m = 0; m < num_rows; m += kMaxRows) {
        int64_t count = std::min(kMaxRows, num_rows - m);
        const Kernel& kernel = kernel_for(count);
        kernel.multiply(matrix, begin, end, column, width, block, count, begin > first,
                        slot_out + m * matrix.columns);
        block += kernel.rows * matrix.rows;
      }
    }
    std::atomic<int64_t>& done = slots_done[unit / num_slots];
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < num_slots) return;
    for (int64_t other = 0; other < num_slots - 1; ++other) {
      for (int64_t m = 0; m < num_rows; ++m) {
        int64_t start = m * matrix.columns + column;
        for (int64_t c = 0; c < width; ++c) out[start + c] += partial[other * size + start + c];
      }
    }
  }

  void work() {
    int64_t num_units = num_panels * num_slots;
    for (int64_t unit; (unit = next_unit.fetch_add(1, std::memory_order_relaxed)) < num_units;) {
      run_unit(unit);
      num_done.fetch_add(1, std::memory_order_release);
    }
  }

  void wait() {
    int64_t num_units = num_panels * num_slots;
    for (int spins = 0; num_done.load(std::memory_order_acquire) < num_units; ++spins) {
      // A unit takes some ten microseconds; only a thread that was descheduled takes longer.
      if (spins > 10000) {
        std::this_thread::yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }
};

// Threads of the process: GROK1_NUM_THREADS, or the cores it may run on.
int64_t num_threads() {
  static const int64_t number = [] {
    const char* setting = std::getenv("GROK1_NUM_THREADS");
    int64_t chosen = setting == nullptr ? 0 : std::atoll(setting);
    if (chosen > 0) return chosen;
#if defined(__linux__)
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return int64_t{CPU_COUNT(&cores)};
#endif
    return std::max<int64_t>(1, std::thread::hardware_concurrency());
  }();
  return number;
}

std::atomic<int64_t> num_running{0};  // products in progress: other devices', or independent ones

struct Running {
  const int64_t count = num_running.fetch_add(1) + 1;
  ~Running() { num_running.fetch_sub(1); }
};

ffi::Error QuantizedMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                           ffi::Buffer<ffi::S8> values, ffi::Buffer<ffi::BF16> scales,
                           ffi::Buffer<ffi::S32> index, ffi::Buffer<ffi::S32> num_valid,
                           ffi::ResultBuffer<ffi::F32> out) {
  auto sizes = values.dimensions(), group_sizes = scales.dimensions();
  int64_t size_of_batch = x.dimensions()[0];
  int64_t num_rows = std::clamp<int64_t>(num_valid.typed_data()[0], 0, size_of_batch);
  int64_t rows = sizes[sizes.size() - 2], columns = sizes.back();
  int64_t num_groups = group_sizes[group_sizes.size() - 2];
  int64_t num_matrices = 1;
  for (size_t axis = 0; axis + 2 < sizes.size(); ++axis) num_matrices *= sizes[axis];
  int64_t chosen = index.typed_data()[0];
  if (chosen < 0 || chosen >= num_matrices) {
    return ffi::Error::InvalidArgument("matrix " + std::to_string(chosen) + " of a stack of " +
                                       std::to_string(num_matrices));
  }
  std::fill(out->typed_data() + num_rows * columns, out->typed_data() + size_of_batch * columns, 0);
  if (num_rows == 0 || columns == 0) return ffi::Error::Success();

  auto job = std::make_shared<Job>();
  job->matrix = {values.typed_data() + chosen * rows * columns,
                 reinterpret_cast<const uint16_t*>(scales.typed_data()) +
                     chosen * num_groups * columns,
                 rows, columns, rows / num_groups};
  job->num_rows = num_rows;
  job->out = out->typed_data();
  job->panel = panel_for(kernel_for(num_rows).rows);
  job->num_panels = (columns + job->panel - 1) / job->panel;
  int64_t wanted_slots = (kUnits + job->num_panels - 1) / job->num_panels;
  int64_t most_slots = rows * std::min(job->panel, columns) / kUnitBytes;
  job->num_slots = std::max<int64_t>(1, std::min(wanted_slots, most_slots));
  job->slots_done = std::make_unique<std::atomic<int64_t>[]>(job->num_panels);

  // Kept by the thread: the allocator would give the pages back after each call.
  thread_local std::vector<float> memory;
  int64_t full_blocks = num_rows / kMaxRows * kMaxRows;
  int64_t rest = num_rows - full_blocks;
  int64_t packed_rows = full_blocks + (rest > 0 ? kernel_for(rest).rows : 0);
  int64_t packed_size = num_rows == 1 ? 0 : packed_rows * rows;
  size_t size = packed_size + (job->num_slots - 1) * num_rows * columns;
  if (memory.size() < size) memory.resize(size);
  if (packed_size > 0) pack_inputs(x.typed_data(), num_rows, rows, memory.data());
  job->x = packed_size > 0 ? memory.data() : x.typed_data();
  job->partial = memory.data() + packed_size;

  // A helper that starts late finds no unit left. Nothing waits for helpers that have not started,
  // so that calls on several devices cannot wait for each other.
  Running running;
  int64_t num_workers = std::min({num_threads() / running.count, pool.num_threads(),
                                  job->num_panels * job->num_slots});
  for (int64_t helper = 1; helper < num_workers; ++helper) {
    pool.Schedule([job] { job->work(); });
  }
  job->work();
  job->wait();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_quantized_matmul, QuantizedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
