// A unit of many queries: prefill and MLA, bound by arithmetic.  Online softmax over tiles of kTileKeys keys:
//
//            dim              kTileKeys            v_dim
//         +---------+         +------+          +---------+
//   rows  |    Q    | x K^T = |  S   | -> P x V |    O    |      a row of O is first scaled by exp(old top - new top)
//         +---------+         +------+          +---------+
//
// Queries, keys and values are repacked as cells (tile.h): float32, or pairs of bfloat16 where the processor multiplies
// those.  Then the weights P are rounded to bfloat16, as every kernel on matrix units has it; their sum is not.
// Flash attention: Dao 2023, https://arxiv.org/abs/2307.08691.
#pragma once
#include "cpu/attention_few.h"
#include "cpu/tile.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int64_t kManyRows = 192;  // Q, S and O of 128 channels: 250 KB, in a second-level cache
constexpr int64_t kTileKeys = 64;

template <bool kPaired>
using CellsOf = std::conditional_t<kPaired, PairCells, FloatCells>;

// An element of T or of a query as one of the cells' elements.
template <class To, class From>
LLMKERNELS_INLINE void convert(const From* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, n * sizeof(To));
  } else {
    each_vector(n, [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes), lanes); });
  }
}

// Buffers of a unit, in one piece of memory.
template <class T, bool kPaired>
struct ManyBuffers {
  using Element = typename CellsOf<kPaired>::Element;
  static constexpr int kDepth = CellsOf<kPaired>::kDepth;
  int64_t depth, width;  // cells of a query, floats of a row of values
  Element *queries, *keys, *values, *weights;
  float *scores, *rescale, *tops;
  Visible* seen;
  const T** list;
  uintptr_t end;

  ManyBuffers(const AttentionCall& call, char* memory)
      : depth(ceil_div(call.dim, kDepth)), width(ceil_div(call.v_dim, kLanes) * kLanes) {
    Carver carver{uintptr_t(memory)};
    carver.take(queries, kManyRows * depth * kDepth);
    carver.take(keys, depth * kTileKeys * kDepth);
    carver.take(values, width * kTileKeys);
    carver.take(weights, kManyRows * kTileKeys);
    carver.take(scores, kManyRows * kTileKeys);
    carver.take(rescale, kManyRows);
    carver.take(tops, kManyRows);
    carver.take(seen, kManyRows);
    carver.take(list, kTileKeys);
    end = carver.end;
  }
};

// keys[d, j] = cell d of key j, kLanes keys at once; a column behind the last key holds that key again, and its score is
// never seen.
template <class T, bool kPaired>
void pack_keys(const AttentionCall& call, const ManyBuffers<T, kPaired>& to, int64_t count) {
  using Element = typename ManyBuffers<T, kPaired>::Element;
  constexpr int kDepth = ManyBuffers<T, kPaired>::kDepth;
  for (int64_t j = 0; j < count; j += kLanes)
    for (int64_t d = 0; d < to.depth; d += kLanes) {
      const int64_t n = least<int64_t>(kLanes * kDepth, call.dim - d * kDepth);
      Floats cells[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        const T* key = to.list[least(j + lane, count - 1)] + d * kDepth;
        if constexpr (std::is_same_v<T, Element>) {
          if (n == kLanes * kDepth) {
            std::memcpy(&cells[lane], key, sizeof(Floats));
            continue;
          }
        }
        Element converted[kLanes * kDepth] = {};
        convert(key, n, converted);
        std::memcpy(&cells[lane], converted, sizeof(Floats));
      }
      transpose(cells);
      float* columns = reinterpret_cast<float*>(to.keys) + d * kTileKeys + j;
      for (int64_t i = 0; i < least<int64_t>(kLanes, to.depth - d); ++i) store(columns + i * kTileKeys, cells[i]);
    }
}

// to[c] = the pair of a[c] and b[c]; b may be null, which is zeros.
template <class T>
void pack_pairs(const T* a, const T* b, int64_t width, bf16* to) {
  int64_t c = 0;
  for (; b && c + kTwoLanes <= width; c += kTwoLanes) {
    const Pairs one = load_pairs(a + c), other = load_pairs(b + c);
    Floats first = bit_cast<Floats>(even_pairs(one, other)), second = bit_cast<Floats>(odd_pairs(one, other));
    interleave(first, second);
    store(reinterpret_cast<float*>(to + 2 * c), first);
    store(reinterpret_cast<float*>(to + 2 * c) + kLanes, second);
  }
  for (; c < width; ++c)
    to[2 * c] = narrow<bf16>(widen(a[c])), to[2 * c + 1] = b ? narrow<bf16>(widen(b[c])) : bf16{0};
}

