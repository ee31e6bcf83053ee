// Any processor: 128-bit vectors in the language of GCC and Clang, which become SSE2, NEON, or whatever there is.
#define LLMKERNELS_ISA portable
#include "cpu/kernels.h"
