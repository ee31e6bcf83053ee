// act(norm(x + residual) @ weight^T + bias) for every kind of weight: cuts a call into units and runs them on all threads.
//
//             64 channels
//            +-----------+-----------+--
//   256 rows | unit      |           |      a unit holds its totals in float32 and takes the columns chunk by chunk;
//            +-----------+-----------+--    at most 512 rows are prepared at a time
//            |           |           |
//
// Units share nothing and each has its own order of additions, whatever the number of threads and of rows: the result of a
// row depends on that row alone, except for dense weights, which have one order for few rows and another one for many.
#pragma once
#include <type_traits>

#include "cpu/gemm_dense.h"
#include "cpu/gemm_epilogue.h"
#include "cpu/gemm_panel.h"
#include "cpu/gemm_rows.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int kBlock = 256;     // rows of a unit: 64 KiB of totals
constexpr int kPrepared = 512;  // rows prepared at a time
constexpr int64_t kPreparing = 16;  // what preparing an element costs, in elements of parallel_ranges
constexpr int64_t kFewProducts = 65536;  // below these one thread is done before a second one has begun

// What a unit needs for itself.
struct Bench {
  alignas(64) float totals[kBlock * kPanel];
  alignas(64) uint8_t panel[kChunk<float> * kPanel * sizeof(float)];
  alignas(64) float scales[kAbreast * kPanel];
  alignas(64) float offsets[kAbreast * kPanel];
  alignas(64) float kept[kFewDense * kFewChannels * kLanes];  // sums of few rows between two stretches of columns
};

// Scales and offsets of one group of `panels` panels.
inline void load_group(const GemmCall& call, int64_t panel, int panels, int64_t group, float nothing, float offset,
                       Bench& bench) {
  for (int p = 0; p < panels; ++p) {
    const int64_t at = ((panel + p) * call.groups() + group) * kPanel;
    float *to_scales = bench.scales + p * kPanel, *to_offsets = bench.offsets + p * kPanel;
    with_float(call.scales_dtype, [&](auto element) {
      const auto* scales = static_cast<const decltype(element)*>(call.scales) + at;
      for (int c = 0; c < kPanel; c += kLanes) store(to_scales + c, load(scales + c));
      return kOk;
    });
    for (int c = 0; c < kPanel; c += kLanes) {
      const Floats zero = call.zero_points ? load(call.zero_points + at + c) : broadcast(nothing);
      store(to_offsets + c, zero + broadcast(offset));
    }
  }
}

// A unit of a packed weight.
template <class Source>
struct PackedWeight {
  using Input = typename Source::Input;
  static constexpr const int* kOrder = Source::kOrder;
  static constexpr bool kScaled = __is_same(Source, Int4Scaled);
  static int64_t chunk(const GemmCall& call) { return call.group ? least(call.group, kChunk<Input>) : kChunk<Input>; }
  static int64_t line(const GemmCall&) { return kChunk<Input>; }
  static bool ready(const GemmCall&) { return false; }  // whether x can be multiplied as it lies
  // Panels of a unit: two of few rows, unless threads would go without work.
  static int abreast(const GemmCall& call) {
    return call.rows <= 2 && call.panels() >= 2 * kAbreast * call.threads ? kAbreast : 1;
  }

