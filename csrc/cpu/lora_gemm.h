// A low-rank update of each row by its own adapter: y[r] += scale * (x[r] @ a^T) @ b^T.
//
//   1  hidden[r] = x[r] @ a^T, tasks of one row and kLanes ranks
//   2  y[r] += scale * hidden[r] @ b^T, tasks of one row and kOutputs outputs
//
// A row is multiplied alone, so that adapters may come in any order and a row's result depends on it alone; both factors of
// an adapter fit the caches, where the next row with the same one finds them.
#pragma once
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/table.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int64_t kOutputs = 256;

// Lane i: x . weight[i], for the `present` rows of a weight with unit stride; other lanes repeat the last one.
template <class T, class X>
LLMKERNELS_INLINE Floats dot_rows(const T* weight, int64_t stride, int64_t present, const X* x, int64_t columns) {
  Floats parts[kLanes] = {};
  each_vector(columns, [&](int64_t i, auto n) {
    const Floats value = load(x + i, n);
    for (int lane = 0; lane < kLanes; ++lane) {
      const T* row = weight + least<int64_t>(lane, present - 1) * stride;
      parts[lane] = fma(load(row + i, n), value, parts[lane]);
    }
  });
  return sums(parts);
}

// y[outputs first .. end] of one row.
template <class T>
void add_outputs(T* y, const T* b, int64_t b_output, int64_t b_rank, const float* hidden, int64_t rank, float scale,
                 int64_t first, int64_t end) {
  each_vector(end - first, [&](int64_t i, auto n) {
    Floats update = zeros();
    if (b_rank == 1) {
      update = dot_rows(b + (first + i) * b_output, b_output, int64_t(n), hidden, rank);
    } else {  // unit stride along the outputs
      for (int64_t r = 0; r < rank; ++r) update = fma(load(b + r * b_rank + first + i, n), broadcast(hidden[r]), update);
    }
    store(y + first + i, fma(update, broadcast(scale), load(y + first + i, n)), n);
  });
}

template <class T>
Status lora_gemm_in(T* y, int64_t y_stride, const T* x, int64_t x_stride, const T* a, const T* b, int64_t b_adapter,
                    int64_t b_output, int64_t b_rank, const int32_t* adapters, const float* scales, int64_t rows,
                    int64_t columns, int64_t outputs, int64_t rank, int64_t count, int threads) {
  const int64_t blocks = ceil_div(rank, int64_t{kLanes}), width = blocks * kLanes, ranges = ceil_div(outputs, kOutputs);
  for (int64_t row = 0; row < rows; ++row)
    if (adapters[row] < -1 || adapters[row] >= count) return kBadIndex;
  float* hidden = static_cast<float*>(scratch(kShared, (rows * width + 1) * int64_t(sizeof(float))));
  if (!hidden) return kOutOfMemory;

  parallel_ranges(rows * blocks, columns * kLanes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks, first = task % blocks * kLanes;
      if (adapters[row] < 0) continue;
      const T* factor = a + (adapters[row] * rank + first) * columns;
      const int64_t present = least<int64_t>(kLanes, rank - first);
      store(hidden + row * width + first, dot_rows(factor, columns, present, x + row * x_stride, columns));
    }
  });
  parallel_ranges(rows * ranges, kOutputs * rank, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / ranges, first = task % ranges * kOutputs, i = adapters[row];
      if (i < 0) continue;
      add_outputs(y + row * y_stride, b + i * b_adapter, b_output, b_rank, hidden + row * width, rank, scales[i], first,
                  least(first + kOutputs, outputs));
    }
  });
  return kOk;
}

inline Status lora_gemm(int dtype, void* y, int64_t y_stride, const void* x, int64_t x_stride, const void* a, const void* b,
                        int64_t b_adapter, int64_t b_output, int64_t b_rank, const void* adapters, const void* scales,
                        TokenCount rows, int64_t columns, int64_t outputs, int64_t rank, int64_t count, int threads) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    return lora_gemm_in(static_cast<T*>(y), y_stride, static_cast<const T*>(x), x_stride, static_cast<const T*>(a),
                        static_cast<const T*>(b), b_adapter, b_output, b_rank, static_cast<const int32_t*>(adapters),
                        static_cast<const float*>(scales), rows, columns, outputs, rank, count, threads);
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
