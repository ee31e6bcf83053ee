// Rotary position embedding: each token's heads are read once, and written once, rotated.
#pragma once
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

// One head: channels j and j + half, or 2j and 2j + 1, turn by angle j.
template <class T>
void rotate(const T* x, const float* cos, const float* sin, int64_t half, int64_t dim, bool interleaved, T* out) {
  if (interleaved) {
    for (int64_t j = 0; j < half; ++j) {
      const float a = widen(x[2 * j]), b = widen(x[2 * j + 1]);
      out[2 * j] = narrow<T>(a * cos[j] - b * sin[j]);
      out[2 * j + 1] = narrow<T>(b * cos[j] + a * sin[j]);
    }
  } else {
    each_vector(half, [&](int64_t j, auto n) {
      const Floats a = load(x + j, n), b = load(x + half + j, n), c = load(cos + j, n), s = load(sin + j, n);
      store(out + j, fma(a, c, -(b * s)), n);
      store(out + half + j, fma(b, c, a * s), n);
    });
  }
  std::memcpy(out + 2 * half, x + 2 * half, (dim - 2 * half) * sizeof(T));
}

Status rotary_embedding(int dtype, const void* q, int64_t q_token, int64_t q_head, const void* k, int64_t k_token,
                        int64_t k_head, const void* cos, int64_t cos_stride, const void* sin, int64_t sin_stride,
                        const void* positions, void* q_out, void* k_out, TokenCount tokens, int64_t heads,
                        int64_t kv_heads, int64_t dim, int64_t half, int64_t max_positions, bool interleaved,
                        int threads) {
  const int64_t* at = static_cast<const int64_t*>(positions);
  for (int64_t token = 0; token < tokens; ++token)
    if (at[token] < 0 || at[token] >= max_positions) return kBadIndex;
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    parallel_ranges(tokens, 2 * (heads + kv_heads) * dim, threads, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const float* c = static_cast<const float*>(cos) + at[token] * cos_stride;
        const float* s = static_cast<const float*>(sin) + at[token] * sin_stride;
        const T* from = static_cast<const T*>(q) + token * q_token;
        T* to = static_cast<T*>(q_out) + token * heads * dim;
        for (int64_t h = 0; h < heads; ++h) rotate(from + h * q_head, c, s, half, dim, interleaved, to + h * dim);
        from = static_cast<const T*>(k) + token * k_token;
        to = static_cast<T*>(k_out) + token * kv_heads * dim;
        for (int64_t h = 0; h < kv_heads; ++h) rotate(from + h * k_head, c, s, half, dim, interleaved, to + h * dim);
      }
    });
    return kOk;
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
