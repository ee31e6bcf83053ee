// 8 floats: AVX2, FMA and F16C.  What the functions do is said in simd.h.
#pragma once
#include <immintrin.h>

#include "cpu/types.h"

namespace llmkernels::LLMKERNELS_ISA {

using Floats = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
struct Whole {
  constexpr operator int64_t() const { return kLanes; }
};

LLMKERNELS_INLINE Floats broadcast(float x) { return _mm256_set1_ps(x); }
LLMKERNELS_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
LLMKERNELS_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
LLMKERNELS_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
LLMKERNELS_INLINE Floats less(Floats a, Floats b, Floats x, Floats y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
LLMKERNELS_INLINE Floats round(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LLMKERNELS_INLINE Floats times_power(Floats x, Floats n) {  // n = -127 makes the bits of 0
  const __m256i exponent = _mm256_cvtps_epi32(max(broadcast(-127.0f), n));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}

LLMKERNELS_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
LLMKERNELS_INLINE Floats load(const bf16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
LLMKERNELS_INLINE Floats load(const fp16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
LLMKERNELS_INLINE Floats load(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
LLMKERNELS_INLINE Floats load(const e5m2* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
}
LLMKERNELS_INLINE Floats load(const e4m3* from) {  // as float16, whose exponent is biased by 8 more
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i words = _mm_cvtepi8_epi16(bytes), magnitude = _mm_and_si128(words, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_and_si128(words, _mm_set1_epi16(int16_t(0x8000)));
  const __m128i half = _mm_or_si128(sign, _mm_slli_epi16(magnitude, 7));
  return _mm256_cvtph_ps(_mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)))) * broadcast(256.0f);
}

LLMKERNELS_INLINE void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
LLMKERNELS_INLINE void store(bf16* to, Floats x) {
  const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
  const __m256i half = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
LLMKERNELS_INLINE void store(fp16* to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LLMKERNELS_INLINE void store(int8_t* to, Floats x) {
  const Floats bounded = min(broadcast(127.0f), max(broadcast(-128.0f), x));
  const __m256i fine = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
  const __m256i whole = _mm256_and_si256(_mm256_cvtps_epi32(bounded), fine);  // NaN becomes 0
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}

LLMKERNELS_INLINE float sum(Floats x) {  // in the order of sums()
  const __m128 pairs = _mm_hadd_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 halves = _mm_hadd_ps(pairs, pairs);
  return _mm_cvtss_f32(_mm_add_ss(halves, _mm_movehdup_ps(halves)));
}
LLMKERNELS_INLINE float largest(Floats x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
LLMKERNELS_INLINE Floats sums(const Floats (&v)[kLanes]) {
  const Floats low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const Floats high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_blend_ps(low, high, 0xf0) + _mm256_permute2f128_ps(low, high, 0x21);
}

struct Pairs {
  __m256i bits;
};
constexpr bool kPairDot = false;
LLMKERNELS_INLINE Pairs load_pairs(const bf16* from) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
}
LLMKERNELS_INLINE Pairs broadcast_pair(const bf16* from) {
  int both;
  std::memcpy(&both, from, sizeof(both));
  return {_mm256_set1_epi32(both)};
}
LLMKERNELS_INLINE Floats even(Pairs x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x.bits, 16)); }
LLMKERNELS_INLINE Floats odd(Pairs x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x.bits, _mm256_set1_epi32(int(0xffff0000))));
}
LLMKERNELS_INLINE Floats dot(Pairs a, Pairs b, Floats c) { return fma(odd(a), odd(b), fma(even(a), even(b), c)); }
LLMKERNELS_INLINE Pairs even_pairs(Pairs a, Pairs b) {
  return {_mm256_blend_epi16(a.bits, _mm256_slli_epi32(b.bits, 16), 0xaa)};
}
LLMKERNELS_INLINE Pairs odd_pairs(Pairs a, Pairs b) {
  return {_mm256_blend_epi16(_mm256_srli_epi32(a.bits, 16), b.bits, 0xaa)};
}
// 2 * kLanes floats in the order of memory, from the even and the odd ones.
LLMKERNELS_INLINE void interleave(Floats& even, Floats& odd) {
  const Floats low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  even = _mm256_permute2f128_ps(low, high, 0x20);
  odd = _mm256_permute2f128_ps(low, high, 0x31);
}

}  // namespace llmkernels::LLMKERNELS_ISA
