// flags x86_64: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mavx2 -mfma -mf16c -mprefer-vector-width=512
// Zen 4 and later, Sapphire Rapids and later, Cooper Lake: 512-bit vectors, dot products of int8 and bfloat16.
#ifdef __AVX512BF16__
#define LLMKERNELS_ISA avx512
#include "cpu/kernels.h"
#endif
