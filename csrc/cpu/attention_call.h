// Paged attention, what its parts share: the call, a unit of work, which keys a query sees, and the softmax of a row.
//
//   paged_attention.h   cuts a call into units, runs them on all threads, joins the parts of one query
//   attention_few.h     a unit of few queries, decode: bound by memory, each key is loaded once for all queries
//   attention_many.h    a unit of many queries, prefill: bound by arithmetic, tiles of a matrix product
//
// A row is one query of one head.  The rows of a sequence that share a KV head are numbered token * group + head, so
// that they see about the same keys.
#pragma once
#include <math.h>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

// The arguments of table.h, under its names.
struct AttentionCall {
  int q_dtype, cache_dtype;
  const void* q;
  int64_t q_token, q_head;
  const void *k_cache, *v_cache;
  int64_t k_page, k_slot, k_head, v_page, v_slot, v_head;
  int64_t pages, page_size, kv_heads, group, dim, v_dim, tokens, seqs;
  const int32_t* block_table;
  int64_t table_stride, max_pages;
  const int32_t *seq_lens, *cu_seqlens_q;
  float scale;
  bool causal;
  int64_t left, right;
  float soft_cap;
  const float *sinks, *alibi_slopes, *k_scale, *v_scale;
  bool scale_per_head;
  const uint32_t* tree_mask;
  int64_t tree_words;
  void* out;
  float* lse;
};

// Rows first_row to end_row of a sequence over its keys first_key to end_key, of `heads` KV heads from `head` on.
struct Unit {
  int64_t seq, first_row, end_row, first_key, end_key, head, heads;
  int64_t rows() const { return end_row - first_row; }
  int64_t keys() const { return end_key - first_key; }
};

// What a unit found: a row's largest score, the sum of exp(score - largest), and the sum of those times the values.
struct Partial {
  float *largest, *total, *values;  // [rows], [rows], [rows, stride]
  int64_t stride;
  void clear(int64_t row, int64_t width) const {
    largest[row] = -INFINITY;
    total[row] = 0;
    for (int64_t i = 0; i < width; i += kLanes) store(values + row * stride + i, zeros());
  }
};

// Arrays out of one piece of memory, each at the start of a cache line.
struct Carver {
  uintptr_t end;
  template <class X>
  void take(X*& pointer, int64_t count) {
    pointer = reinterpret_cast<X*>(end);
    end += ceil_div(count * sizeof(X), 64) * 64;
  }
};

// The keys lo to hi that a row sees; of the new tokens only those in its tree, where there is one.
struct Visible {
  int64_t lo, hi, position, first_new;
  const uint32_t* tree;
};

LLMKERNELS_INLINE Visible visible(const AttentionCall& call, int64_t seq, int64_t row) {
  const int64_t begin = call.cu_seqlens_q[seq], fresh = call.cu_seqlens_q[seq + 1] - begin;
  const int64_t length = call.seq_lens[seq], token = row / call.group;
  Visible seen{0, length, length - fresh + token, length - fresh, nullptr};
  if (call.tree_mask) seen.tree = call.tree_mask + (begin + token) * call.tree_words;
  if (call.causal && !seen.tree) seen.hi = seen.position + 1;
  if (call.left >= 0) seen.lo = most<int64_t>(0, seen.position - call.left);
  if (call.right >= 0) seen.hi = least(seen.hi, seen.position + call.right + 1);
  return seen;
}

LLMKERNELS_INLINE float slope(const AttentionCall& call, int64_t head, int64_t row) {
  return call.alibi_slopes ? call.alibi_slopes[head * call.group + row % call.group] : 0.0f;
}

// Addresses of `count` consecutive keys or values of one head; false where the block table leaves the cache.
template <class T>
bool addresses(const AttentionCall& call, const Unit& unit, bool values, int64_t first, int64_t count, const T** to) {
  const int64_t page_step = values ? call.v_page : call.k_page, slot_step = values ? call.v_slot : call.k_slot;
  const T* cache = static_cast<const T*>(values ? call.v_cache : call.k_cache);
  cache += unit.head * (values ? call.v_head : call.k_head);
  const int32_t* table = call.block_table + unit.seq * call.table_stride;
  int64_t slot = first % call.page_size;
  for (int64_t page = first / call.page_size, i = 0; i < count; ++page, slot = 0) {
    if (table[page] < 0 || table[page] >= call.pages) return false;
    const T* row = cache + table[page] * page_step + slot * slot_step;
    for (; slot < call.page_size && i < count; ++slot, row += slot_step) to[i++] = row;
  }
  return true;
}

