// 4 floats, in the vector language of GCC and Clang.  What the functions do is said in simd.h.
#pragma once
#include "cpu/types.h"

namespace llmkernels::LLMKERNELS_ISA {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));  // a comparison of Floats gives these: -1 or 0
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
struct Whole {
  constexpr operator int64_t() const { return kLanes; }
};

LLMKERNELS_INLINE Floats broadcast(float x) { return Floats{x, x, x, x}; }
LLMKERNELS_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
LLMKERNELS_INLINE Floats select(Ints which, Floats x, Floats y) {
  return bit_cast<Floats>((which & bit_cast<Ints>(x)) | (~which & bit_cast<Ints>(y)));
}
LLMKERNELS_INLINE Floats less(Floats a, Floats b, Floats x, Floats y) { return select(a < b, x, y); }
LLMKERNELS_INLINE Floats max(Floats a, Floats b) { return select(a > b, a, b); }
LLMKERNELS_INLINE Floats min(Floats a, Floats b) { return select(a < b, a, b); }
LLMKERNELS_INLINE Floats round(Floats x) {  // for |x| below 2^22: the adder rounds
  return x + broadcast(0x1.8p23f) - broadcast(0x1.8p23f);
}
LLMKERNELS_INLINE Floats times_power(Floats x, Floats n) {  // n = -127 makes the bits of 0
  return x * bit_cast<Floats>((__builtin_convertvector(max(broadcast(-127.0f), n), Ints) + 127) << 23);
}

template <class T>
LLMKERNELS_INLINE Floats load(const T* from) {
  return Floats{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
}
template <>
LLMKERNELS_INLINE Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
LLMKERNELS_INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }
LLMKERNELS_INLINE void store(bf16* to, Floats x) {
  for (int i = 0; i < kLanes; ++i) to[i] = narrow<bf16>(x[i]);
}
LLMKERNELS_INLINE void store(fp16* to, Floats x) {
  for (int i = 0; i < kLanes; ++i) to[i] = narrow<fp16>(x[i]);
}
LLMKERNELS_INLINE void store(int8_t* to, Floats x) {
  for (int i = 0; i < kLanes; ++i) to[i] = narrow<int8_t>(x[i]);
}

LLMKERNELS_INLINE float sum(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }
LLMKERNELS_INLINE float largest(Floats x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
LLMKERNELS_INLINE Floats sums(const Floats (&v)[kLanes]) {
  const Floats a{v[0][0], v[1][0], v[2][0], v[3][0]}, b{v[0][1], v[1][1], v[2][1], v[3][1]};
  const Floats c{v[0][2], v[1][2], v[2][2], v[3][2]}, d{v[0][3], v[1][3], v[2][3], v[3][3]};
  return (a + c) + (b + d);
}

struct Pairs {
  Ints bits;
};
constexpr bool kPairDot = false;
LLMKERNELS_INLINE Pairs load_pairs(const bf16* from) {
  Pairs x;
  std::memcpy(&x.bits, from, sizeof(x.bits));
  return x;
}
LLMKERNELS_INLINE Pairs broadcast_pair(const bf16* from) {
  int32_t both;
  std::memcpy(&both, from, sizeof(both));
  return {Ints{both, both, both, both}};
}
LLMKERNELS_INLINE Floats even(Pairs x) { return bit_cast<Floats>(x.bits << 16); }
LLMKERNELS_INLINE Floats odd(Pairs x) { return bit_cast<Floats>(x.bits & int32_t(0xffff0000)); }
LLMKERNELS_INLINE Floats dot(Pairs a, Pairs b, Floats c) { return fma(odd(a), odd(b), fma(even(a), even(b), c)); }
LLMKERNELS_INLINE Pairs even_pairs(Pairs a, Pairs b) { return {(a.bits & 0xffff) | (b.bits << 16)}; }
LLMKERNELS_INLINE Pairs odd_pairs(Pairs a, Pairs b) {
  return {((a.bits >> 16) & 0xffff) | (b.bits & int32_t(0xffff0000))};
}
// 2 * kLanes floats in the order of memory, from the even and the odd ones.
LLMKERNELS_INLINE void interleave(Floats& even, Floats& odd) {
  const Floats low{even[0], odd[0], even[1], odd[1]}, high{even[2], odd[2], even[3], odd[3]};
  even = low;
  odd = high;
}

}  // namespace llmkernels::LLMKERNELS_ISA
