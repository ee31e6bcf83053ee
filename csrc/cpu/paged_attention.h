// Paged attention: cuts a call into units, runs them on all threads, joins what was split, and writes the result.
//
//   few rows a sequence (decode)     the keys are cut every kSplit, so that one long sequence keeps all threads busy;
//                                    a task takes several heads, which share the pages it reads
//   up to kManyRows (MLA, trees)     the keys are cut every kSplitMany
//   more (prefill)                   the rows are cut every kManyRows, the keys of a block are one unit
//
// Where the cuts lie depends on the sequence alone, and parts are joined in order: the same bits for any number of
// threads and whatever else is in the batch.
#pragma once
#include "cpu/attention_many.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int64_t kSplitMany = 2048;
constexpr int64_t kHeadBytes = 256 << 10;  // of keys and values in a block of all heads of a task
constexpr int64_t kTasksPerThread = 4;

// A unit for every KV head.  part is its number among all parts that have to be joined, -1 where it is alone.
struct Span {
  Unit unit;
  int64_t part, parts;
};

// use(span) for every span of the call; false where a length or a start is impossible.
template <class Use>
bool each_span(const AttentionCall& call, Use use) {
  int64_t part = 0;
  for (int64_t seq = 0; seq < call.seqs; ++seq) {
    const int64_t fresh = call.cu_seqlens_q[seq + 1] - call.cu_seqlens_q[seq], length = call.seq_lens[seq];
    if (fresh < 0 || call.cu_seqlens_q[seq] < 0 || call.cu_seqlens_q[seq + 1] > call.tokens || length < 0 ||
        length > call.max_pages * call.page_size || (length && length < fresh))
      return false;
    const int64_t rows = fresh * call.group;
    for (int64_t row = 0; row < rows; row += kManyRows) {
      const int64_t end = least(row + kManyRows, rows);
      const int64_t lo = length ? visible(call, seq, row).lo : 0;
      const int64_t hi = length ? visible(call, seq, end - 1).hi : 0;
      const int64_t step = rows <= kFewRows ? kSplit : rows <= kManyRows ? kSplitMany : most<int64_t>(hi, 1);
      const int64_t first = lo / step, parts = most<int64_t>(1, ceil_div(hi, step) - first);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t from = most(lo, (first + i) * step), to = least(hi, (first + i + 1) * step);
        use(Span{{seq, row, end, from, to, 0, 1}, parts > 1 ? part++ : -1, parts});
      }
    }
  }
  return true;
}

// Rows of one unit and KV head: out = values / total, lse = largest + ln total, the sink included in both.
inline void write_rows(const AttentionCall& call, const Unit& unit, int64_t kv_head, const Partial& found) {
  const float v_scale = call.v_scale ? call.v_scale[call.scale_per_head ? kv_head : 0] : 1.0f;
  for (int64_t r = 0; r < unit.rows(); ++r) {
    const int64_t row = unit.first_row + r, head = kv_head * call.group + row % call.group;
    const int64_t at = (call.cu_seqlens_q[unit.seq] + row / call.group) * call.kv_heads * call.group + head;
    const float sink = call.sinks ? call.sinks[head] : kNothing, top = most(found.largest[r], sink);
    const float fade = found.largest[r] == kNothing ? 0.0f : expf(found.largest[r] - top);
    const float total = fade * found.total[r] + (sink == kNothing ? 0.0f : expf(sink - top));
    if (call.lse) call.lse[at] = top == kNothing ? kNothing : top + logf(total);
    const Floats share = broadcast(found.total[r] == 0 ? 0.0f : v_scale * fade / total);
    with_float(call.q_dtype, [&](auto element) {
      auto* out = static_cast<decltype(element)*>(call.out) + at * call.v_dim;
      const float* values = found.values + r * found.stride;
      each_vector(call.v_dim, [&](int64_t i, auto n) { store(out + i, load(values + i) * share, n); });
      return kOk;
    });
  }
}

// Adds `part` to `joined`, rows of the same queries over other keys.
inline void join(const Partial& part, int64_t rows, int64_t width, Partial joined) {
  for (int64_t r = 0; r < rows; ++r) {
    const float top = most(joined.largest[r], part.largest[r]);
    if (top == kNothing) continue;
    const float old_share = expf(joined.largest[r] - top), new_share = expf(part.largest[r] - top);
    joined.largest[r] = top;
    joined.total[r] = old_share * joined.total[r] + new_share * part.total[r];
    for (int64_t i = 0; i < width; i += kLanes) {
      float* sums = joined.values + r * joined.stride + i;
      const Floats added = load(part.values + r * part.stride + i) * broadcast(new_share);
      store(sums, fma(load(sums), broadcast(old_share), added));
    }
  }
}

// KV heads that one task takes: as many as run well inside a block, but several tasks for each thread.
inline int64_t heads_of_a_task(const AttentionCall& call, int64_t element_bytes, int64_t spans, int threads) {
  const int64_t fitting = kHeadBytes / (kBlockKeys * (call.dim + call.v_dim) * element_bytes);
  const int64_t sharing = spans * call.kv_heads / (kTasksPerThread * threads);
  return most<int64_t>(1, least(least(fitting, sharing), call.kv_heads));
}

