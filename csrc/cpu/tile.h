// The inner product of a blocked matrix product: R rows x V vectors of sums stay in registers while depth runs.
//
//            depth ->           columns ->
//   A  rows  a a a a    B depth b b b b b b     C[r, c] = scale[r] * C[r, c] + sum over k of A[r, k] * B[k, c]
//            a a a a            b b b b b b
//
// What runs along depth is a cell of 32 bits: a float, or two bfloat16 that one instruction multiplies and adds.
#pragma once
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int kTileRows = 6;
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;  // 6 x 4 of 32 registers, 6 x 2 of 16: room for B and A remains

struct FloatCells {
  using Element = float;
  static constexpr int kDepth = 1;  // elements in a cell
  static LLMKERNELS_INLINE Floats spread(const float* a) { return broadcast(*a); }
  static LLMKERNELS_INLINE Floats read(const float* b) { return load(b); }
  static LLMKERNELS_INLINE Floats add(Floats a, Floats b, Floats c) { return fma(a, b, c); }
};
struct PairCells {
  using Element = bf16;
  static constexpr int kDepth = 2;
  static LLMKERNELS_INLINE Pairs spread(const bf16* a) { return broadcast_pair(a); }
  static LLMKERNELS_INLINE Pairs read(const bf16* b) { return load_pairs(b); }
  static LLMKERNELS_INLINE Floats add(Pairs a, Pairs b, Floats c) { return dot(a, b, c); }
};

// a[rows, a_stride], b[depth, b_stride] in cells, c[rows, c_stride] in floats.  scale may be null: C starts at zero.
template <class Cells, int R, int V>
LLMKERNELS_INLINE void tile(const typename Cells::Element* a, int64_t a_stride, const typename Cells::Element* b,
                            int64_t b_stride, int64_t depth, const float* scale, float* c, int64_t c_stride) {
  constexpr int kDepth = Cells::kDepth;
  Floats totals[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      totals[r][v] = scale ? load(c + r * c_stride + v * kLanes) * broadcast(scale[r]) : zeros();
  for (int64_t k = 0; k < depth; ++k) {
    decltype(Cells::read(b)) column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) column[v] = Cells::read(b + (k * b_stride + v * kLanes) * kDepth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto row = Cells::spread(a + (r * a_stride + k) * kDepth);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) totals[r][v] = Cells::add(row, column[v], totals[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, totals[r][v]);
}

// The last rows, fewer than R.
template <class Cells, int R, int V>
LLMKERNELS_INLINE void last_rows(int64_t rows, const typename Cells::Element* a, int64_t a_stride,
                                 const typename Cells::Element* b, int64_t b_stride, int64_t depth, const float* scale,
                                 float* c, int64_t c_stride) {
  if constexpr (R > 1) {
    if (rows == R - 1) tile<Cells, R - 1, V>(a, a_stride, b, b_stride, depth, scale, c, c_stride);
    else last_rows<Cells, R - 1, V>(rows, a, a_stride, b, b_stride, depth, scale, c, c_stride);
  }
}

template <class Cells, int V>
void tile_columns(int64_t rows, const typename Cells::Element* a, int64_t a_stride, const typename Cells::Element* b,
                  int64_t b_stride, int64_t depth, const float* scale, float* c, int64_t c_stride) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    tile<Cells, kTileRows, V>(a + r * a_stride * Cells::kDepth, a_stride, b, b_stride, depth, scale ? scale + r : scale,
                              c + r * c_stride, c_stride);
  last_rows<Cells, kTileRows, V>(rows - r, a + r * a_stride * Cells::kDepth, a_stride, b, b_stride, depth,
                                 scale ? scale + r : scale, c + r * c_stride, c_stride);
}

// C of any number of rows and a whole number of vectors of columns.
template <class Cells>
void multiply(int64_t rows, int64_t columns, const typename Cells::Element* a, int64_t a_stride,
              const typename Cells::Element* b, int64_t b_stride, int64_t depth, const float* scale, float* c,
              int64_t c_stride) {
  int64_t column = 0;
  for (; column + kTileVectors * kLanes <= columns; column += kTileVectors * kLanes)
    tile_columns<Cells, kTileVectors>(rows, a, a_stride, b + column * Cells::kDepth, b_stride, depth, scale, c + column,
                                      c_stride);
  for (; column < columns; column += kLanes)
    tile_columns<Cells, 1>(rows, a, a_stride, b + column * Cells::kDepth, b_stride, depth, scale, c + column, c_stride);
}

}  // namespace llmkernels::LLMKERNELS_ISA
