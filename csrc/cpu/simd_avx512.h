// 16 floats: AVX-512 with BW, DQ, VL, VNNI and BF16.  What the functions do is said in simd.h.
#pragma once
#include <immintrin.h>

#include "cpu/types.h"

namespace llmkernels::LLMKERNELS_ISA {

using Floats = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
struct Whole {
  constexpr operator int64_t() const { return kLanes; }
};

LLMKERNELS_INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
LLMKERNELS_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
LLMKERNELS_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
LLMKERNELS_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
LLMKERNELS_INLINE Floats less(Floats a, Floats b, Floats x, Floats y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
LLMKERNELS_INLINE Floats round(Floats x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
LLMKERNELS_INLINE Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

LLMKERNELS_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
LLMKERNELS_INLINE Floats load(const bf16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
LLMKERNELS_INLINE Floats load(const fp16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
LLMKERNELS_INLINE Floats load(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
LLMKERNELS_INLINE Floats load(const e5m2* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
}
LLMKERNELS_INLINE Floats load(const e4m3* from) {  // as float16, whose exponent is biased by 8 more
  const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i magnitude = _mm256_and_si256(words, _mm256_set1_epi16(0x7f));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_and_si256(words, _mm256_set1_epi16(int16_t(0x8000)));
  const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7));
  return _mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00))) * broadcast(256.0f);
}

LLMKERNELS_INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
LLMKERNELS_INLINE void store(bf16* to, Floats x) {  // in integers: the instruction for it flushes subnormals
  const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
  const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i words = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
}
LLMKERNELS_INLINE void store(fp16* to, Floats x) {
  const __m256i bits = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}
LLMKERNELS_INLINE void store(int8_t* to, Floats x) {
  const Floats bounded = min(broadcast(127.0f), max(broadcast(-128.0f), x));
  const __mmask16 fine = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);  // NaN becomes 0
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(fine, bounded)));
}

LLMKERNELS_INLINE float sum(Floats x) { return _mm512_reduce_add_ps(x); }
LLMKERNELS_INLINE float largest(Floats x) { return _mm512_reduce_max_ps(x); }
LLMKERNELS_INLINE Floats sums(const Floats (&v)[kLanes]) {
  Floats eight[8], four[4], two[2];  // halves of the vectors are added until each lane holds one sum
  for (int i = 0; i < 8; ++i)
    eight[i] = _mm512_shuffle_f32x4(v[i], v[i + 8], 0x44) + _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee);
  for (int i = 0; i < 4; ++i)
    four[i] = _mm512_shuffle_f32x4(eight[i], eight[i + 4], 0x88) + _mm512_shuffle_f32x4(eight[i], eight[i + 4], 0xdd);
  for (int i = 0; i < 2; ++i)
    two[i] = _mm512_unpacklo_ps(four[i], four[i + 2]) + _mm512_unpackhi_ps(four[i], four[i + 2]);
  const Floats all = _mm512_unpacklo_ps(two[0], two[1]) + _mm512_unpackhi_ps(two[0], two[1]);
  return _mm512_shuffle_f32x4(all, all, 0xd8);  // quarters stand for vectors 0, 8, 4, 12
}

struct Pairs {
  __m512i bits;
};
constexpr bool kPairDot = true;
LLMKERNELS_INLINE Pairs load_pairs(const bf16* from) { return {_mm512_loadu_si512(from)}; }
// Bytes are exact in bfloat16: whole numbers by way of float32, others by a table of the 128 magnitudes.
LLMKERNELS_INLINE Pairs load_pairs(const int8_t* from) {
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load(from + kLanes), load(from)))};
}
template <int kMantissa, int kBias, int kFinite>  // kFinite: magnitudes below infinity, or below NaN
struct Magnitudes {
  alignas(64) uint16_t bits[128] = {};
  constexpr Magnitudes() {
    for (int code = 0; code < 128; ++code) {
      int mantissa = code & ((1 << kMantissa) - 1), exponent = code >> kMantissa;
      if (exponent == 0 && mantissa > 0)  // subnormal
        for (exponent = 1; mantissa < 1 << kMantissa; --exponent) mantissa *= 2;
      mantissa &= (1 << kMantissa) - 1;
      bits[code] = uint16_t(code == 0 ? 0 : (exponent + 127 - kBias) << 7 | mantissa << (7 - kMantissa));
      if (code >= kFinite) bits[code] = uint16_t(kMantissa == 2 && code == kFinite ? 0x7f80 : 0x7fc0);
    }
  }
};
template <class Table>
LLMKERNELS_INLINE Pairs look_up_pairs(const void* from, const Table& table) {
  const __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  const auto part = [&](int i) { return _mm512_load_si512(table.bits + 32 * i); };
  const __m512i low = _mm512_permutex2var_epi16(part(0), code, part(1));
  const __m512i high = _mm512_permutex2var_epi16(part(2), code, part(3));
  const __mmask32 is_high = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
  const __m512i magnitude = _mm512_mask_mov_epi16(low, is_high, high);
  return {_mm512_ternarylogic_epi32(code, _mm512_set1_epi16(int16_t(0x8000)), magnitude, 0xea)};  // a & b | c
}
LLMKERNELS_INLINE Pairs load_pairs(const e4m3* from) {
  static constexpr Magnitudes<3, 7, 127> table;
  return look_up_pairs(from, table);
}
LLMKERNELS_INLINE Pairs load_pairs(const e5m2* from) {
  static constexpr Magnitudes<2, 15, 124> table;
  return look_up_pairs(from, table);
}
LLMKERNELS_INLINE Pairs broadcast_pair(const bf16* from) {
  int both;
  std::memcpy(&both, from, sizeof(both));
  return {_mm512_set1_epi32(both)};
}
LLMKERNELS_INLINE Floats even(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x.bits, 16)); }
LLMKERNELS_INLINE Floats odd(Pairs x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x.bits, _mm512_set1_epi32(int(0xffff0000))));
}
LLMKERNELS_INLINE Floats dot(Pairs a, Pairs b, Floats c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a.bits), reinterpret_cast<__m512bh>(b.bits));
}
LLMKERNELS_INLINE Pairs even_pairs(Pairs a, Pairs b) {
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, a.bits, _mm512_slli_epi32(b.bits, 16))};
}
LLMKERNELS_INLINE Pairs odd_pairs(Pairs a, Pairs b) {
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a.bits, 16), b.bits)};
}
LLMKERNELS_INLINE void store_weights(bf16* to, Floats first, Floats second) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}
// 2 * kLanes floats in the order of memory, from the even and the odd ones.
LLMKERNELS_INLINE void interleave(Floats& even, Floats& odd) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const Floats first = _mm512_permutex2var_ps(even, low, odd);
  odd = _mm512_permutex2var_ps(even, high, odd);
  even = first;
}

}  // namespace llmkernels::LLMKERNELS_ISA
