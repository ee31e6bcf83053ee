// A unit of few queries over at most kSplit keys: decode, bound by how fast keys and values come from memory.
//
//   for each block of kBlockKeys keys     keys ->
//     for each KV head of the unit      +--+--+--+--+     1  a tile of R rows x kLanes / R keys is kLanes dot products,
//                                rows R |  |  |  |  |        each kept as a vector and added up across lanes with the
//                                       +--+--+--+--+        others; a key is loaded once for R rows
//                                                         2  online softmax of each row
//                                                         3  the sums of R rows x C vectors stay in registers while
//                                                            kTile values pass
//
// Heads run inside blocks because a page holds all of them.  Meanwhile the next block of all heads is fetched in the order
// of its addresses, as no processor guesses where pages lie: a row with every few products, because a burst fills the
// queue of misses and then everything waits, and into the second cache, because the first one waits for too few lines at
// once to keep memory busy.
#pragma once
#include <type_traits>
#include <utility>

#include "cpu/attention_call.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int64_t kSplit = 512;     // keys of a unit
constexpr int64_t kFewRows = 20;    // above these, packing keys into tiles pays: with 24, not with 20 that read 64 MB
constexpr int64_t kBlockKeys = 32;  // keys of one head looked at together; all heads of two blocks must fit the second cache
constexpr int64_t kTile = 32;       // values summed between two loads of the running sums
constexpr int64_t kTwoLanes = 2 * kLanes;

// kTwoLanes elements as two vectors.  bfloat16 come as even and odd ones, which costs less than their order.
struct Two {
  Floats first, second;
};
template <class T>
LLMKERNELS_INLINE Two load_two(const T* from) {
  if constexpr (std::is_same_v<T, bf16>) {
    const Pairs pairs = load_pairs(from);
    return {even(pairs), odd(pairs)};
  } else {
    return {load(from), load(from + kLanes)};
  }
}
LLMKERNELS_INLINE Floats dot(Two a, Two b, Floats c) { return fma(a.second, b.second, fma(a.first, b.first, c)); }

// n elements and zeros.
template <class T>
struct Padded {
  T elements[kTwoLanes] = {};
  Padded() = default;
  LLMKERNELS_INLINE Padded(const T* from, int64_t n) { std::memcpy(elements, from, n * sizeof(T)); }
};

// kTwoLanes elements as the dot product wants them.  kPaired: bfloat16 stay pairs, and are multiplied as such.
template <bool kPaired, class T>
LLMKERNELS_INLINE auto load_block(const T* from) {
  if constexpr (kPaired) {
    return load_pairs(from);
  } else {
    return load_two(from);
  }
}

// Columns of one value, or with kPaired of two, as the multiples that a weight, or a pair of them, is summed in.
template <bool kPaired, class T>
LLMKERNELS_INLINE auto load_values(const T* one, const T* other) {
  if constexpr (kPaired) {
    const Pairs a = load_pairs(one), b = load_pairs(other);
    return std::pair{even_pairs(a, b), odd_pairs(a, b)};
  } else {
    const Two value = load_two(one);
    return std::pair{value.first, value.second};
  }
}
LLMKERNELS_INLINE Floats spread(const float* weight) { return broadcast(*weight); }
LLMKERNELS_INLINE Pairs spread(const bf16* weights) { return broadcast_pair(weights); }
LLMKERNELS_INLINE Floats dot(Floats a, Floats b, Floats c) { return fma(a, b, c); }

// Where consecutive keys and their values lie, of one KV head.  Behind the last one the lists repeat it.
template <class T>
struct Block {
  int64_t first, count;
  const T *keys[kBlockKeys], *values[kBlockKeys];
};
template <class T>
bool find_block(const AttentionCall& call, const Unit& unit, int64_t first, Block<T>& block) {
  block.first = first;
  block.count = least(kBlockKeys, unit.end_key - first);
  if (!addresses(call, unit, false, first, block.count, block.keys)) return false;
  if (!addresses(call, unit, true, first, block.count, block.values)) return false;
  for (int64_t j = block.count; j < kBlockKeys; ++j) {
    block.keys[j] = block.keys[block.count - 1];
    block.values[j] = block.values[block.count - 1];
  }
  return true;
}