template <class T, bool kPaired>
Status attend(const AttentionCall& call, int threads) {
  const int64_t width = ceil_div(call.v_dim, kTwoLanes) * kTwoLanes;
  int64_t count = 0, parts = 0, most_rows = 1;
  if (!each_span(call, [&](const Span& span) {
        ++count;
        parts += span.part >= 0;
        most_rows = most(most_rows, span.unit.rows());
      }))
    return kBadIndex;
  // [count] spans, then for each part and KV head: largest, total [most_rows] and values [most_rows, width]
  const int64_t partial_floats = most_rows * (width + 2), list_bytes = ceil_div(count * sizeof(Span), 64) * 64;
  char* shared = static_cast<char*>(scratch(kShared, list_bytes + parts * call.kv_heads * partial_floats * 4 + 64));
  if (!shared) return kOutOfMemory;
  Span* spans = reinterpret_cast<Span*>(shared);
  int64_t next = 0;
  each_span(call, [&](const Span& span) { spans[next++] = span; });
  const auto partial_at = [&](float* memory, int64_t index) {
    float* at = memory + index * partial_floats;
    return Partial{at + most_rows * width, at + most_rows * (width + 1), at, width};
  };
  const auto partial_of = [&](int64_t part, int64_t head) {
    return partial_at(reinterpret_cast<float*>(shared + list_bytes), part * call.kv_heads + head);
  };

  int worst = kOk;
  const int64_t heads = heads_of_a_task(call, sizeof(T), count, threads), groups = ceil_div(call.kv_heads, heads);
  const int64_t work_bytes = most<int64_t>(FewBuffers<T, kPaired>(call, heads, nullptr).end,
                                           ManyBuffers<T, kPaired>(call, nullptr).end);
  parallel_tasks(count * groups, threads, [&](int64_t task) {
    const Span& span = spans[task / groups];
    Unit unit = span.unit;
    unit.head = task % groups * heads;
    unit.heads = least(heads, call.kv_heads - unit.head);
    char* own = static_cast<char*>(scratch(kOwn, work_bytes + heads * partial_floats * 4));
    const auto found = [&](int64_t head) {
      if (span.part >= 0) return partial_of(span.part, head);
      return partial_at(reinterpret_cast<float*>(own + work_bytes), head - unit.head);
    };
    Status status = kOutOfMemory;
    if (own) {
      const bool few = unit.rows() <= kFewRows && unit.keys() <= kSplit;
      status = few ? attend_few<T, kPaired>(call, unit, own, found) : attend_many<T, kPaired>(call, unit, own, found);
      for (int64_t h = unit.head; status == kOk && span.part < 0 && h < unit.head + unit.heads; ++h)
        write_rows(call, unit, h, found(h));
    }
    if (status != kOk) {
#pragma omp atomic write
      worst = status;
    }
  });
  if (worst != kOk || parts == 0) return Status(worst);
  parallel_tasks(count * call.kv_heads, threads, [&](int64_t task) {
    const Span& span = spans[task / call.kv_heads];
    const bool begins = span.part >= 0 && (&span == spans || (&span)[-1].unit.seq != span.unit.seq ||
                                           (&span)[-1].unit.first_row != span.unit.first_row);
    if (!begins) return;
    const int64_t head = task % call.kv_heads;
    const Partial joined = partial_of(span.part, head);
    for (int64_t i = 1; i < span.parts; ++i) join(partial_of(span.part + i, head), span.unit.rows(), width, joined);
    write_rows(call, span.unit, head, joined);
  });
  return kOk;
}

Status paged_attention(int q_dtype, int cache_dtype, const void* q, int64_t q_token, int64_t q_head,
                       const void* k_cache, int64_t k_page, int64_t k_slot, int64_t k_head, const void* v_cache,
                       int64_t v_page, int64_t v_slot, int64_t v_head, int64_t pages, int64_t page_size,
                       int64_t kv_heads, int64_t group, int64_t dim, int64_t v_dim, TokenCount tokens, SequenceCount seqs,
                       const void* block_table, int64_t table_stride, int64_t max_pages, const void* seq_lens,
                       const void* cu_seqlens_q, float scale, bool causal, int64_t left, int64_t right,
                       float soft_cap, const void* sinks, const void* alibi_slopes, const void* k_scale,
                       const void* v_scale, bool scale_per_head, const void* tree_mask, int64_t tree_words, void* out,
                       void* lse, int threads) {
  const AttentionCall call{q_dtype, cache_dtype, q, q_token, q_head, k_cache, v_cache, k_page, k_slot, k_head, v_page,
                           v_slot, v_head, pages, page_size, kv_heads, group, dim, v_dim, tokens, seqs,
                           static_cast<const int32_t*>(block_table), table_stride, max_pages,
                           static_cast<const int32_t*>(seq_lens), static_cast<const int32_t*>(cu_seqlens_q), scale,
                           causal, left, right, soft_cap, static_cast<const float*>(sinks),
                           static_cast<const float*>(alibi_slopes), static_cast<const float*>(k_scale),
                           static_cast<const float*>(v_scale), scale_per_head, static_cast<const uint32_t*>(tree_mask),
                           tree_words, out, static_cast<float*>(lse)};
  return with_element(cache_dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (kPairDot && (std::is_same_v<T, bf16> || sizeof(T) == 1))  // bytes are exact in bfloat16
      if (q_dtype == kBFloat16 && pair_dot_pays()) return attend<T, true>(call, threads);
    return attend<T, false>(call, threads);
  });
}

}  // namespace llmkernels::LLMKERNELS_ISA
