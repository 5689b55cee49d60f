// What the CPU's kernels consist of, run on one thread on numbers of no meaning: writes inputs and
// outputs, for whoever knows what comes of which. It needs no interpreter, so that it runs where
// only an emulator of the processor is.

#include <cstdio>
#include <numeric>
#include <vector>

#include "attention.h"
#include "race.h"
#include "rounding.h"
#include "screen.h"

namespace {

// Of a linear congruential generator.
uint32_t number() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

float uniform(float most) { return (number() * 0x1p-31f - 1) * most; }

// A record: "name type size", a line, and the bytes.
template <typename T>
void write(const char* name, const char* type, const std::vector<T>& values) {
  std::printf("%s %s %zu\n", name, type, values.size() * sizeof(T));
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

template <typename T, typename Draw>
std::vector<T> drawn(const char* name, const char* type, int64_t size, Draw draw) {
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(draw());
  write(name, type, values);
  return values;
}

constexpr int64_t kDepth = 320, kColumns = 75, kBlocks = 2, kRows = 24;

// Products of every number of rows that has a form of its own.
template <typename Matrix>
void multiply_all(const char* name, const Matrix& matrix, const std::vector<float>& x) {
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 12, 13, 24}) {
    auto row = [&](int64_t m) { return x.data() + m * kDepth; };
    std::vector<float> out(rows * kColumns), sums(rows * kColumns), packed(rows * kDepth);
    if (rows <= grok1::most_few(matrix)) {
      grok1::pack_rows(row, rows, kDepth, packed.data());
      grok1::prepare(matrix, packed.data(), rows, kDepth);
      grok1::multiply_few(matrix, 0, kDepth, 0, kColumns, packed.data(), rows, out.data(),
                          kColumns);
      write(name, "<f4", out);
    }
    for (int64_t block = 0; block < grok1::num_blocks(rows); ++block) {
      grok1::pack_block(row, rows, block, kDepth, packed.data());
      grok1::prepare(matrix, packed.data() + block * grok1::kMaxRows * kDepth,
                     grok1::rows_of_block(rows, block), kDepth);
    }
    const grok1::Packed blocks{packed.data(), rows, kDepth};
    grok1::multiply(matrix, kDepth, 0, kColumns, blocks, sums.data(), out.data(), kColumns);
    write(name, "<f4", out);
  }
}

void products() {
  auto x = drawn<float>("x", "<f4", kRows * kDepth, [] { return uniform(1); });
  auto values = drawn<int8_t>("int8", "i1", kDepth * kColumns, number);
  auto scale = [] { return 0x3C00 + number() % 0x300; };  // above 0, as bfloat16 and as float16
  auto scales = drawn<uint16_t>("scales", "<u2", kBlocks * kColumns, scale);
  multiply_all("int8_product",
               grok1::matrix_of(values.data(), scales.data(), 0, kDepth, kColumns, kBlocks), x);
  auto codes = drawn<uint8_t>("codes", "u1", kDepth / 2 * kColumns, number);
  auto subscales =
      drawn<uint8_t>("subscales", "u1", kBlocks * grok1::kCodeRows * kColumns, number);
  multiply_all("int4_product",
               grok1::matrix_of(codes.data(), subscales.data(), scales.data(), 0, kDepth, kColumns,
                                kBlocks),
               x);
  // The rows of a screened table, which are as deep.
  auto remainders = drawn<uint8_t>("remainders", "u1",
                                   kColumns * grok1::remainders_size(kDepth), number);
  std::vector<float> fine(kColumns), plain(kColumns);
  const float sum = std::accumulate(x.data(), x.data() + kDepth, 0.0f);
  for (int64_t row = 0; row < kColumns; ++row) {
    const int8_t* of_row = values.data() + row * kDepth;
    grok1::dot<1>(grok1::PlainRow<int8_t>{of_row}, x.data(), kDepth, &plain[row]);
    grok1::dot_fine<1, 1>(of_row, remainders.data() + row * grok1::remainders_size(kDepth),
                          x.data(), kDepth, &sum, &fine[row]);
  }
  write("dot", "<f4", plain);
  write("dot_fine", "<f4", fine);
}