  static void multiply(const GemmCall& call, int64_t panel, int panels, const Rows<Input>& x, int64_t first, int rows,
                       Bench& bench) {
    constexpr int kColumnBytes = Source::kBytes / (Source::kParts * Source::kColumns);  // of all 64 channels
    const bool nibbles = call.storage == kInt4Panels || call.storage == kFp4Panels || call.storage == kInt4Products;
    const int64_t panel_bytes = call.padded() * kColumnBytes;
    const uint8_t* values = static_cast<const uint8_t*>(call.values) + panel * panel_bytes;
    Source source{Stored{values, bench.offsets, panel_bytes}};
    for (int64_t c = 0; c < x.chunks; ++c) {
      const int64_t column = c * x.chunk, at = c * x.count + first;
      if (c == 0 || (call.group && column % call.group == 0))
        load_group(call, panel, panels, call.group ? column / call.group : 0, nibbles ? 8.0f : 0.0f, Source::kOffset, bench);
      source.values = values + column * kColumnBytes;
      const Scaling scaling{bench.scales, bench.offsets, x.factors + at, x.sums + at};
      multiply_chunk(source, x.at(c, first), panels, rows, least(x.chunk, call.padded() - column), scaling, bench.totals,
                     bench.panel);
    }
  }
};

// A unit of a weight as a linear layer holds it.
template <class Panel, class T>
struct DenseWeight {
  using Input = typename Panel::Input;
  static constexpr const int* kOrder = kInOrder;
  static constexpr bool kScaled = false;
  static bool few(const GemmCall& call) { return call.rows <= kFewDense; }
  static int64_t chunk(const GemmCall& call) { return few(call) ? most<int64_t>(call.padded(), 8) : kChunk<Input>; }
  static int64_t line(const GemmCall& call) { return ready(call) ? call.x_stride : chunk(call); }
  static bool ready(const GemmCall& call) {
    return __is_same(T, Input) && few(call) && call.norm == kNoNorm && !call.residual && !call.residual_out &&
           call.rounding == kNoRounding && !call.permutation && call.x_stride >= most<int64_t>(call.columns, 1);
  }
  static int abreast(const GemmCall&) { return 1; }

  static void multiply(const GemmCall& call, int64_t panel, int, const Rows<Input>& x, int64_t first, int rows, Bench& bench) {
    if (few(call)) return multiply_dense_few<T>(call, panel, x, first, rows, bench.kept, bench.totals);
    for (int c = 0; c < kPanel; ++c) bench.scales[c] = 1.0f;
    for (int64_t c = 0; c < x.chunks; ++c) {
      const int64_t at = c * x.count + first;
      const Scaling scaling{bench.scales, nullptr, x.factors + at, x.sums + at};
      multiply_dense_chunk<Panel, T>(call, panel, c * x.chunk, x.at(c, first), rows, scaling, bench.totals, bench.panel);
    }
  }
};

template <class Weight, class T>
Status multiply(const GemmCall& call) {
  using Input = typename Weight::Input;
  const int64_t padded = call.padded();
  bool starved = false;
  for (int64_t begin = 0; begin < call.rows; begin += kPrepared) {
    const int64_t count = least<int64_t>(kPrepared, call.rows - begin);
    Rows<Input> x(count, Weight::chunk(call), Weight::line(call), padded);
    if (Weight::ready(call)) {
      x.x = static_cast<Input*>(const_cast<void*>(call.x)) + begin * call.x_stride;
    } else {
      void* memory = scratch(kShared, most<int64_t>(x.bytes(), 1));
      if (!memory) return kOutOfMemory;
      x.place(memory);
      parallel_ranges(count, kPreparing * padded, call.threads, [&](int64_t from, int64_t to) {
        float* work = static_cast<float*>(scratch(kOwn, 2 * (padded + kLanes) * int64_t(sizeof(float))));
        if (!work) return __atomic_store_n(&starved, true, __ATOMIC_RELAXED);
        for (int64_t row = from; row < to; ++row) prepare_row<Weight, T>(call, begin + row, x, row, work);
      });
    }
    const int64_t blocks = ceil_div(count, int64_t{kBlock}), products = count * padded * kPanel * call.panels();
    const int64_t abreast = Weight::abreast(call), units = ceil_div(call.panels(), abreast);
    parallel_tasks(units * blocks, products < kFewProducts ? 1 : call.threads, [&](int64_t task) {
      Bench* bench = static_cast<Bench*>(scratch(kOwn, sizeof(Bench)));
      if (!bench || starved) return __atomic_store_n(&starved, true, __ATOMIC_RELAXED);
      const int64_t panel = task / blocks * abreast, first = task % blocks * kBlock;
      const int rows = int(least<int64_t>(kBlock, count - first)), panels = int(least(abreast, call.panels() - panel));
      std::memset(bench->totals, 0, panels * rows * kPanel * sizeof(float));
      Weight::multiply(call, panel, panels, x, first, rows, *bench);
      for (int row = 0; row < panels * rows; ++row)
        store_row<T>(call, panel + row / rows, begin + first + row % rows, bench->totals + row * kPanel);
    });
    if (starved) return kOutOfMemory;
  }
  return kOk;
}

