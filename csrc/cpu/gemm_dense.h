// Weights that were not packed: rows of `features`, as a linear layer holds them.
//
// Few rows of x: each weight row is a stream, several rows of x are multiplied with it at once, lanes along the columns.
// Many rows of x: a chunk of 64 weight rows is transposed into a panel, and multiplied as a decoded one is.
#pragma once
#include "cpu/gemm_panel.h"
#include "cpu/gemm_rows.h"

namespace llmkernels::LLMKERNELS_ISA {

// totals[row][c] of Rows rows for Channels rows of the weight.
template <int Rows, int Channels, class T>
LLMKERNELS_INLINE void dots(const T* const (&weight)[Channels], const float* x, int64_t x_stride, int64_t columns,
                            float* totals) {
  Floats sum_of[Channels][Rows] = {};
  each_vector(columns, [&](int64_t i, auto n) {
    Floats w[Channels];
    for (int c = 0; c < Channels; ++c) w[c] = load(weight[c] + i, n);
    for (int row = 0; row < Rows; ++row) {
      const Floats value = load(x + row * x_stride + i, n);
      for (int c = 0; c < Channels; ++c) sum_of[c][row] = fma(w[c], value, sum_of[c][row]);
    }
  });
  for (int c = 0; c < Channels; ++c)
    for (int row = 0; row < Rows; ++row) totals[row * kPanel + c] = sum(sum_of[c][row]);
}

template <int Most, int Channels, class T>
LLMKERNELS_INLINE void dots_most(const T* const (&weight)[Channels], const float* x, int64_t x_stride, int64_t columns,
                                 int rows, float* totals) {
  if constexpr (Most > 0) {
    for (; rows >= Most; rows -= Most, x += Most * x_stride, totals += Most * kPanel)
      dots<Most>(weight, x, x_stride, columns, totals);
    dots_most<Most - 1>(weight, x, x_stride, columns, rows, totals);
  }
}

// totals[rows][64] of a panel, for few rows.
template <class T>
void multiply_dense_few(const GemmCall& call, int64_t panel, const Rows<float>& x, int64_t first, int rows, float* totals) {
  constexpr int kChannels = 2, kMost = 4;  // 8 sums and 2 weights in registers
  for (int channel = 0; channel < kPanel; channel += kChannels) {
    const T* weight[kChannels];
    for (int c = 0; c < kChannels; ++c) {
      const int64_t feature = call.feature(panel, channel + c);
      weight[c] = static_cast<const T*>(call.values) + most<int64_t>(feature, 0) * call.values_stride;
    }
    dots_most<kMost>(weight, x.at(0, first), x.chunk, call.columns, rows, totals + channel);
  }
}

// totals[rows][64] += one chunk of a panel, for many rows; `scratch` holds a panel of the chunk.
template <class Panel, class T>
void multiply_dense_chunk(const GemmCall& call, int64_t panel, int64_t column, const typename Panel::Input* x,
                          int64_t x_stride, int rows, const Scaling& scaling, float* totals, uint8_t* scratch) {
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
  multiply_most<6, false>(Panel{{scratch, nullptr}}, x, x_stride, rows, padded / Panel::kColumns, scaling, totals);
}

}  // namespace llmkernels::LLMKERNELS_ISA
