// New keys or values into their slots of a paged cache, quantized where the cache is.
#pragma once
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

// Called once for the keys and once for the values.  A slot outside the cache is skipped.
Status write_kv(int dtype, int cache_dtype, const void* rows, int64_t row_token, int64_t row_head, void* cache,
                int64_t page_stride, int64_t slot_stride, int64_t head_stride, const void* slots, const void* scale,
                bool scale_per_head, TokenCount tokens, int64_t heads, int64_t dim, int64_t pages, int64_t page_size,
                int threads) {
  const int64_t* slot_of = static_cast<const int64_t*>(slots);
  const float* scales = static_cast<const float*>(scale);
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    return with_element(cache_dtype, [&](auto stored) {
      using C = decltype(stored);
      if constexpr (sizeof(C) > 1 && !std::is_same_v<T, C>) {
        return kBadDType;
      } else {
        parallel_ranges(tokens, heads * dim, threads, [&](int64_t begin, int64_t end) {
          for (int64_t token = begin; token < end; ++token) {
            const int64_t slot = slot_of[token];
            if (slot < 0 || slot >= pages * page_size) continue;
            const T* from = static_cast<const T*>(rows) + token * row_token;
            C* to = static_cast<C*>(cache) + slot / page_size * page_stride + slot % page_size * slot_stride;
            for (int64_t head = 0; head < heads; ++head, from += row_head, to += head_stride) {
              if constexpr (std::is_same_v<T, C>) {
                std::memcpy(to, from, dim * sizeof(T));
              } else {
                const Floats unit = broadcast(scales ? scales[scale_per_head ? head : 0] : 1.0f);
                each_vector(dim, [&](int64_t i, auto n) { store(to + i, load(from + i, n) / unit, n); });
              }
            }
          }
        });
        return kOk;
      }
    });
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