// bfloat16 products, where the processor has them, lose nothing: codes are exact in bfloat16, and x is bfloat16 or
// rounded to fewer bits.  (Of a normalised bfloat16 x, the norm is rounded once to bfloat16.)  All others are float32, a sum
// of two bfloat16 that no norm follows among them: rounded once more, it took up the whole tolerance behind geglu.
template <class T>
Status multiply_as_stored(const GemmCall& call) {
#if defined(__AVX512BF16__)
  const bool pairs = __is_same(T, bf16) && !(call.residual && call.norm == kNoNorm);
  if constexpr (__is_same(T, bf16)) {
    if (pairs && call.storage == kDense) return multiply<DenseWeight<PanelPairs, T>, T>(call);
  }
  if (pairs || call.rounding == kToFloat8) {
    switch (call.storage) {
      case kInt4Panels:
        return multiply<PackedWeight<NibblePairs<true>>, T>(call);
      case kFp4Panels:
        return multiply<PackedWeight<NibblePairs<false>>, T>(call);
      case kInt8Panels:
        return multiply<PackedWeight<TwoPairs<int8_t>>, T>(call);
      case kFloat8Panels:
        return multiply<PackedWeight<TwoPairs<e4m3>>, T>(call);
    }
  }
#endif
  switch (call.storage) {
    case kDense:
      return multiply<DenseWeight<PanelFloats, T>, T>(call);
    case kInt4Panels:
      return multiply<PackedWeight<std::conditional_t<__is_same(T, float), Int4Floats, Int4Scaled>>, T>(call);
    case kFp4Panels:
      return multiply<PackedWeight<Fp4Floats>, T>(call);
    case kInt8Panels:
      return multiply<PackedWeight<ByteFloats<int8_t>>, T>(call);
    case kFloat8Panels:
      return multiply<PackedWeight<ByteFloats<e4m3>>, T>(call);
    case kInt4Products:
      return multiply<PackedWeight<Int4Bytes>, T>(call);
    case kInt8Products:
      return multiply<PackedWeight<Int8Quads>, T>(call);
    default:
      return kBadDType;
  }
}

inline Status gemm(int storage, const void* values, int64_t values_stride, int scales_dtype, const void* scales,
                   const void* zero_points, int64_t group, const void* permutation, int64_t features, int64_t columns,
                   int rounding, int64_t rounding_group, const void* input_scale, int norm, const void* norm_weight,
                   const void* norm_bias, float eps, int dtype, const void* x, int64_t x_stride, const void* residual,
                   int64_t residual_stride, void* residual_out, TokenCount rows, const void* bias, int activation, void* y,
                   int threads) {
  const GemmCall call{storage, values, values_stride, scales_dtype, scales, static_cast<const int8_t*>(zero_points), group,
                      static_cast<const int32_t*>(permutation), features, columns, rounding, rounding_group,
                      static_cast<const float*>(input_scale), norm, norm_weight, norm_bias, eps, dtype, x, x_stride, residual,
                      residual_stride, residual_out, rows, bias, activation, y, threads};
  return with_float(dtype, [&](auto element) { return multiply_as_stored<decltype(element)>(call); });
}

}  // namespace llmkernels::LLMKERNELS_ISA
