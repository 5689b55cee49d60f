// What the CUDA kernels ask of a device, on a CPU: threads of a block are fibers that take turns, in
// one order or the other, and wait for each other at barriers and in what a warp does together.
#pragma once
#include <climits>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#ifdef __linux__
#include <link.h>
#endif
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Numbers of a block lie side by side as those of a thread of the system do, so that they can be found.
#define __shared__ static thread_local
// The same whatever its name, as on a device.
alignas(1024) static unsigned char dynamic_shared[1 << 18];
#define DYNAMIC_SHARED(name) unsigned char* const name = dynamic_shared
#define DEVICE inline

struct Dim {
  int x, y, z;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

struct Meeting {  // of all that are still running
  int alive = 0, arrived = 0, number = 0;
  void leave() {
    --alive;
    if (arrived == alive && alive > 0) open();
  }
  void open() { arrived = 0, ++number; }
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Product {  // of a warp: its rows of a in all lanes, and inputs that are read when it is waited for
  float (*sums)[4];
  int tokens;
  unsigned a[32][4];
  const unsigned char* tile;
};

struct Fiber {
  std::vector<Copy> started;
  std::deque<std::vector<Copy>> groups;
  std::vector<Product> started_products;
  std::deque<std::vector<Product>> groups_of_products;
  ucontext_t start;
  jmp_buf at;
  std::vector<char> stack;
  bool is_started = false, is_over = false;
};

struct Warp {
  Meeting meeting;
  unsigned deposits[2][32][8];
  int turn[32];
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Meeting block_meeting, team_meetings[32];
static jmp_buf scheduler;
static ucontext_t home;
static int current, idle;
static bool has_moved;  // whether a thread of the warp could go on
static void (*body)(void**);
static void** arguments;

static void yield() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

static void meet(Meeting& meeting) {
  const int number = meeting.number;
  if (++meeting.arrived == meeting.alive) {
    meeting.open();
    idle = 0, has_moved = true;
  } else {
    while (meeting.number == number) yield();
  }
}

static void run_fiber() {
  body(arguments);
  fibers[current].is_over = true;
  block_meeting.leave();
  warps[current / 32].meeting.leave();
  idle = 0;
  _longjmp(scheduler, 1);
}

// Lets the current thread run until it waits, or to its end.
__attribute__((noinline)) static void go_on() {
  Fiber& fiber = fibers[current];
  threadIdx = {current, 0, 0};
  if (_setjmp(scheduler)) return;
  if (fiber.is_started) _longjmp(fiber.at, 1);
  fiber.is_started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

// Where what is shared without a launch's asking is.
struct OfBlock {
  void* begin = nullptr;
  size_t size = 0;

#ifdef __linux__
  OfBlock() {
    static thread_local volatile char first;
    first = 0;  // the system gives a thread its numbers when it first asks for one
    dl_iterate_phdr(look, this);
  }

  static int look(dl_phdr_info* info, size_t, void* found) {
    const auto here = (uintptr_t)dynamic_shared - info->dlpi_addr;
    bool is_own = false;
    size_t size = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      is_own |= part.p_type == PT_LOAD && here - part.p_vaddr < part.p_memsz;
      if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    if (is_own) *(OfBlock*)found = OfBlock(info->dlpi_tls_data, size);
    return is_own;
  }

 private:
  OfBlock(void* begin, size_t size) : begin(begin), size(size) {}
#endif
};

// Runs one block after the other; `backward` lets the last block and thread go first. A block finds no
// numbers in its shared memory, and writes to no more than it was given.
static void run_grid(void (*kernel)(void**), void** buffers, Dim grid, int threads, int shared_bytes,
                     bool backward) {
  constexpr int BEHIND = 1024;
  const OfBlock of_block;
  body = kernel, arguments = buffers;
  gridDim = grid, blockDim = {threads, 1, 1};
  const int blocks = grid.x * grid.y * grid.z;
  for (int turn_of_block = 0; turn_of_block < blocks; ++turn_of_block) {
    const int number = backward ? blocks - 1 - turn_of_block : turn_of_block;
    blockIdx = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
    std::memset(dynamic_shared, 255, shared_bytes + BEHIND);
    if (of_block.size) std::memset(of_block.begin, 255, of_block.size);
    fibers.resize(threads);
    warps.assign((threads + 31) / 32, Warp());
    block_meeting = Meeting();
    block_meeting.alive = threads;
    for (Meeting& meeting : team_meetings) meeting = Meeting();
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[i];
      fiber.stack.resize(1 << 16);
      fiber.is_started = fiber.is_over = false;
      fiber.started.clear(), fiber.groups.clear();
      fiber.started_products.clear(), fiber.groups_of_products.clear();
      ++warps[i / 32].meeting.alive;
    }
    idle = 0;
    int left = threads;
    while (left > 0) {
      if (++idle > 3) {
        std::fprintf(stderr, "the threads of block %d wait for each other\n", number);
        std::abort();
      }
      // A warp goes as far as it can before another goes on: what it writes too early others see.
      for (int first = 0; first < threads; first += 32) {
        do {
          has_moved = false;
          for (int turn = first; turn < first + 32 && turn < threads; ++turn) {
            current = backward ? threads - 1 - turn : turn;
            if (fibers[current].is_over) continue;
            go_on();
            if (fibers[current].is_over) --left;
          }
        } while (has_moved);
      }
    }
    for (int i = 0; i < BEHIND; ++i) {
      if (dynamic_shared[shared_bytes + i] == 255) continue;
      std::fprintf(stderr, "block %d writes behind its %d bytes of shared memory\n", number, shared_bytes);
      std::abort();
    }
  }
}

inline void barrier() { meet(block_meeting); }

template <int THREADS>
inline void team_barrier(int team) {
  team_meetings[team].alive = THREADS;
  meet(team_meetings[team]);
}

// Lets all lanes of a warp see what each deposits; a lane is never two exchanges ahead.
inline unsigned (*exchange(const unsigned* deposit, int count))[8] {
  Warp& warp = warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, turn = warp.turn[lane]++ % 2;
  if (warp.meeting.alive != 32) {
    std::fprintf(stderr, "a warp works together of which lanes have left\n");
    std::abort();
  }
  std::memcpy(warp.deposits[turn][lane], deposit, 4 * count);
  meet(warp.meeting);
  return warp.deposits[turn];
}

inline unsigned in_register(unsigned number) { return number; }
inline unsigned kept(unsigned number) { return number; }
template <class T>
inline T* kept(T* place) { return place; }
inline float float_of_bits(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned bits_of_float(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of_half(unsigned short bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 0    ? std::ldexp((float)mantissa, -24)
                : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                 : std::ldexp((float)(mantissa + 1024), exponent - 25);
  return bits >> 15 ? -value : value;
}
inline unsigned short half_of_float(float value) {
  const _Float16 half = (_Float16)value;
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline unsigned bfloat(float value) {
  const unsigned bits = bits_of_float(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned bfloats(float low, float high) { return bfloat(low) | bfloat(high) << 16; }
inline float low_of(unsigned pair) { return float_of_bits(pair << 16); }
inline float high_of(unsigned pair) { return float_of_bits(pair & 0xffff0000u); }
inline unsigned multiply_add_bfloats(unsigned x, unsigned y, unsigned z) {
  return bfloats(low_of(x) * low_of(y) + low_of(z), high_of(x) * high_of(y) + high_of(z));
}
inline unsigned pick_bytes(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline unsigned pick_signed(unsigned x, unsigned y, unsigned selector) {
  unsigned result = pick_bytes(x, y, selector);
  for (int i = 0; i < 4; ++i)
    if (selector >> 4 * i & 8) result = result & ~(255u << 8 * i) | (result >> 8 * i & 128 ? 255u : 0) << 8 * i;
  return result;
}
inline int nearest(float value) {
  if (value != value) return 0;
  return (int)std::lrint(std::fmin(std::fmax((double)value, INT_MIN), INT_MAX));
}
inline float larger(float x, float y) { return x > y || x != x ? x : y; }
template <int N>
inline void load_once(const void* from, unsigned (&words)[N]) {
  if ((uintptr_t)from % (4 * N) != 0) {
    std::fprintf(stderr, "a load of %d bytes is not aligned\n", 4 * N);
    std::abort();
  }
  std::memcpy(words, from, 4 * N);
}

inline void prefetch(const void*) {}

using Shared = unsigned char*;
inline Shared shared_place(void* of) { return (Shared)of; }

// Copies are made when they are waited for, as late as a device may make them.
template <int BYTES>
inline void start_copy(Shared to, const void* from) {
  if ((uintptr_t)from % BYTES != 0 || (uintptr_t)to % BYTES != 0) {
    std::fprintf(stderr, "a copy of %d bytes is not aligned\n", BYTES);
    std::abort();
  }
  fibers[current].started.push_back({to, from, BYTES});
}
inline void end_group() {
  Fiber& fiber = fibers[current];
  fiber.groups.push_back(std::move(fiber.started));
  fiber.started.clear();
}
template <int COUNT>
inline void wait_for_all_but() {
  auto& groups = fibers[current].groups;
  for (; groups.size() > COUNT; groups.pop_front())
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}
template <int N>
inline void read_shared(Shared from, unsigned (&words)[N]) {
  std::memcpy(words, from, 4 * N);
}

inline unsigned short read_short(Shared from) {
  unsigned short bits;
  std::memcpy(&bits, from, 2);
  return bits;
}

// As the documentation of mma.sync.m16n8k16 says which lane has what.
inline void multiply_tile(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto all = exchange(mine, 6);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const unsigned a_pair = all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const unsigned b_pair = all[column * 4 + k % 8 / 2][4 + k / 8];
      sum[i] += k % 2 ? high_of(a_pair) * high_of(b_pair) : low_of(a_pair) * low_of(b_pair);
    }
  }
}

// As the documentation of mma.sync.m16n8k32 says which lane has what.
inline void multiply_tile_of_bytes(int (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto all = exchange(mine, 6);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 32; ++k) {
      const unsigned of_a = all[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)];
      const unsigned of_b = all[column * 4 + k % 16 / 4][4 + k / 16];
      sum[i] += (signed char)(of_a >> 8 * (k % 4)) * (signed char)(of_b >> 8 * (k % 4));
    }
  }
}

inline float shuffle(float value, int lane) {
  const unsigned mine = bits_of_float(value);
  return float_of_bits(exchange(&mine, 1)[lane][0]);
}
inline float shuffle_xor(float value, int mask) { return shuffle(value, threadIdx.x % 32 ^ mask); }
inline unsigned largest_of_warp(unsigned number) {
  const auto all = exchange(&number, 1);
  for (int lane = 0; lane < 32; ++lane) number = all[lane][0] > number ? all[lane][0] : number;
  return number;
}
inline unsigned vote(bool is_set) {
  const unsigned mine = is_set;
  const auto all = exchange(&mine, 1);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= all[lane][0] << lane;
  return result;
}
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }
inline int lowest_bit(unsigned bits) { return __builtin_ffs(bits) - 1; }
inline void meet_warp() { vote(true); }

#define LASTING static
inline bool arrive_last(unsigned* arrivals, unsigned count) {
  if (++*arrivals < count) return false;
  *arrivals = 0;
  return true;
}
inline float read_published(const float* from) { return *from; }
inline int read_published(const int* from) { return *from; }
inline float4 read_published(const float4* from) { return *from; }

inline void start_copy_or_zeros(Shared to, const void* from, bool is_copy) {
  alignas(16) static const unsigned char zeros[16] = {};
  start_copy<16>(to, is_copy ? from : zeros);
}
inline float value_of_half(unsigned bits) {
  const unsigned short low = bits;
  _Float16 half;
  std::memcpy(&half, &low, 2);
  return half;
}
inline void multiply_tile_of_halves(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto all = exchange(mine, 6);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; k += 2) {
      const unsigned a_pair = all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const unsigned b_pair = all[column * 4 + k % 8 / 2][4 + k / 8];
      sum[i] += value_of_half(a_pair) * value_of_half(b_pair);
      sum[i] += value_of_half(a_pair >> 16) * value_of_half(b_pair >> 16);
    }
  }
}

// Of each of four matrices two numbers, side by side or one above the other.
inline void load_numbers(unsigned (&words)[4], Shared mine, int row, int column, bool is_transposed) {
  unsigned address[2];
  std::memcpy(address, &mine, 8);
  const auto all = exchange(address, 2);
  for (int i = 0; i < 4; ++i) {
    words[i] = 0;
    for (int j = 0; j < 2; ++j) {
      const unsigned short* numbers;
      std::memcpy(&numbers, all[8 * i + row + (is_transposed ? j : 0)], 8);
      if ((uintptr_t)numbers % 16 != 0) {
        std::fprintf(stderr, "a row of a matrix is not aligned\n");
        std::abort();
      }
      words[i] |= (unsigned)numbers[column + (is_transposed ? 0 : j)] << 16 * j;
    }
  }
}
inline void load_matrices(unsigned (&words)[4], Shared row) {
  load_numbers(words, row, threadIdx.x % 32 / 4, 2 * (threadIdx.x % 4), false);
}
inline void load_transposed(unsigned (&words)[4], Shared row) {
  load_numbers(words, row, 2 * (threadIdx.x % 4), threadIdx.x % 32 / 4, true);
}
inline unsigned halves(float low, float high) {
  return half_of_float(low) | (unsigned)half_of_float(high) << 16;
}
inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float inverse_root(float x) { return 1 / std::sqrt(x); }

inline Shared tiles_place(void* of) { return (Shared)((uintptr_t)of + 1023 & ~(uintptr_t)1023); }
inline void show_tiles() {}
inline void begin_products() {}
inline void settle(float&) {}
template <int TOKENS>
inline void start_product(float (&sums)[TOKENS / 8][4], const unsigned (&a)[4], Shared tile) {
  Product product = {sums, TOKENS, {}, tile};
  const auto all = exchange(a, 4);
  for (int lane = 0; lane < 32; ++lane) std::memcpy(product.a[lane], all[lane], 16);
  fibers[current].started_products.push_back(product);
}
inline void end_products() {
  Fiber& fiber = fibers[current];
  fiber.groups_of_products.push_back(std::move(fiber.started_products));
  fiber.started_products.clear();
}
inline void finish(const Product& product) {
  const int lane = threadIdx.x % 32;
  for (int j = 0; j < product.tokens / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), token = 8 * j + 2 * (lane % 4) + i % 2;
      for (int k = 0; k < 16; ++k) {
        const unsigned pair = product.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
        const uintptr_t address = (uintptr_t)product.tile + 128 * token + 2 * k;
        unsigned short input;
        std::memcpy(&input, (void*)(address ^ (address >> 7 & 7) << 4), 2);
        product.sums[j][i] += (k % 2 ? high_of(pair) : low_of(pair)) * float_of_bits((unsigned)input << 16);
      }
    }
  }
}
template <int COUNT>
inline void wait_for_products() {
  auto& groups = fibers[current].groups_of_products;
  for (; groups.size() > COUNT; groups.pop_front())
    for (const Product& product : groups.front()) finish(product);
}
