// Weights that were not packed: rows of `features`, as a linear layer holds them.
//
// Few rows of x: each weight row is a stream, several rows of x are multiplied with it at once, lanes along the columns.
// Many rows of x: a chunk of 64 weight rows is transposed into a panel, and multiplied as a decoded one is.
#pragma once
#include "cpu/gemm_panel.h"
#include "cpu/gemm_rows.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int kFewChannels = 4;  // multiplied at once: they share each load of x
constexpr int kFewRowsAtOnce = kRegisters == 32 ? 4 : 2;

// What a vector of the weight meets: as many columns as float32 has lanes, or pairs of bfloat16.
template <class Input>
constexpr int kSpan = kLanes * (__is_same(Input, bf16) ? 2 : 1);
LLMKERNELS_INLINE Floats load_span(const float* x) { return load(x); }
LLMKERNELS_INLINE Pairs load_span(const bf16* x) { return load_pairs(x); }
template <class T>
LLMKERNELS_INLINE Floats load_weight(const T* w, Floats) {
  return load(w);
}
LLMKERNELS_INLINE Pairs load_weight(const bf16* w, Pairs) { return load_pairs(w); }
LLMKERNELS_INLINE Floats product(Floats sum, Floats w, Floats x) { return fma(w, x, sum); }
LLMKERNELS_INLINE Floats product(Floats sum, Pairs w, Pairs x) { return dot(w, x, sum); }

// Rows of the weight that will be needed, fetched line by line while others are multiplied: into the second cache, because
// the first one waits for too few lines at once to keep memory busy.
template <int Lines>  // at once
struct Ahead {
  const char* line;
  int64_t left;
  LLMKERNELS_INLINE void step() {
    if (left <= 0) return;
    for (int i = 0; i < Lines; ++i) __builtin_prefetch(line + 64 * i, 0, 2);
    line += 64 * Lines;
    left -= Lines;
  }
};

// totals[row][c] of Rows rows for Channels rows of the weight.
template <int Rows, int Channels, int Lines, class T, class Input>
LLMKERNELS_INLINE void dots(const T* const (&weight)[Channels], const Input* x, int64_t x_stride, int64_t columns,
                            Ahead<Lines>& ahead, float* totals) {
  using Span = decltype(load_span(x));
  Floats sum_of[Rows * Channels];
#pragma GCC unroll 16
  for (Floats& sum : sum_of) sum = zeros();
  const auto multiply = [&](const auto& weights, const Input* xs, int64_t stride, int64_t i) {
    Span w[Channels];
#pragma GCC unroll 16
    for (int c = 0; c < Channels; ++c) w[c] = load_weight(weights[c] + i, Span{});
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Span value = load_span(xs + row * stride + i);
#pragma GCC unroll 16
      for (int c = 0; c < Channels; ++c)
        sum_of[row * Channels + c] = product(sum_of[row * Channels + c], w[c], value);
    }
  };
  int64_t i = 0;
  for (; i + kSpan<Input> <= columns; i += kSpan<Input>) {
    ahead.step();
    multiply(weight, x, x_stride, i);
  }
  if (i < columns) {  // the last columns, with zeros behind them
    T rest[Channels][kSpan<Input>] = {};
    Input rest_x[Rows][kSpan<Input>] = {};
    for (int c = 0; c < Channels; ++c) std::memcpy(rest[c], weight[c] + i, (columns - i) * sizeof(T));
    for (int row = 0; row < Rows; ++row) std::memcpy(rest_x[row], x + row * x_stride + i, (columns - i) * sizeof(Input));
    multiply(rest, rest_x[0], kSpan<Input>, 0);
  }
  float found[Rows * Channels];
  if constexpr (Rows * Channels == kLanes) {
    store(found, sums(sum_of));
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < Rows * Channels; ++k) found[k] = sum(sum_of[k]);
  }
  for (int row = 0; row < Rows; ++row) std::memcpy(totals + row * kPanel, found + row * Channels, Channels * sizeof(float));
}

