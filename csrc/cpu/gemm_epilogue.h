// What happens to a panel's totals before they are stored: bias, activation, gating, and the one rounding.
#pragma once
#include "cpu/simd.h"
#include "cpu/table.h"
#include "cpu/gemm_panel.h"

namespace llmkernels::LLMKERNELS_ISA {

// x/2 (1 + erf(x / sqrt 2)), by erfc(z) = t p(t) exp(-z^2), t = 1 / (1 + z/2): p fitted to 4e-8 on z >= 0.
LLMKERNELS_INLINE Floats gelu(Floats x) {
  const Floats one = broadcast(1.0f), magnitude = max(x, -x);
  const Floats t = one / fma(magnitude, broadcast(0.3535533906f), one);
  Floats p = broadcast(kErfc[0]);
  for (int i = 1; i < int(sizeof(kErfc) / sizeof(*kErfc)); ++i) p = fma(p, t, broadcast(kErfc[i]));
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

inline bool gated(const GemmCall& call) { return call.activation == kSwiglu || call.activation == kGeglu; }
// Outputs of a panel.  A gated one holds 32 channels of the gate and the 32 that they gate.
inline int64_t panel_outputs(const GemmCall& call) { return gated(call) ? kPanel / 2 : kPanel; }
inline int64_t outputs(const GemmCall& call) { return gated(call) ? call.features / 2 : call.features; }
inline int64_t panels(const GemmCall& call) { return ceil_div(outputs(call), panel_outputs(call)); }
// The feature that a channel of a panel stands for; beyond the last one, where the panel is not full.
inline int64_t feature(const GemmCall& call, int64_t panel, int channel) {
  if (!gated(call)) return panel * kPanel + channel;
  const int64_t output = panel * (kPanel / 2) + channel % (kPanel / 2);
  return output < call.features / 2 ? output + channel / (kPanel / 2) * (call.features / 2) : call.features;
}

// y[row] of one panel from totals[64].
template <class T>
void store_row(const GemmCall& call, int64_t panel, int64_t row, const float* totals) {
  const int64_t all = outputs(call), first = panel * panel_outputs(call);
  const T* bias = static_cast<const T*>(call.bias);
  T* y = static_cast<T*>(call.y) + row * all + first;
  each_vector(least(panel_outputs(call), all - first), [&](int64_t i, auto n) {
    Floats z = load(totals + i);
    if (bias) z += load(bias + first + i, n);
    z = activated(call.activation, z);
    if (gated(call)) {
      Floats up = load(totals + kPanel / 2 + i);
      if (bias) up += load(bias + all + first + i, n);
      z *= up;
    }
    store(y + i, z, n);
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
