// A unit of few queries over at most kSplit keys: decode, bound by how fast keys and values come from memory.
//
//             keys ->
//         +--+--+--+--+--+     Pass 1: a tile of R rows x kLanes / R keys is kLanes dot products, each kept as a vector
//   rows R|  |  |  |  |  |     and added up across lanes with the others.  A key is loaded once for R rows.
//         +--+--+--+--+--+     Pass 2: the softmax of each row.
//                              Pass 3: kTile values at a time, the sums of R rows x C vectors stay in registers.
//
// Meanwhile the keys, then the values, kRowsAhead rows further on are fetched: no processor guesses where pages lie.
#pragma once
#include <type_traits>

#include "cpu/attention_call.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int64_t kSplit = 512;     // keys of a unit: 256 KB of bfloat16 heads of 128
constexpr int64_t kFewRows = 32;    // above these, packing keys into tiles pays
constexpr int64_t kTile = 8;        // values summed between two loads of the running sums
constexpr int64_t kRowsAhead = 16;      // rows fetched ahead: 4 KB of bfloat16 heads of 128
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

// kTwoLanes elements as the dot product wants them.  kPaired: bfloat16 stay pairs, and are multiplied as such.
template <bool kPaired, class T>
LLMKERNELS_INLINE auto load_block(const T* from) {
  if constexpr (kPaired) {
    return load_pairs(from);
  } else {
    return load_two(from);
  }
}
// n elements and zeros.
template <class T>
struct Padded {
  T elements[kTwoLanes] = {};
  Padded() = default;
  LLMKERNELS_INLINE Padded(const T* from, int64_t n) { std::memcpy(elements, from, n * sizeof(T)); }
};

// scores[r * kSplit + j] = query r . keys[j] for R rows and kLanes / R keys.
template <int R, bool kPaired, class T, class Query>
LLMKERNELS_INLINE void score_tile(const Query* queries, const T* const* keys, int64_t dim, float* scores) {
  constexpr int kKeys = kLanes / R;
  const int64_t blocks = ceil_div(dim, kTwoLanes), whole = dim / kTwoLanes;
  Floats totals[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) totals[i] = zeros();
  for (int64_t b = 0; b < whole; ++b) {
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const auto key = load_block<kPaired>(keys[j] + b * kTwoLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) totals[r * kKeys + j] = dot(queries[r * blocks + b], key, totals[r * kKeys + j]);
    }
  }
  if (whole < blocks)
    for (int j = 0; j < kKeys; ++j) {
      const auto key = load_block<kPaired>(Padded<T>(keys[j] + whole * kTwoLanes, dim - whole * kTwoLanes).elements);
      for (int r = 0; r < R; ++r) totals[r * kKeys + j] = dot(queries[r * blocks + whole], key, totals[r * kKeys + j]);
    }
  float products[kLanes];
  store(products, sums(totals));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) std::memcpy(scores + r * kSplit, products + r * kKeys, kKeys * sizeof(float));
}

// sums[r, :] += weights[r * kSplit + j] * values[j][:] for R rows, `count` values, C blocks of columns from `column`.
template <int R, int C, class T>
LLMKERNELS_INLINE void value_tile(const float* weights, const T* const* values, int64_t count, int64_t column,
                                  int64_t columns, float* sums, int64_t stride) {
  Two totals[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) totals[r][c] = load_two(sums + r * stride + column + c * kTwoLanes);
  for (int64_t j = 0; j < count; ++j) {
    Two value[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const T* from = values[j] + column + c * kTwoLanes;
      value[c] = columns >= (c + 1) * kTwoLanes ? load_two(from)
                                             : load_two(Padded<T>(from, columns - c * kTwoLanes).elements);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats weight = broadcast(weights[r * kSplit + j]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        totals[r][c].first = fma(weight, value[c].first, totals[r][c].first);
        totals[r][c].second = fma(weight, value[c].second, totals[r][c].second);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      store(sums + r * stride + column + c * kTwoLanes, totals[r][c].first);
      store(sums + r * stride + column + c * kTwoLanes + kLanes, totals[r][c].second);
    }
}

// use(R) for each group of R = 4, 2 or 1 rows, as a constant.
template <class Use>
LLMKERNELS_INLINE void each_rows(int64_t rows, Use use) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) use(row, std::integral_constant<int, 4>{});
  if (row + 2 <= rows) use(row, std::integral_constant<int, 2>{}), row += 2;
  if (row < rows) use(row, std::integral_constant<int, 1>{});
}