// The rows of a block that will be needed, keys or values of all heads of a unit, fetched one at a time.
struct Fetch {
  const char* const* rows = nullptr;  // of the first head
  int64_t row_bytes = 0, head_bytes = 0, heads = 0, head = 0, key = 0;
  bool heads_first = false;  // the heads of a key lie nearer to each other than two keys
  int64_t left = 0;

  Fetch() = default;
  template <class T>
  Fetch(const T* const* first, int64_t width, int64_t slot_step, int64_t head_step, int64_t all_heads)
      : rows(reinterpret_cast<const char* const*>(first)),
        row_bytes(width * sizeof(T)),
        head_bytes(head_step * sizeof(T)),
        heads(all_heads),
        heads_first(head_step < slot_step),
        left(kBlockKeys * all_heads) {}

  LLMKERNELS_INLINE void step() {
    if (left == 0) return;
    prefetch_row(rows[key] + head * head_bytes, row_bytes);
    --left;
    if (heads_first ? ++head == heads : ++key == kBlockKeys) {
      heads_first ? ++key : ++head;
      (heads_first ? head : key) = 0;
    }
  }
  void finish(int64_t until) {
    while (left > until) step();
  }
};

// scores[r * kBlockKeys + j] = query r . key j, for R rows and kLanes / R keys, which lie `shift` behind `keys`.
template <int R, bool kPaired, class T, class Query>
LLMKERNELS_INLINE void score_tile(const Query* queries, const T* const* keys, int64_t shift, int64_t dim,
                                  float* scores, Fetch& fetch) {
  constexpr int kKeys = kLanes / R;
  const int64_t blocks = ceil_div(dim, kTwoLanes), whole = dim / kTwoLanes;
  Floats totals[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) totals[i] = zeros();
  for (int64_t b = 0; b < whole; ++b) {
    for (int j = 0; j < kKeys; j += 4) fetch.step();
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const auto key = load_block<kPaired>(keys[j] + shift + b * kTwoLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) totals[r * kKeys + j] = dot(queries[r * blocks + b], key, totals[r * kKeys + j]);
    }
  }
  if (whole < blocks)
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const Padded<T> last(keys[j] + shift + whole * kTwoLanes, dim - whole * kTwoLanes);
      const auto key = load_block<kPaired>(last.elements);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) totals[r * kKeys + j] = dot(queries[r * blocks + whole], key, totals[r * kKeys + j]);
    }
  float products[kLanes];
  store(products, sums(totals));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) std::memcpy(scores + r * kBlockKeys, products + r * kKeys, kKeys * sizeof(float));
}

// sums[r, :] += weights[r * kBlockKeys + j] * value j, for R rows, `count` values, C blocks of columns from `column`.
template <int R, int C, bool kPaired, class T, class Weight>
LLMKERNELS_INLINE void value_tile(const Weight* weights, const T* const* values, int64_t shift, int64_t count,
                                  int64_t columns, float* sums, int64_t stride, Fetch& fetch) {
  constexpr int kStep = kPaired ? 2 : 1;
  static const T nothing[C * kTwoLanes] = {};  // beside an odd last value: its weight is 0, but 0 * inf is not
  Floats totals[R][2 * C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) totals[r][c] = load(sums + r * stride + c * kLanes);
  for (int64_t j = 0; j < count; j += kStep) {
    fetch.step();
    const T *one = values[j] + shift, *other = j + kStep <= count ? values[j + kStep - 1] + shift : nothing;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const int64_t at = c * kTwoLanes, left = columns - at;
      const auto [first, second] =
          left >= kTwoLanes
              ? load_values<kPaired>(one + at, other + at)
              : load_values<kPaired>(Padded<T>(one + at, left).elements, Padded<T>(other + at, left).elements);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto weight = spread(weights + r * kBlockKeys + j);
        totals[r][2 * c] = dot(weight, first, totals[r][2 * c]);
        totals[r][2 * c + 1] = dot(weight, second, totals[r][2 * c + 1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) store(sums + r * stride + c * kLanes, totals[r][c]);
}

// use(row, R) for each group of R = 4, 2 or 1 rows, as a constant.
template <class Use>
LLMKERNELS_INLINE void each_rows(int64_t rows, Use use) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) use(row, std::integral_constant<int, 4>{});
  if (row + 2 <= rows) use(row, std::integral_constant<int, 2>{}), row += 2;
  if (row < rows) use(row, std::integral_constant<int, 1>{});
}

