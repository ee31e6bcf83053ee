// Weights that were not packed: rows of `features`, as a linear layer holds them.
//
// Few rows of x: each weight row is a stream, several rows of x are multiplied with it at once, lanes along the columns.
// Many rows of x: a chunk of 64 weight rows is transposed into a panel, and multiplied as a decoded one is.
#pragma once
#include "cpu/gemm_panel.h"
#include "cpu/gemm_rows.h"

namespace llmkernels::LLMKERNELS_ISA {

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

// totals[row][c] of Rows rows for Channels rows of the weight.  ahead: how many elements further on it is fetched
// meanwhile; 0: nothing is.
template <int Rows, int Channels, class T, class Input>
LLMKERNELS_INLINE void dots(const T* const (&weight)[Channels], const Input* x, int64_t x_stride, int64_t columns,
                            int64_t ahead, float* totals) {
  using Span = decltype(load_span(x));
  Floats sum_of[Rows * Channels];
#pragma GCC unroll 16
  for (Floats& sum : sum_of) sum = zeros();
  const auto multiply = [&](const auto& weights, const Input* xs, int64_t stride, int64_t i) {
    Span w[Channels];
#pragma GCC unroll 16
    for (int c = 0; c < Channels; ++c) {
      w[c] = load_weight(weights[c] + i, Span{});
      if (ahead) __builtin_prefetch(weights[c] + i + ahead, 0, 2);
    }
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Span value = load_span(xs + row * stride + i);
#pragma GCC unroll 16
      for (int c = 0; c < Channels; ++c)
        sum_of[row * Channels + c] = product(sum_of[row * Channels + c], w[c], value);
    }
  };
  int64_t i = 0;
  for (; i + kSpan<Input> <= columns; i += kSpan<Input>) multiply(weight, x, x_stride, i);
  if (i < columns) {  // the last columns, with zeros behind them
    T rest[Channels][kSpan<Input>] = {};
    Input rest_x[Rows][kSpan<Input>] = {};
    for (int c = 0; c < Channels; ++c) std::memcpy(rest[c], weight[c] + i, (columns - i) * sizeof(T));
    for (int row = 0; row < Rows; ++row) std::memcpy(rest_x[row], x + row * x_stride + i, (columns - i) * sizeof(Input));
    ahead = 0;
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

template <int Most, int Channels, class T, class Input>
LLMKERNELS_INLINE void dots_most(const T* const (&weight)[Channels], const Input* x, int64_t x_stride, int64_t columns,
                                 int rows, int64_t ahead, float* totals) {
  if constexpr (Most > 0) {
    for (; rows >= Most; rows -= Most, x += Most * x_stride, totals += Most * kPanel, ahead = 0)
      dots<Most>(weight, x, x_stride, columns, ahead, totals);
    dots_most<Most - 1>(weight, x, x_stride, columns, rows, ahead, totals);
  }
}

// totals[rows][64] of a panel, for few rows.
template <class T, class Input>
void multiply_dense_few(const GemmCall& call, int64_t panel, const Rows<Input>& x, int64_t first, int rows, float* totals) {
  constexpr int kChannels = 4, kMost = kRegisters == 32 ? 4 : 2;  // four streams of memory are faster than one
  // Short rows end before the processor has seen that they are streams: the next channels are asked for instead.  Into the
  // second cache, because the first one waits for too few lines at once to keep memory busy beside the products.
  const int64_t next = kChannels * call.values_stride, near = 2 * kAhead / int64_t(sizeof(T));
  const int64_t ahead = call.columns >= near ? near : ceil_div(near, most<int64_t>(next, 1)) * next;
  for (int channel = 0; channel < kPanel; channel += kChannels) {
    const T* weight[kChannels];
    for (int c = 0; c < kChannels; ++c) {
      const int64_t feature = call.feature(panel, channel + c);
      weight[c] = static_cast<const T*>(call.values) + most<int64_t>(feature, 0) * call.values_stride;
    }
    dots_most<kMost>(weight, x.at(0, first), x.line, call.columns, rows, ahead, totals + channel);
  }
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
