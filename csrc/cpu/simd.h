// Vectors of float32, and every other element type as it is loaded into them and stored from them.
//
// An instruction set brings simd_<isa>.h; what can be written over its few functions is here.  `Floats` is a vector
// type of the compiler, so + - * / and unary minus are its operators.
//   kLanes                        floats in a vector: 16, 8, 4
//   broadcast(x) load(p) store(p, v)     p of any element type of types.h
//   fma(a, b, c) max min round    max(a, b) and min(a, b) are b where either is NaN
//   less(a, b, x, y)              a < b ? x : y
//   times_power(x, n)             x * 2^n for whole n up to 127; 0 where n is below -149
//   sum(v) largest(v) sums(v[kLanes])    of all lanes; sums gives lane i the sum of v[i]
//   Pairs                         2 * kLanes bfloat16, two a lane: load_pairs, broadcast_pair, even, odd, interleave
//   even_pairs(a, b)              pairs of an even element of a and the same one of b; odd_pairs likewise
//   store_weights(p, v, w)        two vectors side by side; a processor may round subnormal ones to 0
//   dot(a, b, c)                  c + a . b, a pair at a time, of Pairs; one instruction where kPairDot says so
#pragma once
#include "cpu/types.h"

#if defined(__AVX512BF16__)
#include "cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_portable.h"
#endif

namespace llmkernels::LLMKERNELS_ISA {

LLMKERNELS_INLINE Floats zeros() { return broadcast(0.0f); }

template <class T>
LLMKERNELS_INLINE void store_weights(T* to, Floats first, Floats second) {
  store(to, first);
  store(to + kLanes, second);
}

// The bits of each lane, as the compiler's own vector, and one byte for each lane.
typedef uint32_t LaneBits __attribute__((vector_size(sizeof(Floats))));
typedef uint8_t LaneBytes __attribute__((vector_size(kLanes)));

// v[i][j] becomes v[j][i]: blocks of half the size change places, and again within each.
template <int kBlock = kLanes / 2>
LLMKERNELS_INLINE void transpose(Floats (&v)[kLanes]) {
  LaneBits low, high;  // lanes of two vectors, those of the second counted from kLanes on
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & kBlock ? lane - kBlock + kLanes : lane;
    high[lane] = lane & kBlock ? lane + kLanes : lane + kBlock;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kBlock) continue;
    const LaneBits a = bit_cast<LaneBits>(v[i]), b = bit_cast<LaneBits>(v[i + kBlock]);
    v[i] = bit_cast<Floats>(__builtin_shuffle(a, b, low));
    v[i + kBlock] = bit_cast<Floats>(__builtin_shuffle(a, b, high));
  }
  if constexpr (kBlock > 1) transpose<kBlock / 2>(v);
}

// narrowed() of types.h for all lanes at once, saturated, with the sign: for formats of 8 bits.
template <int kMantissa, int kBias, uint32_t kLargest>
LLMKERNELS_INLINE void store_float8(uint8_t* to, Floats x) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kSmallest = uint32_t(128 - kBias) << 23, kUnit = uint32_t(128 - kBias + kShift) << 23;
  const LaneBits bits = bit_cast<LaneBits>(x), magnitude = bits & 0x7fffffffu;
  const Floats shifted = bit_cast<Floats>(magnitude) + broadcast(bit_cast<float>(kUnit));
  const LaneBits subnormal = bit_cast<LaneBits>(shifted) - kUnit;
  const LaneBits half = ((magnitude >> kShift) & 1u) + ((1u << (kShift - 1)) - 1);
  const LaneBits normal = ((magnitude + half) >> kShift) - (uint32_t(127 - kBias) << kMantissa);
  const LaneBits is_subnormal = bit_cast<LaneBits>(magnitude < kSmallest);
  LaneBits rounded = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  const LaneBits fits = bit_cast<LaneBits>(rounded < kLargest), nan = bit_cast<LaneBits>(magnitude > 0x7f800000u);
  rounded = (rounded & fits) | (kLargest & ~fits);
  const LaneBits word = (rounded & ~nan) | (0x7fu & nan) | ((bits >> 24) & 0x80u);
  const LaneBytes bytes = __builtin_convertvector(word, LaneBytes);
  std::memcpy(to, &bytes, sizeof(bytes));
}
LLMKERNELS_INLINE void store(e4m3* to, Floats x) { store_float8<3, 7, 0x7e>(&to->bits, x); }
LLMKERNELS_INLINE void store(e5m2* to, Floats x) { store_float8<2, 15, 0x7b>(&to->bits, x); }

// The first n lanes from memory, zero in the others.
template <class T>
LLMKERNELS_INLINE Floats load_part(const T* from, int64_t n) {
  T part[kLanes] = {};
  std::memcpy(part, from, n * sizeof(T));
  return load(part);
}
template <class T>
LLMKERNELS_INLINE void store_part(T* to, Floats x, int64_t n) {
  T part[kLanes];
  store(part, x);
  std::memcpy(to, part, n * sizeof(T));
}

// use(i, n) for every vector of a row of `width`: n lanes from element i on.  The full ones get n as a constant.
template <class Use>
LLMKERNELS_INLINE void each_vector(int64_t width, Use use) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) use(i, Whole{});
  if (i < width) use(i, width - i);
}
template <class T>
LLMKERNELS_INLINE Floats load(const T* from, Whole) {
  return load(from);
}
template <class T>
LLMKERNELS_INLINE Floats load(const T* from, int64_t n) {
  return load_part(from, n);
}
template <class T>
LLMKERNELS_INLINE void store(T* to, Floats x, Whole) {
  store(to, x);
}
template <class T>
LLMKERNELS_INLINE void store(T* to, Floats x, int64_t n) {
  store_part(to, x, n);
}

// e^x = 2^n 2^r, n whole and |r| <= 1/2, to 1e-7 and what x log2(e) is rounded by; 0 below -87.7, no more than e^88.
// 2^r is a polynomial fitted to 2e-9, exact at 0.
LLMKERNELS_INLINE Floats exp(Floats x) {
  const Floats bounded = min(broadcast(88.0f), max(broadcast(-104.0f), x));  // NaN stays
  const Floats log2_e = broadcast(1.44269504f);
  const Floats n = round(bounded * log2_e), r = fma(bounded, log2_e, -n);
  Floats p = broadcast(1.535335331e-4f);
  p = fma(p, r, broadcast(1.339887456e-3f));
  p = fma(p, r, broadcast(9.618437393e-3f));
  p = fma(p, r, broadcast(5.550332471e-2f));
  p = fma(p, r, broadcast(2.402264791e-1f));
  p = fma(p, r, broadcast(6.931472029e-1f));
  return times_power(fma(p, r, broadcast(1.0f)), n);
}

LLMKERNELS_INLINE Floats tanh(Floats x) {
  const Floats square = x * x, magnitude = max(x, -x);
  Floats p = broadcast(-5.70498872745e-3f);  // near 0, where the quotient below would cancel
  p = fma(p, square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const Floats small = fma(p * square, x, x);
  const Floats one = broadcast(1.0f), two = broadcast(2.0f);
  const Floats large = one - two / (exp(magnitude + magnitude) + one);
  return less(magnitude, broadcast(0.625f), small, less(x, zeros(), -large, large));
}

// -0 below -88, where exp(-x) is bounded and a quotient of -1e30 by it would not vanish; NaN of -inf.
LLMKERNELS_INLINE Floats silu(Floats x) {
  return less(x, broadcast(-88.0f), x * zeros(), x / (exp(-x) + broadcast(1.0f)));
}

}  // namespace llmkernels::LLMKERNELS_ISA
