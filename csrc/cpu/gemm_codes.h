// Four-bit codes and 8-bit integers in 32-bit lanes: how an instruction set reads them and multiplies them.
//
//   Words                 kLanes words of 32 bits; a lane is an output channel
//   load_words(p), floats(w)
//   power_below(x)        2^e <= |x| < 2^(e+1)
//   nibble(w, i, high)    the float 0..15 of bits 4i .. 4i+3, minus (high - 2^23): one `or` and one subtraction, exact
//   nibble_in_place(w, i) the number of those bits times 16^(i % 4): neither shifted nor offset
//   fp4(w, i)             the e2m1 number in bits 4i .. 4i+3
//   Bytes, nibble_bytes   eight codes a lane as bytes: the even columns, then the odd ones, in kByteParts parts
//   dot(sum, codes, x)    sum + codes . x in int32, x being 8 / kByteParts (Bytes) or 4 (Quads) activations of all lanes
//   byte_pairs(p)         a lane's two bytes, int8 or e4m3, as bfloat16; of e4m3, 1/256 of the number, and no NaN
//   load_codes(p)         a lane's byte as a float, where bytes are not read in pairs
#pragma once
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr float kTwo23 = 0x1p23f;  // float32 numbers from here on are whole: the bits of the mantissa are the number

template <class T>
LLMKERNELS_INLINE T read(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

#if defined(__AVX512BF16__)

using Words = __m512i;
LLMKERNELS_INLINE Words load_words(const uint8_t* from) { return _mm512_loadu_si512(from); }
LLMKERNELS_INLINE Floats floats(Words x) { return _mm512_cvtepi32_ps(x); }
LLMKERNELS_INLINE Floats power_below(Floats x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7f800000)));
}

LLMKERNELS_INLINE Floats nibble(Words w, int i, Floats high) {
  const Words code = _mm512_and_si512(_mm512_srli_epi32(w, 4 * i), _mm512_set1_epi32(15));
  return _mm512_castsi512_ps(_mm512_or_si512(code, _mm512_set1_epi32(0x4b000000))) - high;
}
LLMKERNELS_INLINE Floats nibble_in_place(Words w, int i) {
  return floats(_mm512_and_si512(i < 4 ? w : _mm512_srli_epi32(w, 16), _mm512_set1_epi32(15 << (4 * (i % 4)))));
}
LLMKERNELS_INLINE Floats fp4(Words w, int i) {
  const Floats values = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * i), values);
}

// Columns i and i + 4 as bfloat16: code - 8 of 4-bit integers, or e2m1.  A table of 16 words, twice, is one instruction.
struct CodeTable {
  Words values;
};
LLMKERNELS_INLINE CodeTable code_table(bool integers) {
  alignas(64) bf16 table[32];
  const float fp4_values[] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};
  for (int i = 0; i < 32; ++i) table[i] = narrow<bf16>(integers ? float((i & 15) - 8) : fp4_values[i & 15]);
  return {_mm512_load_si512(table)};
}
LLMKERNELS_INLINE Pairs nibble_pairs(Words w, int i, CodeTable table) {
  return {_mm512_permutexvar_epi16(_mm512_srli_epi32(w, 4 * i), table.values)};
}
// Whole numbers of 8 bits are exact in bfloat16.  Two lanes of float32 become one of the result.
LLMKERNELS_INLINE Pairs byte_pairs(const int8_t* from) {
  const auto eight = [](const int8_t* at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
  };
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(eight(from + kLanes), eight(from)))};
}
// Exponent and mantissa move into place, and three bits above them lift the exponent from a bias of 7 to 15, 256 times too
// little.  That is right for normal numbers; of the eight subnormal ones, what is too much is looked up.
LLMKERNELS_INLINE Pairs byte_pairs(const e4m3* from) {
  alignas(64) static constexpr uint16_t kTooMuch[32] = {0x3800, 0x110, 0xa0, 0x70, 0x40, 0x30, 0x20, 0x10};
  const Words code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const Words place = _mm512_set1_epi16(int16_t(0x87f0)), lift = _mm512_set1_epi16(0x3800);
  const Words normal = _mm512_ternarylogic_epi32(_mm512_slli_epi16(code, 4), place, lift, 0xea);  // a & b | c
  const Words magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
  const Words entry = _mm512_min_epu16(magnitude, _mm512_set1_epi16(31));
  return {_mm512_sub_epi16(normal, _mm512_permutexvar_epi16(entry, _mm512_load_si512(kTooMuch)))};
}

struct Bytes {
  Words codes;
};
constexpr int kByteParts = 2;
LLMKERNELS_INLINE Bytes nibble_bytes(Words w, int part) {
  return {_mm512_and_si512(part ? _mm512_srli_epi16(w, 4) : w, _mm512_set1_epi8(15))};
}
LLMKERNELS_INLINE Words dot(Words sum, Bytes codes, const int8_t* x) {
  return _mm512_dpbusd_epi32(sum, codes.codes, _mm512_set1_epi32(read<int>(x)));
}

// The instruction takes one unsigned side: codes + 128.  What that adds is taken off with the zero point.
struct Quads {
  Words biased;
};
using QuadInput = int8_t;
constexpr float kQuadBias = 128.0f;
constexpr int kQuadOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
LLMKERNELS_INLINE Quads quads(Words w) { return {_mm512_xor_si512(w, _mm512_set1_epi8(-128))}; }
LLMKERNELS_INLINE Words dot(Words sum, Quads codes, const QuadInput* x) {
  return _mm512_dpbusd_epi32(sum, codes.biased, _mm512_set1_epi32(read<int>(x)));
}

#elif defined(__AVX2__)