template <int Most, int Channels, int Lines, class T, class Input>
LLMKERNELS_INLINE void dots_most(const T* const (&weight)[Channels], const Input* x, int64_t x_stride, int64_t columns,
                                 int rows, Ahead<Lines>& ahead, float* totals) {
  if constexpr (Most > 0) {
    for (; rows >= Most; rows -= Most, x += Most * x_stride, totals += Most * kPanel)
      dots<Most>(weight, x, x_stride, columns, ahead, totals);
    dots_most<Most - 1>(weight, x, x_stride, columns, rows, ahead, totals);
  }
}

// totals[rows][64] of a panel, for few rows.  The rows of the weight that come kAhead bytes later are fetched meanwhile,
// spread over the rows of x, so that memory has work as long as arithmetic has; behind the last ones those of the panel
// that this thread takes next, if all are equally fast.
template <int Lines, class T, class Input>
void multiply_dense_few(const GemmCall& call, int64_t panel, const Rows<Input>& x, int64_t first, int rows, float* totals) {
  const T* values = static_cast<const T*>(call.values);
  const int64_t bytes = most<int64_t>(kFewChannels * call.values_stride * sizeof(T), 1);
  const int later = kFewChannels * int(least<int64_t>(kPanel / kFewChannels, ceil_div(int64_t{2 * kAhead}, bytes)));
  for (int channel = 0; channel < kPanel; channel += kFewChannels) {
    const T* weight[kFewChannels];
    for (int c = 0; c < kFewChannels; ++c)
      weight[c] = values + most<int64_t>(call.feature(panel, channel + c), 0) * call.values_stride;
    const int then = channel + later;
    const int64_t soon = call.feature(panel + then / kPanel * call.threads, then % kPanel);
    Ahead<Lines> ahead{reinterpret_cast<const char*>(values + most<int64_t>(soon, 0) * call.values_stride),
                       soon < 0 ? 0 : ceil_div(bytes, int64_t{64})};
    dots_most<kFewRowsAtOnce>(weight, x.at(0, first), x.line, call.columns, rows, ahead, totals + channel);
  }
}

template <class T, class Input>
void multiply_dense_few(const GemmCall& call, int64_t panel, const Rows<Input>& x, int64_t first, int rows, float* totals) {
  const int passes = ceil_div(rows, kFewRowsAtOnce);  // over each row of the weight
  if (passes == 1) return multiply_dense_few<kFewChannels, T>(call, panel, x, first, rows, totals);
  if (passes < kFewChannels) return multiply_dense_few<ceil_div(kFewChannels, 2), T>(call, panel, x, first, rows, totals);
  multiply_dense_few<1, T>(call, panel, x, first, rows, totals);
}

// totals[rows][64] += one chunk of a panel, for many rows; `scratch` holds a panel of the chunk.
template <class Panel, class T>
void multiply_dense_chunk(const GemmCall& call, int64_t panel, int64_t column, const typename Panel::Input* x,
                          int rows, const Scaling& scaling, float* totals, uint8_t* scratch) {
  using Input = typename Panel::Input;
  const int64_t columns = least<int64_t>(kChunk<Input>, call.columns - column), padded = ceil_div(columns, 8) * 8;
  alignas(64) Input line[kChunk<Input> + kLanes];
  for (int channel = 0; channel < kPanel; ++channel) {
    const int64_t feature = call.feature(panel, channel);
    const T* row = static_cast<const T*>(call.values) + most<int64_t>(feature, 0) * call.values_stride + column;
    each_vector(columns, [&](int64_t i, auto n) { store(line + i, load(row + i, n), n); });
    for (int64_t i = columns; i < padded; ++i) line[i] = Input{};
    constexpr int kInWord = sizeof(uint32_t) / sizeof(Input);
    for (int64_t i = 0; i < padded / kInWord; ++i)
      std::memcpy(scratch + (i * kPanel + channel) * sizeof(uint32_t), line + i * kInWord, sizeof(uint32_t));
  }
  multiply_most<kMany, false>(Panel{{scratch, nullptr, 0}}, x, rows, padded / Panel::kColumns, scaling, totals);
}

}  // namespace llmkernels::LLMKERNELS_ISA