void attention() {
  constexpr int64_t kHead = 71, kLength = 7, kGroup = 3, kKeys = 40;
  auto query = drawn<float>("query", "<f4", kLength * kGroup * kHead, [] { return uniform(4); });
  auto keys = drawn<float>("keys", "<f4", kKeys * kHead, [] { return uniform(4); });
  auto values = drawn<float>("values", "<f4", kKeys * kHead, [] { return uniform(1); });
  std::vector<int32_t> positions(kLength);
  std::iota(positions.begin(), positions.end(), kKeys - kLength);
  const int32_t slot = 0;
  std::vector<float> out(kLength * kGroup * kHead);
  const grok1::Attention a{query.data(), keys.data(), values.data(), &slot,  positions.data(),
                           out.data(),   1,           1,             kLength, 1,
                           kGroup,       kKeys,       kHead,         0.1f,    30.0f};
  const int64_t rows = kLength * kGroup;
  std::vector<float> packed(rows * kHead), mixed(rows * kHead);
  std::vector<grok1::Softmax> softmax(grok1::num_blocks(rows));
  for (bool many : {false, true}) {
    for (int64_t block = 0; block < grok1::num_blocks(rows); ++block) {
      const int64_t first = block * grok1::kMaxRows, here = grok1::rows_of_block(rows, block);
      auto row = [&](int64_t m) { return query.data() + grok1::offset_of(a, 0, 0, m); };
      grok1::pack_block(row, rows, block, kHead, packed.data());
      softmax[block].mixed = mixed.data() + first * kHead;
      softmax[block].clear(here, kHead);
      if (!many) grok1::attend_few(a, 0, 0, first, here, 0, kKeys, softmax[block]);
    }
    if (many) grok1::attend_many(a, 0, 0, 0, rows, packed.data(), softmax.data());
    for (int64_t m = 0; m < rows; ++m) {
      const grok1::Softmax& block = softmax[m / grok1::kMaxRows];
      const int64_t place = m % grok1::kMaxRows;
      grok1::write_out(a, 0, 0, m, block.mixed + place * kHead, block.total[place]);
    }
    write("attention", "<f4", out);
  }
}

// A block of weights of which a group is small, rounded to 4 bits.
void rounding() {
  constexpr int64_t kBlock = 64, kGroup = 32;
  int64_t place = 0;
  auto weights = drawn<float>("weights", "<f4", kBlock * kColumns, [&] {
    return uniform(place++ < kGroup * kColumns ? 1 : 0.1f);
  });
  std::vector<uint8_t> values(kBlock / 2 * kColumns), subscales(grok1::kCodeRows * kColumns);
  std::vector<uint16_t> scales(kColumns);
  const grok1::RoundedMatrix to = {values.data(), subscales.data(), scales.data(),
                                   kColumns,      kBlock,           kGroup};
  for (int64_t column = 0; column < kColumns; column += grok1::kRoundedColumns) {
    const int64_t width = std::min<int64_t>(grok1::kRoundedColumns, kColumns - column);
    to.round(weights.data() + column, 0, column, width);
  }
  write("rounded_to_4_bits", "u1", values);
  write("rounded_to_4_bits", "u1", subscales);
  write("rounded_to_4_bits", "<u2", scales);
}

template <typename Function>
void elements(const char* name, const std::vector<float>& from, Function function) {
  std::vector<float> out(from.size());
  for (size_t i = 0; i < from.size(); i += grok1::kLanes) {
    grok1::store_floats(&out[i], function(grok1::load(&from[i])));
  }
  write(name, "<f4", out);
}

void functions() {
  auto from = drawn<float>("numbers", "<f4", 4096, [] { return uniform(20); });
  elements("exp", from, [](grok1::Floats x) { return grok1::exp(x); });
  elements("tanh", from, [](grok1::Floats x) { return grok1::tanh(x); });
  elements("gelu", from, [](grok1::Floats x) { return grok1::gelu(x); });
  elements("rounded", from, [](grok1::Floats x) {
    return grok1::to_floats(grok1::rounded(x, -15, 15));
  });
  std::vector<float> all(1 << 16);
  std::vector<uint16_t> halves(from.size());
  for (size_t half = 0; half < all.size(); ++half) all[half] = grok1::half_to_float(half);
  for (size_t i = 0; i < from.size(); ++i) {
    halves[i] = grok1::float_to_half(std::ldexp(from[i], static_cast<int>(i % 48) - 32));
  }
  write("halves", "<f4", all);
  write("to_halves", "<u2", halves);
  auto words = drawn<uint32_t>("words", "<u4", 1024, number);
  std::vector<uint32_t> high(words.size() / 2);
  for (size_t i = 0; i < high.size(); i += grok1::kLanes) {
    grok1::Words x, y;
    std::memcpy(&x, &words[i], sizeof(x));
    std::memcpy(&y, &words[high.size() + i], sizeof(y));
    const grok1::Words product = grok1::multiply_high(x, y);
    std::memcpy(&high[i], &product, sizeof(product));
  }
  write("high", "<u4", high);
  std::vector<uint8_t> found = {grok1::any(grok1::Ints{})};
  for (int lane = 0; lane < grok1::kLanes; ++lane) {
    grok1::Ints mask{};
    mask[lane] = -1;
    found.push_back(grok1::any(mask));
  }
  write("any", "u1", found);
}

}  // namespace

int main() {
  products();
  attention();
  rounding();
  functions();
}
