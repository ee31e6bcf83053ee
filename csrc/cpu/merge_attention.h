// Two attention results over disjoint keys become one.
#pragma once
#include <math.h>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

// out = share_a * a + share_b * b; a part without a share saw no key, and may hold anything.
template <class T>
void blend(const T* a, float share_a, const T* b, float share_b, int64_t width, T* out) {
  const Floats wa = broadcast(share_a), wb = broadcast(share_b);
  each_vector(width, [&](int64_t i, auto n) {
    Floats sum = share_a > 0 ? load(a + i, n) * wa : zeros();
    if (share_b > 0) sum = fma(load(b + i, n), wb, sum);
    store(out + i, sum, n);
  });
}

Status merge_attention(int dtype, const void* out_a, int64_t a_token, int64_t a_head, const void* lse_a,
                       int64_t lse_a_token, int64_t lse_a_head, const void* out_b, int64_t b_token, int64_t b_head,
                       const void* lse_b, int64_t lse_b_token, int64_t lse_b_head, void* out, void* lse,
                       TokenCount tokens, int64_t heads, int64_t v_dim, int threads) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    parallel_ranges(tokens, 2 * heads * v_dim, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * heads; row < end * heads; ++row) {
        const int64_t token = row / heads, head = row % heads;
        const float a = static_cast<const float*>(lse_a)[token * lse_a_token + head * lse_a_head];
        const float b = static_cast<const float*>(lse_b)[token * lse_b_token + head * lse_b_head];
        const float top = most(a, b);
        const bool empty = top == -INFINITY;
        const float ea = empty ? 0.0f : expf(a - top), eb = empty ? 0.0f : expf(b - top), total = ea + eb;
        static_cast<float*>(lse)[row] = empty ? top : top + logf(total);
        blend(static_cast<const T*>(out_a) + token * a_token + head * a_head, empty ? 0.0f : ea / total,
              static_cast<const T*>(out_b) + token * b_token + head * b_head, empty ? 0.0f : eb / total, v_dim,
              static_cast<T*>(out) + row * v_dim);
      }
    });
    return kOk;
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