// Asks for a row to be in the second cache before it is needed.  The empty statement keeps GCC from deleting a loop that
// computes nothing.
LLMKERNELS_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) {
    __builtin_prefetch(row + line, 0, 2);
    asm volatile("");
  }
}

constexpr float kNothing = -INFINITY;

// Products q . k of one row with the keys from `first` on become scores, those unseen -inf.  Returns the largest.
// count is a multiple of kLanes; what stands behind the last key counts as unseen.
LLMKERNELS_INLINE float finish_scores(const AttentionCall& call, const Visible& seen, float scale, float slope,
                                      int64_t first, int64_t count, float* scores) {
  const auto every = [&](auto change) {
    Floats top = broadcast(kNothing);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats changed = change(load(scores + i), i);
      store(scores + i, changed);
      top = max(top, changed);
    }
    return largest(top);
  };
  const int64_t lo = seen.lo - first, hi = seen.hi - first, fresh = seen.first_new - first;
  const bool all_seen = lo <= 0 && hi >= count && !(seen.tree && fresh < count);
  const bool plain = call.soft_cap == 0 && !call.alibi_slopes && !seen.tree;
  if (all_seen && plain) return every([&](Floats s, int64_t) { return s * broadcast(scale); });
  if (plain) {
    Floats lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = float(i);
    return every([&](Floats s, int64_t i) {  // a key before lo, or from hi on, is not seen
      const Floats below = broadcast(float(lo - i)), above = broadcast(float(hi - i)), nothing = broadcast(kNothing);
      return less(lane, below, nothing, less(lane, above, s * broadcast(scale), nothing));
    });
  }
  if (call.soft_cap > 0) {
    const Floats inner = broadcast(scale / call.soft_cap), cap = broadcast(call.soft_cap);
    every([&](Floats s, int64_t) { return cap * tanh(s * inner); });
  } else {
    every([&](Floats s, int64_t) { return s * broadcast(scale); });
  }
  if (call.alibi_slopes)
    for (int64_t i = 0; i < count; ++i) scores[i] += slope * float(first + i - seen.position);
  for (int64_t i = 0; i < least(count, lo); ++i) scores[i] = kNothing;
  for (int64_t i = most<int64_t>(0, hi); i < count; ++i) scores[i] = kNothing;
  if (seen.tree)
    for (int64_t i = most<int64_t>(0, fresh); i < least(count, hi); ++i)
      if (!(seen.tree[(i - fresh) / 32] >> ((i - fresh) % 32) & 1)) scores[i] = kNothing;
  return every([](Floats s, int64_t) { return s; });
}

// exp(score - largest) in `weights`, which may be the scores; returns their sum.
template <class T>
LLMKERNELS_INLINE float exponentials(const float* scores, int64_t count, float largest, T* weights) {
  const Floats top = broadcast(largest == kNothing ? 0.0f : largest);
  Floats total = zeros();
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Floats first = exp(load(scores + i) - top), second = exp(load(scores + i + kLanes) - top);
    store_weights(weights + i, first, second);
    total = total + first + second;
  }
  if (i < count) {
    const Floats weight = exp(load(scores + i) - top);
    store(weights + i, weight);
    total = total + weight;
  }
  return sum(total);
}

// The address of a row's query, in elements of q.
LLMKERNELS_INLINE int64_t query_offset(const AttentionCall& call, int64_t seq, int64_t head, int64_t row) {
  const int64_t token = call.cu_seqlens_q[seq] + row / call.group;
  return token * call.q_token + (head * call.group + row % call.group) * call.q_head;
}

LLMKERNELS_INLINE float score_scale(const AttentionCall& call, int64_t head) {
  return call.scale * (call.k_scale ? call.k_scale[call.scale_per_head ? head : 0] : 1.0f);
}

}  // namespace llmkernels::LLMKERNELS_ISA