// Buffers of a unit, in one piece of memory.
template <class T, bool kPaired>
struct FewBuffers {
  // A quantized cache meets float32 queries where pairs do not pay, any other one queries of its own type.
  using Q = std::conditional_t<kPaired, bf16, std::conditional_t<sizeof(T) == 1, float, T>>;
  using Query = decltype(load_block<kPaired>(static_cast<const Q*>(nullptr)));
  using Weight = std::conditional_t<kPaired, bf16, float>;
  int64_t blocks, width;  // of kTwoLanes channels of a query; floats of a row of values
  Query* queries;         // [heads, rows, blocks]
  float* scores;          // [kFewRows, kBlockKeys]
  Weight* weights;        // [kFewRows, kBlockKeys]
  Visible* seen;          // [kFewRows]
  Block<T>* lists;        // [2]
  uintptr_t end;

  FewBuffers(const AttentionCall& call, int64_t heads, char* memory)
      : blocks(ceil_div(call.dim, kTwoLanes)), width(ceil_div(call.v_dim, kTwoLanes) * kTwoLanes) {
    Carver carver{uintptr_t(memory)};
    carver.take(queries, heads * kFewRows * blocks);
    carver.take(scores, kFewRows * kBlockKeys);
    carver.take(weights, kFewRows * kBlockKeys);
    carver.take(seen, kFewRows);
    carver.take(lists, 2);
    end = carver.end;
  }
};

// queries[rows, blocks] of one head.
template <class T, bool kPaired>
void load_queries(const AttentionCall& call, const Unit& unit, int64_t head, const FewBuffers<T, kPaired>& to,
                  typename FewBuffers<T, kPaired>::Query* queries) {
  using Q = typename FewBuffers<T, kPaired>::Q;
  for (int64_t r = 0; r < unit.rows(); ++r) {
    const int64_t offset = query_offset(call, unit.seq, head, unit.first_row + r);
    for (int64_t b = 0; b < to.blocks; ++b) {
      const int64_t n = least(kTwoLanes, call.dim - b * kTwoLanes), at = offset + b * kTwoLanes;
      Padded<Q> block;
      if constexpr (kPaired || std::is_same_v<T, Q>) {
        block = Padded<Q>(static_cast<const Q*>(call.q) + at, n);
      } else {
        with_float(call.q_dtype, [&](auto element) {
          const auto* from = static_cast<const decltype(element)*>(call.q) + at;
          for (int64_t i = 0; i < n; ++i) block.elements[i] = widen(from[i]);
          return kOk;
        });
      }
      queries[r * to.blocks + b] = load_block<kPaired>(block.elements);
    }
  }
}