// values[j, c], in pairs values[j / 2, c, j % 2]; rows behind the last are zero: their weight is, but 0 * NaN is not.
template <class T, bool kPaired>
void pack_values(const AttentionCall& call, const ManyBuffers<T, kPaired>& to, int64_t count) {
  constexpr int kDepth = ManyBuffers<T, kPaired>::kDepth;
  for (int64_t j = 0; j < count; j += kDepth) {
    auto* row = to.values + j * to.width;
    if constexpr (kDepth == 1) convert(to.list[j], call.v_dim, row);
    else pack_pairs<T>(to.list[j], j + 1 < count ? to.list[j + 1] : nullptr, call.v_dim, row);
  }
  const int64_t packed = ceil_div(count, kDepth) * kDepth;
  std::memset(to.values + packed * to.width, 0, (kTileKeys - packed) * to.width * sizeof(*to.values));
}

template <class T, bool kPaired>
Status attend_head(const AttentionCall& call, const Unit& unit, char* memory, Partial found) {
  using Cells = CellsOf<kPaired>;
  using Element = typename Cells::Element;
  constexpr int kDepth = Cells::kDepth;
  const ManyBuffers<T, kPaired> to(call, memory);
  const int64_t rows = unit.rows();
  const float scale = score_scale(call, unit.head);

  for (int64_t r = 0; r < rows; ++r) {
    Element* query = to.queries + r * to.depth * kDepth;
    query[to.depth * kDepth - 1] = Element{};
    with_float(call.q_dtype, [&](auto element) {
      const auto* q = static_cast<const decltype(element)*>(call.q);
      convert(q + query_offset(call, unit.seq, unit.head, unit.first_row + r), call.dim, query);
      return kOk;
    });
    found.clear(r, to.width);
    to.seen[r] = visible(call, unit.seq, unit.first_row + r);
  }
  for (int64_t first = unit.first_key; first < unit.end_key; first += kTileKeys) {
    const int64_t count = least(kTileKeys, unit.end_key - first);
    if (!addresses(call, unit, false, first, count, to.list)) return kBadIndex;
    pack_keys(call, to, count);
    multiply<Cells>(rows, kTileKeys, to.queries, to.depth, to.keys, kTileKeys, to.depth, nullptr, to.scores, kTileKeys);
    for (int64_t r = 0; r < rows; ++r) {
      Visible seen = to.seen[r];
      seen.hi = least(seen.hi, first + count);
      const float bias = slope(call, unit.head, unit.first_row + r);
      to.tops[r] = finish_scores(call, seen, scale, bias, first, kTileKeys, to.scores + r * kTileKeys);
    }
    each_vector(rows, [&](int64_t r, auto n) {  // all rows' at once: what they have summed counts so much from now on
      const Floats before = load(found.largest + r, n), top = max(before, load(to.tops + r, n));
      store(found.largest + r, top, n);
      store(to.rescale + r, less(broadcast(kNothing), before, exp(before - top), zeros()), n);
    });
    for (int64_t r = 0; r < rows; ++r)
      found.total[r] = to.rescale[r] * found.total[r] + exponentials(to.scores + r * kTileKeys, kTileKeys,
                                                                      found.largest[r], to.weights + r * kTileKeys);
    if (!addresses(call, unit, true, first, count, to.list)) return kBadIndex;
    pack_values(call, to, count);
    multiply<Cells>(rows, to.width, to.weights, kTileKeys / kDepth, to.values, to.width, kTileKeys / kDepth, to.rescale,
                    found.values, found.stride);
  }
  return kOk;
}

// found(head): the Partial of each of the unit's heads.
template <class T, bool kPaired, class Found>
Status attend_many(const AttentionCall& call, Unit unit, char* memory, Found found) {
  Status status = kOk;
  for (const int64_t end = unit.head + unit.heads; status == kOk && unit.head < end; ++unit.head)
    status = attend_head<T, kPaired>(call, unit, memory, found(unit.head));
  return status;
}

}  // namespace llmkernels::LLMKERNELS_ISA
