// Rows rounded to 8 bits: the largest value of a group from memory, then the group again from the cache, divided.
#pragma once
#include <float.h>
#include <math.h>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

// One group; returns its scale.  calibrated: a scale from outside, or 0.
template <class C, class T>
float quantize_group(const T* x, int64_t width, float largest_value, float calibrated, C* values) {
  Floats top = zeros(), poison = zeros();  // 0 * x is NaN for what is not finite
  each_vector(width, [&](int64_t i, auto n) {
    const Floats v = load(x + i, n);
    top = max(top, max(v, -v));
    poison = fma(v, zeros(), poison);
  });
  if (sum(poison) != 0) {
    std::memset(values, 0, width);
    return NAN;
  }
  float scale = calibrated > 0 ? calibrated : largest(top) / largest_value;
  if (scale < FLT_MIN && calibrated == 0) scale = 1;
  const Floats unit = broadcast(scale);
  each_vector(width, [&](int64_t i, auto n) { store(values + i, load(x + i, n) / unit, n); });
  return scale;
}

Status quantize_activation(int dtype, int value_dtype, const void* x, int64_t x_stride, void* values, void* scales,
                           float calibrated, TokenCount rows, int64_t hidden, int64_t group, int64_t groups,
                           int threads) {
  const auto quantize = [&](auto element, auto value, float largest_value) {
    using T = decltype(element);
    using C = decltype(value);
    parallel_ranges(rows, 2 * hidden, threads, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin * groups; part < end * groups; ++part) {
        const int64_t row = part / groups, first = part % groups * group;
        static_cast<float*>(scales)[part] =
            quantize_group(static_cast<const T*>(x) + row * x_stride + first, least(group, hidden - first),
                           largest_value, calibrated, static_cast<C*>(values) + row * hidden + first);
      }
    });
    return kOk;
  };
  return with_float(dtype, [&](auto element) {
    if (value_dtype == kInt8) return quantize(element, int8_t{}, 127.0f);
    if (value_dtype == kFloat8E4M3) return quantize(element, e4m3{}, 448.0f);
    return kBadDType;
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
