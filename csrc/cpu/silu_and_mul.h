// The gate of SwiGLU: one pass, two streams in and one out.
#pragma once
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

Status silu_and_mul(int dtype, const void* x, int64_t x_stride, void* y, TokenCount rows, int64_t width, int threads) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    parallel_ranges(rows, 4 * width, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(x) + row * x_stride;
        T* to = static_cast<T*>(y) + row * width;
        each_vector(width, [&](int64_t i, auto n) {
          store(to + i, silu(load(gate + i, n)) * load(gate + width + i, n), n);
        });
      }
    });
    return kOk;
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
