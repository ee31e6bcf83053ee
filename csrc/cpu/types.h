// Elements as they lie in memory, and exact conversions of single ones.  Rounding is to nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/table.h"

#define LLMKERNELS_INLINE __attribute__((always_inline)) inline

namespace llmkernels::LLMKERNELS_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct e4m3 {  // float8_e4m3fn: no infinity, largest value 448
  uint8_t bits;
};
struct e5m2 {
  uint8_t bits;
};

template <class To, class From>
LLMKERNELS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

LLMKERNELS_INLINE float widen(float x) { return x; }
LLMKERNELS_INLINE float widen(int8_t x) { return x; }
LLMKERNELS_INLINE float widen(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
LLMKERNELS_INLINE float widen(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude < 0x400) return bit_cast<float>(bit_cast<uint32_t>(float(magnitude) * 0x1p-24f) | sign);
  const uint32_t bias = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;
  return bit_cast<float>(((magnitude << 13) + bias) | sign);
}
LLMKERNELS_INLINE float widen(e5m2 x) { return widen(fp16{uint16_t(x.bits << 8)}); }
LLMKERNELS_INLINE float widen(e4m3 x) {
  const uint16_t bits = uint16_t((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7);
  return (x.bits & 0x7f) == 0x7f ? bit_cast<float>(0x7fc00000u) : widen(fp16{bits}) * 256.0f;
}

// The magnitude of x in a format of fewer exponent bits than float32, as its bits.  What is above `overflow` becomes
// it; NaN becomes `nan`.
LLMKERNELS_INLINE uint32_t narrowed(float x, int mantissa, int bias, uint32_t overflow, uint32_t nan) {
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return nan;
  const int shift = 23 - mantissa;
  const uint32_t smallest = uint32_t(127 - bias + 1) << 23;  // the least normal number of the format
  uint32_t rounded;
  if (magnitude < smallest) {  // subnormal: adding this number makes the adder round at the right bit
    const uint32_t unit = uint32_t(127 - bias + 1 + shift) << 23;
    rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(unit)) - unit;
  } else {
    rounded = ((magnitude + (1u << (shift - 1)) - 1 + ((magnitude >> shift) & 1)) >> shift) -
              (uint32_t(127 - bias) << mantissa);
  }
  return rounded < overflow ? rounded : overflow;
}

template <class T>
T narrow(float x);
template <>
LLMKERNELS_INLINE float narrow<float>(float x) {
  return x;
}
template <>
LLMKERNELS_INLINE bf16 narrow<bf16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
LLMKERNELS_INLINE fp16 narrow<fp16>(float x) {
  return {uint16_t(narrowed(x, 10, 15, 0x7c00, 0x7e00) | (bit_cast<uint32_t>(x) >> 16 & 0x8000))};
}
// The quantized ones saturate: infinities too.  NaN stays NaN in FP8 and becomes 0 in int8.
template <>
LLMKERNELS_INLINE e4m3 narrow<e4m3>(float x) {
  const bool infinite = (bit_cast<uint32_t>(x) & 0x7fffffff) == 0x7f800000;
  const uint32_t bits = infinite ? 0x7e : narrowed(x, 3, 7, 0x7e, 0x7f);
  return {uint8_t(bits | (bit_cast<uint32_t>(x) >> 24 & 0x80))};
}
template <>
LLMKERNELS_INLINE e5m2 narrow<e5m2>(float x) {
  const bool infinite = (bit_cast<uint32_t>(x) & 0x7fffffff) == 0x7f800000;
  const uint32_t bits = infinite ? 0x7b : narrowed(x, 2, 15, 0x7b, 0x7f);
  return {uint8_t(bits | (bit_cast<uint32_t>(x) >> 24 & 0x80))};
}
template <>
LLMKERNELS_INLINE int8_t narrow<int8_t>(float x) {
  if (!(x == x)) return 0;
  const float bounded = x < -128.0f ? -128.0f : x > 127.0f ? 127.0f : x;
  return int8_t(bounded + 0x1.8p23f - 0x1.8p23f);  // the adder rounds to the nearest integer
}

// use(T{}) for the element type that `dtype` names.
template <class Use>
Status with_float(int dtype, Use use) {
  switch (dtype) {
    case kFloat32:
      return use(float{});
    case kBFloat16:
      return use(bf16{});
    case kFloat16:
      return use(fp16{});
    default:
      return kBadDType;
  }
}
template <class Use>
Status with_element(int dtype, Use use) {
  switch (dtype) {
    case kInt8:
      return use(int8_t{});
    case kFloat8E4M3:
      return use(e4m3{});
    case kFloat8E5M2:
      return use(e5m2{});
    default:
      return with_float(dtype, use);
  }
}

}  // namespace llmkernels::LLMKERNELS_ISA
