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
// Beyond that, with 16 registers, more rows of x share what it costs to widen a row of the weight.  No sum changes by that.
constexpr int kMoreRowsAtOnce = kRegisters == 32 ? kFewRowsAtOnce : 6;
constexpr int kFewerChannels = kRegisters == 32 ? kFewChannels : 2;
constexpr int kFewDense = 64;        // rows up to which a dense weight is read as it lies
constexpr int64_t kStretch = 2048;   // bytes of a row of the weight: with as many of x, half the first cache

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

// Columns that are multiplied in one pass: the sums over those before lie in `kept`, and go there again unless these are
// the last ones.
struct Stretch {
  int64_t begin, end;
  bool first, last;
};

// totals[row][c] of Rows rows for Channels rows of the weight; kept: [Rows * Channels][kLanes].
template <int Rows, int Channels, int Lines, class T, class Input>
LLMKERNELS_INLINE void dots(const T* const (&weight)[Channels], const Input* x, int64_t x_stride, const Stretch& stretch,
                            Ahead<Lines>& ahead, float* kept, float* totals) {
  using Span = decltype(load_span(x));
  constexpr int kSums = Rows * Channels;
  Floats sum_of[most(kSums, kLanes)];
#pragma GCC unroll 16
  for (int k = 0; k < kSums; ++k) sum_of[k] = stretch.first ? zeros() : load(kept + k * kLanes);
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
  int64_t i = stretch.begin;
  for (; i + kSpan<Input> <= stretch.end; i += kSpan<Input>) {
    ahead.step();
    multiply(weight, x, x_stride, i);
  }
  if (i < stretch.end) {  // the last columns, with zeros behind them
    const int64_t left = stretch.end - i;
    T rest[Channels][kSpan<Input>] = {};
    Input rest_x[Rows][kSpan<Input>] = {};
    for (int c = 0; c < Channels; ++c) std::memcpy(rest[c], weight[c] + i, left * sizeof(T));
    for (int row = 0; row < Rows; ++row) std::memcpy(rest_x[row], x + row * x_stride + i, left * sizeof(Input));
    multiply(rest, rest_x[0], kSpan<Input>, 0);
  }
  if (!stretch.last) {
#pragma GCC unroll 16
    for (int k = 0; k < kSums; ++k) store(kept + k * kLanes, sum_of[k]);
    return;
  }
  float found[most(kSums, kLanes)];
  if constexpr (kSums <= kLanes && 2 * kSums >= kLanes) {  // all at once, with zeros where there are fewer than lanes
    for (int k = kSums; k < kLanes; ++k) sum_of[k] = zeros();
    store(found, sums(reinterpret_cast<const Floats(&)[kLanes]>(sum_of)));
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < kSums; ++k) found[k] = sum(sum_of[k]);
  }
  for (int row = 0; row < Rows; ++row) std::memcpy(totals + row * kPanel, found + row * Channels, Channels * sizeof(float));
}

// The same for a number of rows that is no constant.
template <int Most, int Channels, int Lines, class T, class Input>
LLMKERNELS_INLINE void dots_of(int rows, const T* const (&weight)[Channels], const Input* x, int64_t x_stride,
                               const Stretch& stretch, Ahead<Lines>& ahead, float* kept, float* totals) {
  if (rows == Most) return dots<Most>(weight, x, x_stride, stretch, ahead, kept, totals);
  if constexpr (Most > 1) dots_of<Most - 1>(rows, weight, x, x_stride, stretch, ahead, kept, totals);
}

// All rows, at most Most of them at once; with 16 registers shared out evenly, since one or two alone keep few sums.
template <int Most, int Channels, int Lines, class T, class Input>
LLMKERNELS_INLINE void dots_most(const T* const (&weight)[Channels], const Input* x, int64_t x_stride,
                                 const Stretch& stretch, int rows, Ahead<Lines>& ahead, float* kept, float* totals) {
  for (int passes = ceil_div(rows, Most); passes > 0; --passes) {
    const int now = kRegisters == 32 ? least(Most, rows) : ceil_div(rows, passes);
    dots_of<Most>(now, weight, x, x_stride, stretch, ahead, kept, totals);
    rows -= now, x += now * x_stride, totals += now * kPanel, kept += now * Channels * kLanes;
  }
}

// totals[rows][64] of a panel, for few rows.  The rows of the weight that come kAhead bytes later are fetched meanwhile,
// spread over the rows of x, so that memory has work as long as arithmetic has; behind the last ones those of the panel
// that this thread takes next, if all are equally fast.  Where rows of x take turns over long rows of the weight, they do
// so stretch by stretch, which stay in the first cache.
template <int Most, int Channels, int Lines, class T, class Input>
void multiply_dense_few(const GemmCall& call, int64_t panel, const Rows<Input>& x, int64_t first, int rows, float* kept,
                        float* totals) {
  const T* values = static_cast<const T*>(call.values);
  const int64_t bytes = most<int64_t>(Channels * call.values_stride * sizeof(T), 1);
  const int later = Channels * int(least<int64_t>(kPanel / Channels, ceil_div(int64_t{2 * kAhead}, bytes)));
  const int64_t length = rows > Most ? kStretch / int64_t(sizeof(T)) : most<int64_t>(call.columns, 1);
  for (int channel = 0; channel < kPanel; channel += Channels) {
    const T* weight[Channels];
    for (int c = 0; c < Channels; ++c)
      weight[c] = values + most<int64_t>(call.feature(panel, channel + c), 0) * call.values_stride;
    const int then = channel + later;
    const int64_t soon = call.feature(panel + then / kPanel * call.threads, then % kPanel);
    Ahead<Lines> ahead{reinterpret_cast<const char*>(values + most<int64_t>(soon, 0) * call.values_stride),
                       soon < 0 ? 0 : ceil_div(bytes, int64_t{64})};
    Stretch stretch{0, 0, true, false};
    for (; !stretch.last; stretch.begin = stretch.end, stretch.first = false) {
      stretch.last = call.columns - stretch.begin < 2 * length;  // no short one at the end
      stretch.end = stretch.last ? call.columns : stretch.begin + length;
      dots_most<Most>(weight, x.at(0, first), x.line, stretch, rows, ahead, kept, totals + channel);
    }
  }
}

template <class T, class Input>
void multiply_dense_few(const GemmCall& call, int64_t panel, const Rows<Input>& x, int64_t first, int rows, float* kept,
                        float* totals) {
  const int passes = ceil_div(rows, kFewRowsAtOnce);  // over each row of the weight
  if (passes == 1)
    return multiply_dense_few<kFewRowsAtOnce, kFewChannels, kFewChannels, T>(call, panel, x, first, rows, kept, totals);
  if (kRegisters == 32 && passes < kFewChannels)
    return multiply_dense_few<kFewRowsAtOnce, kFewChannels, ceil_div(kFewChannels, 2), T>(call, panel, x, first, rows, kept,
                                                                                          totals);
  multiply_dense_few<kMoreRowsAtOnce, kFewerChannels, 1, T>(call, panel, x, first, rows, kept, totals);
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
