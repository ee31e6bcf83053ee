// Rows of x on their way into a product: residual, norm, act-order, rounding, and the order in which weights want them.
#pragma once
#include "cpu/gemm_panel.h"

namespace llmkernels::LLMKERNELS_ISA {

// Rows that are ready, line by line: `line` columns, one chunk or some, of all rows next to each other, where whole rows a
// power of two apart would fight for the same lines of a cache.  Each row and chunk has the factor that undoes its
// rounding, and the sum of its x.  What lies beyond the last column is zeros.
template <class Input>
struct Rows {
  int64_t count, chunk, chunks, line;
  Input* x;        // [lines][count][line]
  float* factors;  // [chunks][count]
  float* sums;     // [chunks][count]

  Rows(int64_t count, int64_t chunk, int64_t line, int64_t columns)
      : count(count), chunk(chunk), chunks(ceil_div(columns, chunk)), line(line) {}
  int64_t elements() const { return ceil_div(chunks * chunk, line) * line * count; }
  int64_t bytes() const { return elements() * int64_t(sizeof(Input)) + 2 * chunks * count * int64_t(sizeof(float)); }
  void place(void* memory) {
    x = static_cast<Input*>(memory);
    factors = reinterpret_cast<float*>(x + elements());
    sums = factors + count * chunks;
  }
  Input* at(int64_t c, int64_t row) const {
    const int64_t column = c * chunk;
    return x + (column / line * count + row) * line + column % line;
  }
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

// Elements of x as a vector stores them; int16 ones are made of int8.
template <class Input>
using Narrow = std::conditional_t<__is_same(Input, int16_t), int8_t, Input>;

// `count` columns, a multiple of 8, into the form that weights want; returns the sum of what they became.  For codes that
// stay in place, 16^(i % 4) times too large, x becomes as much smaller, and only what is below 2^-114 loses bits by it.
template <class Weight>
float arrange(const float* from, int64_t count, typename Weight::Input* to) {
  static constexpr float kSmaller[16] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 1, 0x1p-4f, 0x1p-8f, 0x1p-12f,
                                         1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 1, 0x1p-4f, 0x1p-8f, 0x1p-12f};
  using Input = typename Weight::Input;
  Floats total = zeros();
  if constexpr (Weight::kOrder == kInOrder && !Weight::kScaled && __is_same(Narrow<Input>, Input)) {
    each_vector(count, [&](int64_t i, auto n) {
      store(to + i, load(from + i, n), n);
      total += load(to + i, n);
    });
    return sum(total);
  }
  constexpr int kSpan = most(kLanes, 8);
  for (int64_t i = 0; i < count; i += kSpan) {
    Narrow<Input> line[kSpan] = {};
    for (int lane = 0; lane < kSpan && i + lane < count; lane += kLanes) {
      const auto part = [&](auto n) {
        const Floats value = load(from + i + lane, n);
        store(line + lane, value);
        total += load(line + lane);
        if (Weight::kScaled) store(line + lane, value * load(kSmaller));
      };
      i + lane + kLanes <= count ? part(Whole{}) : part(count - i - lane);
    }
    for (int eight = 0; eight < kSpan && i + eight < count; eight += 8)
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) to[i + eight + k] = Input(line[eight + Weight::kOrder[k]]);
  }
  return sum(total);
}

// Row `row` of the call, into row `into` of those that are ready.  `work` is two rows of float32.
template <class Weight, class T>
void prepare_row(const GemmCall& call, int64_t row, const Rows<typename Weight::Input>& rows, int64_t into, float* work) {
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
    const int64_t first = c * rows.chunk;
    if (call.rounding != kNoRounding && first % span == 0)
      factor = round_span(call, stored + first, least(span, call.columns - first));
    rows.factors[c * rows.count + into] = factor;
    rows.sums[c * rows.count + into] = arrange<Weight>(stored + first, least(rows.chunk, padded - first), rows.at(c, into));
  }
}

}  // namespace llmkernels::LLMKERNELS_ISA