using Words = __m256i;
LLMKERNELS_INLINE Words load_words(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
LLMKERNELS_INLINE Floats floats(Words x) { return _mm256_cvtepi32_ps(x); }
LLMKERNELS_INLINE Floats power_below(Floats x) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7f800000)));
}

LLMKERNELS_INLINE Floats nibble(Words w, int i, Floats high) {
  const Words code = _mm256_and_si256(_mm256_srli_epi32(w, 4 * i), _mm256_set1_epi32(15));
  return _mm256_castsi256_ps(_mm256_or_si256(code, _mm256_set1_epi32(0x4b000000))) - high;
}
LLMKERNELS_INLINE Floats nibble_in_place(Words w, int i) {
  return floats(_mm256_and_si256(i < 4 ? w : _mm256_srli_epi32(w, 16), _mm256_set1_epi32(15 << (4 * (i % 4)))));
}
LLMKERNELS_INLINE Floats fp4(Words w, int i) {  // the permutation reads three bits; the fourth is the sign
  const Words code = _mm256_srli_epi32(w, 4 * i);
  const Words sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), _mm256_set1_epi32(int(0x80000000)));
  const Floats magnitude = _mm256_permutevar8x32_ps(_mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6), code);
  return _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign));
}

LLMKERNELS_INLINE Floats load_codes(const int8_t* from) { return load(from); }
LLMKERNELS_INLINE Floats load_codes(const e4m3* from) {  // float16 has one bit more of exponent, below the sign
  const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(int16_t(0xbfff))));
}

struct Bytes {
  Words even, odd;
};
constexpr int kByteParts = 1;
LLMKERNELS_INLINE Bytes nibble_bytes(Words w, int) {
  const Words low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(w, low), _mm256_and_si256(_mm256_srli_epi16(w, 4), low)};
}
LLMKERNELS_INLINE Words dot(Words sum, Bytes codes, const int8_t* x) {  // |sums of four products| < 2^13: int16 holds them
  const Words even = _mm256_maddubs_epi16(codes.even, _mm256_set1_epi32(read<int>(x)));
  const Words odd = _mm256_maddubs_epi16(codes.odd, _mm256_set1_epi32(read<int>(x + 4)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(even, odd), _mm256_set1_epi16(1)));
}

// As int16: the byte product of AVX2 saturates.
struct Quads {
  Words even, odd;
};
using QuadInput = int16_t;
constexpr float kQuadBias = 0.0f;
constexpr int kQuadOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};
LLMKERNELS_INLINE Quads quads(Words w) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}
LLMKERNELS_INLINE Words dot(Words sum, Quads codes, const QuadInput* x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes.even, _mm256_set1_epi32(read<int>(x))));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(codes.odd, _mm256_set1_epi32(read<int>(x + 2))));
}

#else

typedef uint32_t Words __attribute__((vector_size(16)));
LLMKERNELS_INLINE Words load_words(const uint8_t* from) { return read<Words>(from); }
LLMKERNELS_INLINE Floats floats(Words x) { return __builtin_convertvector(bit_cast<Ints>(x), Floats); }
LLMKERNELS_INLINE Floats power_below(Floats x) { return bit_cast<Floats>(bit_cast<Words>(x) & 0x7f800000); }

LLMKERNELS_INLINE Floats nibble(Words w, int i, Floats high) {
  return bit_cast<Floats>(((w >> (4 * i)) & 15) | 0x4b000000) - high;
}
LLMKERNELS_INLINE Floats nibble_in_place(Words w, int i) {
  return floats((i < 4 ? w : w >> 16) & (15u << (4 * (i % 4))));
}
LLMKERNELS_INLINE Floats fp4(Words w, int i) {  // twice the number is the whole number at this place of the table
  static constexpr float kValues[] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};
  const Words code = (w >> (4 * i)) & 15;
  return Floats{kValues[code[0]], kValues[code[1]], kValues[code[2]], kValues[code[3]]};
}

LLMKERNELS_INLINE Floats load_codes(const int8_t* from) { return load(from); }
LLMKERNELS_INLINE Floats load_codes(const e4m3* from) { return load(from) * broadcast(1.0f / 256); }

// Columns i and i + 2 of four, as the two halves of each lane, are multiplied one by one.
struct Bytes {
  Words codes;
};
constexpr int kByteParts = 1;
LLMKERNELS_INLINE Bytes nibble_bytes(Words w, int) { return {w}; }
LLMKERNELS_INLINE Words dot(Words sum, Bytes codes, const int8_t* x) {
  for (int i = 0; i < 4; ++i) {
    sum += ((codes.codes >> (8 * i)) & 15) * uint32_t(int32_t(x[i]));
    sum += ((codes.codes >> (8 * i + 4)) & 15) * uint32_t(int32_t(x[4 + i]));
  }
  return sum;
}

struct Quads {
  Ints codes;
};
using QuadInput = int8_t;
constexpr float kQuadBias = 0.0f;
constexpr int kQuadOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
LLMKERNELS_INLINE Quads quads(Words w) { return {bit_cast<Ints>(w)}; }
LLMKERNELS_INLINE Words dot(Words sum, Quads codes, const QuadInput* x) {
  for (int i = 0; i < 4; ++i) sum += bit_cast<Words>((codes.codes << (24 - 8 * i)) >> 24) * uint32_t(int32_t(x[i]));
  return sum;
}

#endif

// Rounds |x| <= 448 to the numbers of e4m3, ties to even: adding 1.5 * 2^20 times the power of two below x leaves
// four bits.
LLMKERNELS_INLINE Floats round_e4m3(Floats x) {
  const Floats large = max(broadcast(0x1p-6f), power_below(x)) * broadcast(0x1.8p20f);
  return x + large - large;
}

}  // namespace llmkernels::LLMKERNELS_ISA
