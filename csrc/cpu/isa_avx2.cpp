// flags x86_64: -mavx2 -mfma -mf16c
// Haswell and later, Zen and later: 256-bit vectors, fused multiply-add, float16 conversion.
#ifdef __AVX2__
#define LLMKERNELS_ISA avx2
#include "cpu/kernels.h"
#endif
