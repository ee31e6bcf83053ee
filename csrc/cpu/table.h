// What the native module offers: a table of kernels, one table for each instruction set.
//
// Every kernel takes raw pointers, sizes and strides (in elements), and returns a Status.  Python checked the call: shapes
// and dtypes agree, arrays are on the CPU, and what a kernel calls unit stride has it.  Pointers may be null only where
// a comment says so.  To add a kernel:
//   1. its signature here;
//   2. <op>.h, which defines it in the namespace llmkernels::LLMKERNELS_ISA, over simd.h;
//   3. #include "cpu/<op>.h" and `table.<op> = <op>;` in kernels.h, which each isa_*.cpp compiles with flags of its own;
//   4. kernel(module, "<op>", &Table::<op>); in bind.cpp.
#pragma once
#include <cstdint>

namespace llmkernels {

enum DType : int { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8E4M3, kFloat8E5M2 };

enum Status : int {
  kOk,
  kOutOfMemory,
  kBadDType,  // a dtype that Python should have refused
  kBadIndex,  // a page, slot or position outside its array; read nowhere, what was written is incomplete
};

struct Table {
  const char* name;

  // y[rows hidden] = weight[hidden] * s / sqrt(mean(s^2) + eps), s = x + residual; residual and residual_out may be null.
  // y and residual_out are contiguous.
  Status (*rms_norm)(int dtype, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                     const void* weight, void* y, void* residual_out, int64_t rows, int64_t hidden, float eps,
                     int threads);
};

// runtime.cpp: the fastest table that this processor, and the environment variable LLMKERNELS_CPU_ISA, allow.
const Table& table();

// runtime.cpp: memory that a thread keeps from call to call, aligned to 64 bytes; null when there is none left.
// `kShared` is for what a kernel's threads fill together, `kOwn` for what each of them needs for itself.
enum Scratch { kShared, kOwn };
void* scratch(Scratch kind, int64_t bytes);

}  // namespace llmkernels