inline int64_t few_bytes(const AttentionCall& call) {
  const int64_t blocks = ceil_div(call.dim, kTwoLanes), pointers = 2 * (kSplit + kLanes) * sizeof(void*);
  return pointers + kFewRows * (kSplit * sizeof(float) + blocks * kTwoLanes * sizeof(float)) + kTwoLanes * blocks * 4;
}

template <class T, bool kPaired>
Status attend_few(const AttentionCall& call, const Unit& unit, char* memory, Partial found) {
  // A quantized cache meets float32 queries, any other one queries of its own type.
  using Q = std::conditional_t<sizeof(T) == 1, float, T>;
  using Query = decltype(load_block<kPaired>(static_cast<const Q*>(nullptr)));
  const int64_t rows = unit.rows(), keys = unit.keys(), padded = ceil_div(keys, kLanes) * kLanes;
  const int64_t blocks = ceil_div(call.dim, kTwoLanes), width = ceil_div(call.v_dim, kTwoLanes) * kTwoLanes;
  Query* queries = reinterpret_cast<Query*>(memory);
  float* scores = reinterpret_cast<float*>(queries + kFewRows * blocks);
  const T** list = reinterpret_cast<const T**>(scores + kFewRows * kSplit);  // keys, padding, then values

  if (!addresses(call, unit, false, unit.first_key, keys, list)) return kBadIndex;
  for (int64_t i = keys; i < padded; ++i) list[i] = list[keys - 1];
  const T** values = list + padded;
  if (!addresses(call, unit, true, unit.first_key, keys, values)) return kBadIndex;
  const auto fetch = [&](int64_t i) {
    if (i < padded) prefetch_row(list[i], call.dim);
    else if (i < padded + keys) prefetch_row(list[i], call.v_dim);
  };
  for (int64_t i = 0; i < kRowsAhead; ++i) fetch(i);

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t offset = query_offset(call, unit, unit.first_row + r);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t n = least(kTwoLanes, call.dim - b * kTwoLanes), at = offset + b * kTwoLanes;
      if constexpr (std::is_same_v<T, Q>) {
        queries[r * blocks + b] = load_block<kPaired>(Padded<Q>(static_cast<const Q*>(call.q) + at, n).elements);
      } else {
        Padded<float> plain;
        with_float(call.q_dtype, [&](auto element) {
          const auto* from = static_cast<const decltype(element)*>(call.q) + at;
          for (int64_t i = 0; i < n; ++i) plain.elements[i] = widen(from[i]);
          return kOk;
        });
        queries[r * blocks + b] = load_block<kPaired>(plain.elements);
      }
    }
  }
  for (int64_t j = 0; j < padded; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) fetch(j + i + kRowsAhead);
    each_rows(rows, [&](int64_t r, auto R) {
      for (int i = 0; i < kLanes; i += kLanes / R)
        score_tile<R, kPaired>(queries + r * blocks, list + j + i, call.dim, scores + r * kSplit + j + i);
    });
  }
  const float scale = score_scale(call, unit.head);
  for (int64_t r = 0; r < rows; ++r) {
    const Visible seen = visible(call, unit.seq, unit.head, unit.first_row + r);
    float* row = scores + r * kSplit;
    found.largest[r] = finish_scores(call, seen, scale, unit.first_key, padded, row);
    found.total[r] = exponentials(row, padded, found.largest[r], row);
    for (int64_t i = 0; i < width; i += kLanes) store(found.values + r * found.stride + i, zeros());
  }
  for (int64_t j = 0; j < keys; j += kTile) {
    const int64_t count = least(kTile, keys - j);
    for (int64_t i = 0; i < kTile; ++i) fetch(padded + j + i + kRowsAhead);
    each_rows(rows, [&](int64_t r, auto R) {
      constexpr int C = kRegisters / 4 / R;
      const float* weights = scores + r * kSplit + j;
      float* sums = found.values + r * found.stride;
      int64_t column = 0;
      for (; column + C * kTwoLanes <= call.v_dim; column += C * kTwoLanes)
        value_tile<R, C>(weights, values + j, count, column, C * kTwoLanes, sums, found.stride);
      for (; column < call.v_dim; column += kTwoLanes)
        value_tile<R, 1>(weights, values + j, count, column, call.v_dim - column, sums, found.stride);
    });
  }
  if constexpr (std::is_same_v<T, bf16>)
    for (int64_t r = 0; r < rows; ++r)
      for (float *to = found.values + r * found.stride, *end = to + width; to < end; to += kTwoLanes) {
        Floats first = load(to), second = load(to + kLanes);
        interleave(first, second);
        store(to, first);
        store(to + kLanes, second);
      }
  return kOk;
}

}  // namespace llmkernels::LLMKERNELS_ISA
