// Every kernel, compiled once for each instruction set: isa_*.cpp sets LLMKERNELS_ISA and the compiler's flags.
//
// All code below lives in llmkernels::<isa>, and uses no template or inline function from outside: the linker keeps one
// copy of such a function, and if it kept the AVX-512 one, the portable kernels would crash on an older processor.
#pragma once
#include "cpu/gemm.h"
#include "cpu/lora_gemm.h"
#include "cpu/merge_attention.h"
#include "cpu/paged_attention.h"
#include "cpu/parallel.h"
#include "cpu/quantize_activation.h"
#include "cpu/rms_norm.h"
#include "cpu/rotary_embedding.h"
#include "cpu/sample.h"
#include "cpu/silu_and_mul.h"
#include "cpu/simd.h"
#include "cpu/table.h"
#include "cpu/write_kv.h"

#define LLMKERNELS_TEXT_(name) #name
#define LLMKERNELS_TEXT(name) LLMKERNELS_TEXT_(name)

namespace llmkernels::LLMKERNELS_ISA {

extern const Table kernels;
constexpr Table kernels = [] {  // a constant: nothing of an instruction set may run when the module is loaded
  Table table{};
  table.name = LLMKERNELS_TEXT(LLMKERNELS_ISA);
  table.gemm = gemm;
  table.lora_gemm = lora_gemm;
  table.merge_attention = merge_attention;
  table.paged_attention = paged_attention;
  table.quantize_activation = quantize_activation;
  table.rms_norm = rms_norm;
  table.rotary_embedding = rotary_embedding;
  table.sample = sample;
  table.silu_and_mul = silu_and_mul;
  table.write_kv = write_kv;
  return table;
}();

}  // namespace llmkernels::LLMKERNELS_ISA
