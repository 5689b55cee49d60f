// Rounding to 4 bits, as XLA sees it.

#include "buffers.h"
#include "rounding.h"
#include "threads.h"

namespace {

using BytesOut = ffi::ResultBuffer<ffi::U8>;
using HalvesOut = ffi::ResultBuffer<ffi::F16>;

constexpr int64_t kUnitColumns = 8 * grok1::kRoundedColumns;

// Rounds all blocks; with feedback they are one.
ffi::Error round_blocks(Pool pool, Floats weight, const grok1::Feedback* feedback, BytesOut values,
                        BytesOut subscales, HalvesOut scales) {
  const int64_t depth = weight.dimensions()[0], columns = weight.dimensions()[1];
  const int64_t num_blocks = scales->dimensions()[0];
  const auto like = grok1::matrix_of(values->typed_data(), subscales->typed_data(), nullptr, 0,
                                     depth, columns, num_blocks);
  const grok1::RoundedMatrix to = {values->typed_data(), subscales->typed_data(),
                                   reinterpret_cast<uint16_t*>(scales->typed_data()), columns,
                                   like.block, like.group};
  if (like.block > grok1::kMostBlockRows || like.block % 2 != 0 ||
      like.block > grok1::kMostGroups * like.group) {
    return ffi::Error::InvalidArgument("blocks of " + std::to_string(like.block) + " rows");
  }
  const int64_t parts = (columns + kUnitColumns - 1) / kUnitColumns;
  grok1::run_units(pool, num_blocks * parts, [&](int64_t unit) {
    const int64_t number = unit / parts, end = std::min((unit % parts + 1) * kUnitColumns, columns);
    for (int64_t column = unit % parts * kUnitColumns; column < end;
         column += grok1::kRoundedColumns) {
      to.round(weight.typed_data() + number * to.block * columns + column, number, column,
               std::min<int64_t>(grok1::kRoundedColumns, end - column), feedback);
    }
  });
  return ffi::Error::Success();
}

ffi::Error Int4Round(Pool pool, Floats weight, BytesOut values, BytesOut subscales,
                     HalvesOut scales) {
  return round_blocks(pool, weight, nullptr, values, subscales, scales);
}

ffi::Error Int4RoundBlock(Pool pool, Floats weight, Floats original, Floats factor,
                          BytesOut values, BytesOut subscales, HalvesOut scales, FloatsOut errors,
                          FloatsOut lost) {
  const grok1::Feedback feedback = {original.typed_data(), factor.typed_data(),
                                    errors->typed_data(), lost->typed_data()};
  return round_blocks(pool, weight, &feedback, values, subscales, scales);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_int4_round, Int4Round,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_int4_round_block, Int4RoundBlock,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
