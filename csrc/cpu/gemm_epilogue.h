// What happens to a panel's totals before they are stored: bias, activation, gating, and the one rounding.
#pragma once
#include "cpu/gemm_call.h"

namespace llmkernels::LLMKERNELS_ISA {

// x/2 (1 + erf(x / sqrt 2)), by erfc(z) = t p(t) exp(-z^2), t = 1 / (1 + z/2): p fitted to 3e-9 on z >= 0.
constexpr float kErfc[] = {-0.0395468213f, 0.186260879f, -0.277023852f, 0.0300900359f, 0.148948088f,
                           0.126882672f,   0.262398094f, 0.279762328f,  0.282228589f};
LLMKERNELS_INLINE Floats gelu(Floats x) {
  const Floats one = broadcast(1.0f), magnitude = max(x, -x);
  const Floats t = one / fma(magnitude, broadcast(0.3535533906f), one);
  Floats p = broadcast(kErfc[0]);
  for (int i = 1; i < 9; ++i) p = fma(p, t, broadcast(kErfc[i]));
  const Floats tail = p * t * exp(x * x * broadcast(-0.5f));  // erfc(|x| / sqrt 2)
  return x * broadcast(0.5f) * less(x, zeros(), tail, broadcast(2.0f) - tail);
}

LLMKERNELS_INLINE Floats gelu_tanh(Floats x) {
  const Floats inner = x * fma(x * x, broadcast(0.7978845608f * 0.044715f), broadcast(0.7978845608f));
  return x * broadcast(0.5f) * (broadcast(1.0f) + tanh(inner));
}

LLMKERNELS_INLINE Floats activated(int activation, Floats z) {
  switch (activation) {
    case kSilu:
    case kSwiglu:
      return silu(z);
    case kGelu:
    case kGeglu:
      return gelu(z);
    case kGeluTanh:
      return gelu_tanh(z);
    case kRelu:
      return less(z, zeros(), zeros(), z);
    default:
      return z;
  }
}

// y[row] of one panel from totals[64].
template <class T>
void store_row(const GemmCall& call, int64_t panel, int64_t row, const float* totals) {
  const int64_t all = call.outputs(), first = panel * call.panel_outputs();
  const T* bias = static_cast<const T*>(call.bias);
  T* y = static_cast<T*>(call.y) + row * all + first;
  each_vector(least(call.panel_outputs(), all - first), [&](int64_t i, auto n) {
    Floats z = load(totals + i);
    if (bias) z += load(bias + first + i, n);
    z = activated(call.activation, z);
    if (call.gated()) {
      Floats up = load(totals + kPanel / 2 + i);
      if (bias) up += load(bias + all + first + i, n);
      z *= up;
    }
    store(y + i, z, n);
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