// One head's rows over one block of keys.  ahead: keys and values to fetch meanwhile.
template <class T, bool kPaired>
void attend_block(const AttentionCall& call, const Unit& unit, const FewBuffers<T, kPaired>& to,
                  const typename FewBuffers<T, kPaired>::Query* queries, const Block<T>& block, int64_t head,
                  Fetch (&ahead)[2], const Partial& found) {
  const int64_t rows = unit.rows(), padded = ceil_div(block.count, kLanes) * kLanes;
  const int64_t key_shift = head * call.k_head, value_shift = head * call.v_head;
  for (int64_t j = 0; j < padded; j += kLanes)
    each_rows(rows, [&](int64_t r, auto R) {
      for (int i = 0; i < kLanes; i += kLanes / R)
        score_tile<R, kPaired>(queries + r * to.blocks, block.keys + j + i, key_shift, call.dim,
                               to.scores + r * kBlockKeys + j + i, ahead[0]);
    });
  const float scale = score_scale(call, unit.head + head);
  for (int64_t r = 0; r < rows; ++r) {
    Visible seen = to.seen[r];
    seen.hi = least(seen.hi, block.first + block.count);
    float* scores = to.scores + r * kBlockKeys;
    const float before = found.largest[r];
    const float bias = slope(call, unit.head + head, unit.first_row + r);
    const float top = most(before, finish_scores(call, seen, scale, bias, block.first, padded, scores));
    const float fade = before == kNothing ? 0.0f : before == top ? 1.0f : expf(before - top);
    found.largest[r] = top;
    found.total[r] = fade * found.total[r] + exponentials(scores, padded, top, to.weights + r * kBlockKeys);
    float* sums = found.values + r * found.stride;
    for (int64_t i = 0; fade != 1 && i < to.width; i += kLanes)
      store(sums + i, fade == 0 ? zeros() : load(sums + i) * broadcast(fade));
  }
  for (int64_t j = 0; j < block.count; j += kTile) {
    const int64_t count = least(kTile, block.count - j);
    each_rows(rows, [&](int64_t r, auto R) {
      constexpr int C = kRegisters / 4 / R;
      const T* const* values = block.values + j;
      const auto* weights = to.weights + r * kBlockKeys + j;
      float* sums = found.values + r * found.stride;
      int64_t column = 0;
      for (; column + C * kTwoLanes <= call.v_dim; column += C * kTwoLanes)
        value_tile<R, C, kPaired>(weights, values, value_shift + column, count, C * kTwoLanes, sums + column,
                                  found.stride, ahead[1]);
      for (; column < call.v_dim; column += kTwoLanes)
        value_tile<R, 1, kPaired>(weights, values, value_shift + column, count, call.v_dim - column, sums + column,
                                  found.stride, ahead[1]);
    });
  }
}

// found(head): the Partial of each of the unit's heads.
template <class T, bool kPaired, class Found>
Status attend_few(const AttentionCall& call, const Unit& unit, char* memory, Found found) {
  const FewBuffers<T, kPaired> to(call, unit.heads, memory);
  const int64_t rows = unit.rows(), queries = rows * to.blocks;
  Block<T>*block = to.lists, *next = to.lists + 1;
  for (int64_t h = 0; h < unit.heads; ++h)
    for (int64_t r = 0; r < rows; ++r) found(unit.head + h).clear(r, to.width);
  if (unit.keys() == 0) return kOk;
  if (!find_block(call, unit, unit.first_key, *block)) return kBadIndex;
  Fetch(block->keys, call.dim, call.k_slot, call.k_head, unit.heads).finish(0);
  Fetch(block->values, call.v_dim, call.v_slot, call.v_head, unit.heads).finish(0);
  for (int64_t r = 0; r < rows; ++r) to.seen[r] = visible(call, unit.seq, unit.first_row + r);
  for (int64_t h = 0; h < unit.heads; ++h)
    load_queries(call, unit, unit.head + h, to, to.queries + h * queries);
  for (int64_t first = unit.first_key; first < unit.end_key; first += kBlockKeys, std::swap(block, next)) {
    const bool more = first + kBlockKeys < unit.end_key;
    if (more && !find_block(call, unit, first + kBlockKeys, *next)) return kBadIndex;
    Fetch ahead[2];
    if (more) {
      ahead[0] = {next->keys, call.dim, call.k_slot, call.k_head, unit.heads};
      ahead[1] = {next->values, call.v_dim, call.v_slot, call.v_head, unit.heads};
    }
    for (int64_t h = 0; h < unit.heads; ++h) {
      attend_block(call, unit, to, to.queries + h * queries, *block, h, ahead, found(unit.head + h));
      for (Fetch& fetch : ahead) fetch.finish((unit.heads - 1 - h) * kBlockKeys);
    }
  }
  if constexpr (kPaired || std::is_same_v<T, bf16>)  // even and odd columns apart until here
    for (int64_t h = 0; h < unit.heads; ++h)
      for (int64_t r = 0; r < rows; ++r) {
        const Partial partial = found(unit.head + h);
        for (float *at = partial.values + r * partial.stride, *end = at + to.width; at < end; at += kTwoLanes) {
          Floats first = load(at), second = load(at + kLanes);
          interleave(first, second);
          store(at, first);
          store(at + kLanes, second);
        }
      }
  return kOk;
}

}  // namespace llmkernels::LLMKERNELS_ISA
