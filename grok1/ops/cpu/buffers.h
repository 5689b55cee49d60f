// Arrays and threads as XLA hands them to the kernels.

#pragma once

#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Pool = ffi::ThreadPool;
using Floats = ffi::Buffer<ffi::F32>;
using Values = ffi::Buffer<ffi::S8>;
using Scales = ffi::Buffer<ffi::BF16>;
using Bytes = ffi::Buffer<ffi::U8>;
using Halves = ffi::Buffer<ffi::F16>;
using Integers = ffi::Buffer<ffi::S32>;
using Flags = ffi::Buffer<ffi::PRED>;
using Handle = ffi::Buffer<ffi::U32>;
using Words = ffi::Buffer<ffi::U32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;
using IntegersOut = ffi::ResultBuffer<ffi::S32>;

inline ffi::Error no_such_matrix(int64_t number, int64_t count) {
  return ffi::Error::InvalidArgument("matrix " + std::to_string(number) + " of a stack of " +
                                     std::to_string(count));
}
