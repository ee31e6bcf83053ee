// What the native module offers: a table of kernels, one table for each instruction set.
//
// Every kernel takes raw pointers, sizes and strides (in elements), and returns a Status.  Python checked the call:
// shapes and dtypes agree, arrays are on the CPU, and what a kernel calls unit stride has it.  Pointers may be null only where
// a comment says so.  To add a kernel:
//   1. its signature here;
//   2. <op>.h, which defines it in the namespace llmkernels::LLMKERNELS_ISA, over simd.h;
//   3. #include "cpu/<op>.h" and `table.<op> = <op>;` in kernels.h, which each isa_*.cpp compiles with its flags;
//   4. kernel(module, "<op>", &Table::<op>); in bind.cpp.
#pragma once
#include <cstdint>

namespace llmkernels {

enum DType : int { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8E4M3, kFloat8E5M2 };

enum Status : int {
  kOk,
  kOutOfMemory,
  kBadDType,  // a dtype that Python should have refused
  kBadValue,  // a row of logits with NaN or infinity in it, or with nothing that is allowed
  kBadIndex,  // a page, slot or position outside its array; read nowhere, what was written is incomplete
};

// How a product's weight lies in memory: gemm_panel.h.
enum Storage : int { kDense, kInt4Panels, kFp4Panels, kInt8Panels, kFloat8Panels, kInt4Products, kInt8Products };
enum Rounding : int { kNoRounding, kToInt8, kToFloat8 };
enum Norm : int { kNoNorm, kRmsNorm, kLayerNorm };
enum Activation : int { kNoActivation, kSilu, kGelu, kGeluTanh, kRelu, kSwiglu, kGeglu };

// How many tokens a call has, or so many rows for each; and how many sequences.  What a replay may change: recording.h.
enum TokenCount : int64_t {};
enum SequenceCount : int64_t {};

struct Table {
  const char* name;

  // y[rows outputs] = act(norm(x + residual) @ weight^T + bias), llmkernels/ops/norm_linear_activation.py; outputs is
  // features, or half of them where the activation is gated.  All arrays of floats have `dtype`, but scales.
  //   weight     storage kDense: [features columns], values_stride apart.  Others are panels of 64 channels, gated ones
  //              interleaved, with scales of scales_dtype and zero_points [panels][groups][64]; group 0: one scale a channel.
  //   x          stored column j is column permutation[j] of x.  rounding_group 0: the whole row; input_scale: float32[1]
  // Null where absent: zero_points, permutation, input_scale, norm_weight, norm_bias, residual, residual_out, bias.
  // y, residual_out, bias, norm_weight and norm_bias are contiguous.
  Status (*gemm)(int storage, const void* values, int64_t values_stride, int scales_dtype, const void* scales,
                 const void* zero_points, int64_t group, const void* permutation, int64_t features, int64_t columns,
                 int rounding, int64_t rounding_group, const void* input_scale, int norm, const void* norm_weight,
                 const void* norm_bias, float eps, int dtype, const void* x, int64_t x_stride, const void* residual,
                 int64_t residual_stride, void* residual_out, TokenCount rows, const void* bias, int activation, void* y,
                 int threads);

  // y[r] += scales[i] * (x[r] @ a[i]^T) @ b[i]^T, i = adapters[r]; rows with -1 stay untouched.  a [count rank columns] is
  // contiguous, b [count outputs rank] has unit stride in its outputs or ranks; adapters are int32, scales float32.
  Status (*lora_gemm)(int dtype, void* y, int64_t y_stride, const void* x, int64_t x_stride, const void* a, const void* b,
                      int64_t b_adapter, int64_t b_output, int64_t b_rank, const void* adapters, const void* scales,
                      TokenCount rows, int64_t columns, int64_t outputs, int64_t rank, int64_t count, int threads);

  // y[rows hidden] = weight[hidden] * s / sqrt(mean(s^2) + eps), s = x + residual; residual and residual_out may be
  // null.
  // y and residual_out are contiguous.
  Status (*rms_norm)(int dtype, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                     const void* weight, void* y, void* residual_out, TokenCount rows, int64_t hidden, float eps,
                     int threads);

