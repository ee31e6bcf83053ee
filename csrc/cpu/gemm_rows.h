// Rows of x on their way into a product: residual, norm, act-order, rounding, and the order in which weights want them.
#pragma once
#include "cpu/gemm_panel.h"

namespace llmkernels::LLMKERNELS_ISA {

// Rows that are ready, chunk by chunk: those of a chunk lie next to each other, where whole rows a power of two apart would
// fight for the same lines of a cache.  Each row and chunk has the factor that undoes its rounding, and the sum of its x.
// What lies beyond the last column is zeros.
template <class Input>
struct Rows {
  int64_t count, chunk, chunks;
  Input* x;        // [chunks][count][chunk]
  float* factors;  // [chunks][count]
  float* sums;     // [chunks][count]

  Rows(int64_t count, int64_t chunk, int64_t columns) : count(count), chunk(chunk), chunks(ceil_div(columns, chunk)) {}
  int64_t bytes() const { return count * chunks * (chunk * int64_t(sizeof(Input)) + 2 * int64_t(sizeof(float))); }
  void place(void* memory) {
    x = static_cast<Input*>(memory);
    factors = reinterpret_cast<float*>(x + count * chunks * chunk);
    sums = factors + count * chunks;
  }
  Input* at(int64_t c, int64_t row) const { return x + (c * count + row) * chunk; }
};

// x + residual, kept where asked for: s[columns] and zeros up to the next 8.
template <class T>
void add_residual(const GemmCall& call, int64_t row, float* s) {
  const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
  const T* residual = call.residual ? static_cast<const T*>(call.residual) + row * call.residual_stride : nullptr;
  T* kept = call.residual_out ? static_cast<T*>(call.residual_out) + row * call.columns : nullptr;
  each_vector(call.columns, [&](int64_t i, auto n) {
    Floats value = load(x + i, n);
    if (residual) value += load(residual + i, n);
    if (kept) store(kept + i, value, n);
    store(s + i, value, n);
  });
}

template <class T>
void normalize(const GemmCall& call, float* s) {
  const int64_t columns = call.columns;
  const T* gain = static_cast<const T*>(call.norm_weight);
  const T* bias = static_cast<const T*>(call.norm_bias);
  Floats mean = zeros(), squares[2] = {zeros(), zeros()};
  if (call.norm == kLayerNorm) {
    each_vector(columns, [&](int64_t i, auto n) { mean += load(s + i, n); });
    mean = broadcast(sum(mean) / float(columns));
    each_vector(columns, [&](int64_t i, auto n) { store(s + i, load(s + i, n) - mean, n); });
  }
  each_vector(columns, [&](int64_t i, auto n) {
    const Floats value = load(s + i, n);
    Floats& part = squares[i / kLanes % 2];
    part = fma(value, value, part);
  });
  const Floats factor = broadcast(1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / float(columns) + call.eps));
  each_vector(columns, [&](int64_t i, auto n) {
    Floats value = load(s + i, n) * factor;
    if (gain) value *= load(gain + i, n);
    if (bias) value += load(bias + i, n);
    store(s + i, value, n);
  });
}

// Rounds columns first .. first + count to the levels of `rounding`, and returns what they are to be multiplied by again.
// A NaN or an infinity makes that NaN, and the levels 0.
inline float round_span(const GemmCall& call, float* s, int64_t count) {
  Floats peaks = zeros(), check = zeros();
  each_vector(count, [&](int64_t i, auto n) {
    const Floats value = load(s + i, n);
    peaks = max(peaks, max(value, -value));
    check = fma(value, zeros(), check);  // NaN where the value is not finite
  });
  const float levels = call.rounding == kToInt8 ? 127.0f : 448.0f, lowest = call.rounding == kToInt8 ? -128.0f : -448.0f;
  const bool finite = sum(check) == 0.0f;
  float scale = call.input_scale ? *call.input_scale : largest(peaks) / levels;
  if (!call.input_scale && scale < 0x1p-126f) scale = 1.0f;
  each_vector(count, [&](int64_t i, auto n) {
    if (!finite) return store(s + i, zeros(), n);
    const Floats ratio = min(broadcast(levels), max(broadcast(lowest), load(s + i, n) / broadcast(scale)));
    store(s + i, call.rounding == kToInt8 ? round(ratio) : round_e4m3(ratio), n);
  });
  return finite ? scale : __builtin_nanf("");
}

LLMKERNELS_INLINE float number(float x) { return x; }
LLMKERNELS_INLINE float number(bf16 x) { return widen(x); }
LLMKERNELS_INLINE float number(int x) { return float(x); }
template <class Input>
LLMKERNELS_INLINE Input encoded(float value) {
  if constexpr (__is_same(Input, float) || __is_same(Input, bf16)) {
    return narrow<Input>(value);
  } else {
    return Input(value);  // a whole number
  }
}

// x for a code that is 16^(i % 4) times too large.  Only what is below 2^-114 loses bits by it.
LLMKERNELS_INLINE float in_place(float x, int i) { return x * bit_cast<float>(uint32_t(127 - 4 * (i % 4)) << 23); }
template <class Input>
LLMKERNELS_INLINE Input in_place(Input x, int) {
  return x;
}

// Row `row` of the call, into row `into` of those that are ready.  `work` is two rows of float32.
template <class Weight, class T>
void prepare_row(const GemmCall& call, int64_t row, const Rows<typename Weight::Input>& rows, int64_t into, float* work) {
  using Input = typename Weight::Input;
  const int64_t padded = call.padded(), span = call.rounding_group ? call.rounding_group : call.columns;
  float* s = work;
  add_residual<T>(call, row, s);
  if (call.norm != kNoNorm) normalize<T>(call, s);
  float* stored = call.permutation ? work + padded + kLanes : s;
  if (call.permutation)
    for (int64_t i = 0; i < call.columns; ++i) stored[i] = s[call.permutation[i]];
  for (int64_t i = call.columns; i < padded; ++i) stored[i] = 0;

  float factor = 1.0f;
  for (int64_t c = 0; c < rows.chunks; ++c) {
    const int64_t first = c * rows.chunk, end = least(first + rows.chunk, call.columns);
    Input* x = rows.at(c, into) - first;
    if (call.rounding != kNoRounding && first % span == 0)
      factor = round_span(call, stored + first, least(span, call.columns - first));
    float total = 0;
    for (int64_t block = first; block < end; block += 8)
      for (int i = 0; i < 8; ++i) {
        const Input value = encoded<Input>(stored[block + Weight::kOrder[i]]);
        total += number(value);
        x[block + i] = Weight::kScaled ? in_place(value, i) : value;
      }
    rows.factors[c * rows.count + into] = factor;
    rows.sums[c * rows.count + into] = total;
  }
}

}  // namespace llmkernels::LLMKERNELS_ISA
