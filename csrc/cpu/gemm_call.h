// Products of rows with a weight, what their parts share: the call, and how its panels lie in memory.
//
//   gemm_codes.h      4-bit codes and 8-bit integers, for each instruction set
//   gemm_panel.h      64 channels times a few rows, for each way of storing a weight
//   gemm_rows.h       the way in: residual, norm, act-order, rounding
//   gemm_epilogue.h   the way out: bias, activation, gating
//   gemm_dense.h      weights that were not packed
//   gemm.h            cuts a call into panels and blocks of rows, runs them on all threads
#pragma once
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/table.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int kPanel = 64;  // channels

// Columns whose products are summed in registers before they are scaled and added up, at most: few enough for exact int32
// sums in float32, for float32 sums that err little, and for a decoded panel of them, 16 KiB, to stay in the nearest cache.
template <class Input>
constexpr int64_t kChunk = 128;
template <>
constexpr int64_t kChunk<float> = 64;
template <>
constexpr int64_t kChunk<int8_t> = 256;

// The arguments of table.h, under its names.
struct GemmCall {
  int storage;
  const void* values;
  int64_t values_stride;
  int scales_dtype;
  const void* scales;
  const int8_t* zero_points;
  int64_t group;
  const int32_t* permutation;
  int64_t features, columns;
  int rounding;
  int64_t rounding_group;
  const float* input_scale;
  int norm;
  const void *norm_weight, *norm_bias;
  float eps;
  int dtype;
  const void* x;
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  void* residual_out;
  int64_t rows;
  const void* bias;
  int activation;
  void* y;
  int threads;

  bool gated() const { return activation == kSwiglu || activation == kGeglu; }
  int64_t outputs() const { return gated() ? features / 2 : features; }
  int64_t panel_outputs() const { return gated() ? kPanel / 2 : kPanel; }
  int64_t panels() const { return ceil_div(outputs(), panel_outputs()); }
  // The feature that a channel of a panel stands for, -1 for none.  A gated panel has 32 channels of the gate, and then
  // the 32 that they gate.
  int64_t feature(int64_t panel, int channel) const {
    const int64_t half = gated() ? channel / (kPanel / 2) : 0;
    const int64_t output = panel * panel_outputs() + channel - half * (kPanel / 2);
    return output < outputs() ? output + half * outputs() : -1;
  }
  int64_t padded() const { return ceil_div(columns, 8) * 8; }
  int64_t groups() const { return group ? ceil_div(columns, group) : 1; }
};

}  // namespace llmkernels::LLMKERNELS_ISA
