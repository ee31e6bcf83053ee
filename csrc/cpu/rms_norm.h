// RMS normalisation: a row is read once from memory, summed, and read again from the cache to be scaled.
#pragma once
#include <math.h>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

// sum over h of s[h]^2, s = x + residual; s is also stored, rounded, where there is a residual.
// Four sums run side by side, so that no addition waits for the one before.
template <class T>
float squares(const T* x, const T* residual, T* residual_out, int64_t hidden) {
  Floats total[4] = {zeros(), zeros(), zeros(), zeros()};
  int chain = 0;
  each_vector(hidden, [&](int64_t i, auto n) {
    Floats s = load(x + i, n);
    if (residual) {
      s = s + load(residual + i, n);
      store(residual_out + i, s, n);
    }
    total[chain] = fma(s, s, total[chain]);
    chain = (chain + 1) % 4;
  });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

Status rms_norm(int dtype, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                const void* weight, void* y, void* residual_out, TokenCount rows, int64_t hidden, float eps,
                int threads) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const T* gains = static_cast<const T*>(weight);
    parallel_ranges(rows, hidden, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* from = static_cast<const T*>(x) + row * x_stride;
        const T* added = residual ? static_cast<const T*>(residual) + row * residual_stride : nullptr;
        T* to = static_cast<T*>(y) + row * hidden;
        T* kept = residual ? static_cast<T*>(residual_out) + row * hidden : nullptr;
        const float mean = squares(from, added, kept, hidden) / float(hidden);
        const Floats root = broadcast(1.0f / sqrtf(mean + eps));
        each_vector(hidden, [&](int64_t i, auto n) {
          Floats s = load(from + i, n);
          if (added) s = s + load(added + i, n);
          store(to + i, s * root * load(gains + i, n), n);
        });
      }
    });
    return kOk;
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