  // Attention over a paged cache, llmkernels/ops/paged_attention.py.  Strides are called after what they step over;
  // channels of k_cache, v_cache, q and out have unit stride.  group: heads of q that share a KV head.  block_table,
  // seq_lens and cu_seqlens_q are int32.  Null where absent: sinks [heads], alibi_slopes [heads], k_scale and v_scale
  // [kv_heads] or one value, all float32; tree_mask [tokens, tree_words] uint32; lse [tokens, heads] float32.
  // out [tokens, heads, v_dim] has the dtype of q and is contiguous.
  Status (*paged_attention)(int q_dtype, int cache_dtype, const void* q, int64_t q_token, int64_t q_head,
                            const void* k_cache, int64_t k_page, int64_t k_slot, int64_t k_head, const void* v_cache,
                            int64_t v_page, int64_t v_slot, int64_t v_head, int64_t pages, int64_t page_size,
                            int64_t kv_heads, int64_t group, int64_t dim, int64_t v_dim, TokenCount tokens,
                            SequenceCount seqs, const void* block_table, int64_t table_stride, int64_t max_pages,
                            const void* seq_lens, const void* cu_seqlens_q, float scale, bool causal, int64_t left, int64_t right,
                            float soft_cap, const void* sinks, const void* alibi_slopes, const void* k_scale,
                            const void* v_scale, bool scale_per_head, const void* tree_mask, int64_t tree_words,
                            void* out, void* lse, int threads);

  // out = share_a * out_a + share_b * out_b, by float32 lse; -inf marks a part that saw no key.  out and lse are
  // contiguous.
  Status (*merge_attention)(int dtype, const void* out_a, int64_t a_token, int64_t a_head, const void* lse_a,
                            int64_t lse_a_token, int64_t lse_a_head, const void* out_b, int64_t b_token,
                            int64_t b_head, const void* lse_b, int64_t lse_b_token, int64_t lse_b_head, void* out,
                            void* lse, TokenCount tokens, int64_t heads, int64_t v_dim, int threads);

  // values[rows hidden] int8 or e4m3, scales[rows groups]; `calibrated` 0: each group's own scale.  group is the width
  // of a group, that of the row where there is one.
  Status (*quantize_activation)(int dtype, int value_dtype, const void* x, int64_t x_stride, void* values,
                                void* scales, float calibrated, TokenCount rows, int64_t hidden, int64_t group,
                                int64_t groups, int threads);

  // Rotates the first 2 * half channels; cos and sin [max_positions, half] float32, positions int64.  q_out and k_out
  // are contiguous.
  Status (*rotary_embedding)(int dtype, const void* q, int64_t q_token, int64_t q_head, const void* k,
                             int64_t k_token, int64_t k_head, const void* cos, int64_t cos_stride, const void* sin,
                             int64_t sin_stride, const void* positions, void* q_out, void* k_out, TokenCount tokens,
                             int64_t heads, int64_t kv_heads, int64_t dim, int64_t half, int64_t max_positions,
                             bool interleaved, int threads);

  // tokens[rows] int64 from logits[rows vocab]; float32 uniform, temperature, top_p, min_p and int32 top_k per row,
  // null where absent but for uniform.
  Status (*sample)(int dtype, const void* logits, int64_t stride, const void* uniform, const void* temperature,
                   const void* top_k, const void* top_p, const void* min_p, void* tokens, TokenCount rows, int64_t vocab,
                   int threads);

  // y[rows width] = silu(x[:, :width]) * x[:, width:], contiguous.
  Status (*silu_and_mul)(int dtype, const void* x, int64_t x_stride, void* y, TokenCount rows, int64_t width,
                         int threads);

  // Keys, or values, into their slots (int64); `scale` float32, one value or one a head, null is 1.
  Status (*write_kv)(int dtype, int cache_dtype, const void* rows, int64_t row_token, int64_t row_head, void* cache,
                     int64_t page_stride, int64_t slot_stride, int64_t head_stride, const void* slots,
                     const void* scale, bool scale_per_head, TokenCount tokens, int64_t heads, int64_t dim,
                     int64_t pages, int64_t page_size, int threads);
};

// runtime.cpp: the fastest table that this processor, and the environment variable LLMKERNELS_CPU_ISA, allow.
const Table& table();

// runtime.cpp: whether one instruction for a pair of bfloat16 beats two float32 ones.  It does on Zen 4 and 5; Sapphire
// Rapids runs it at half the rate of multiply-add (measured: 1.4 against 5.7 a nanosecond), as it has AMX for that.
bool pair_dot_pays();

// runtime.cpp: memory that a thread keeps from call to call, aligned to 64 bytes; null when there is none left.
// `kShared` is for what a kernel's threads fill together, `kOwn` for what each of them needs for itself.
enum Scratch { kShared, kOwn };
void* scratch(Scratch kind, int64_t bytes);

}  // namespace llmkernels
