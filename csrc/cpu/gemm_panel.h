// A panel is 64 output channels.  Here: one panel times a few rows of x, for every way in which weights are stored.
//
//   int4, fp4     [panels][columns / 8][64 channels] words: column i of eight in bits 4i .. 4i+3
//   bytes         [panels][columns][64 channels]                  int8 and e4m3 that are read as numbers
//   twos          [panels][columns / 2][64 channels][2 columns]   the same, where pairs are multiplied: AVX-512
//   quads         [panels][columns / 4][64 channels][4 columns]   int8 that meets int8
//
// so that a load gives neighbouring channels and a panel is one stream through memory.  A chunk is columns that share a scale.
// Its products are summed on their own, in registers, and then scaled and added up in float32:
//
//   total[row][channel] += scale[channel] * factor[row] * (sum over the chunk of (code - zero) * x)
//
// A `Source` reads one storage for one way of multiplying:
//   Input, kColumns, kOrder    elements of x, how many of them meet one part, how eight are ordered in memory
//   kParts, kBytes             parts in a load; bytes that one load of all 64 channels covers
//   kOffset, kLazy             offset = zero + kOffset is taken off the codes: by part(), or (lazy) from the sum
//
// One or two rows keep few sums, and a single stream of memory is slower than two: they take two panels side by side, or,
// where registers are few, chunk by chunk in turn.
#pragma once
#include "cpu/gemm_call.h"
#include "cpu/gemm_codes.h"

namespace llmkernels::LLMKERNELS_ISA {

constexpr int kVectors = kPanel / kLanes;
constexpr int kAhead = 4096;  // bytes that weights are asked for before they are needed, at least: a panel is one stream
constexpr int kAbreast = 2;   // panels that few rows read side by side
constexpr int kInOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr int kInHalves[8] = {0, 4, 1, 5, 2, 6, 3, 7};    // nibbles i and i + 4 are the halves of a lane
constexpr int kEvenFirst[8] = {0, 2, 4, 6, 1, 3, 5, 7};   // low nibbles of bytes, then high ones

LLMKERNELS_INLINE Floats product(Floats sum, Floats w, const float* x) { return fma(w, broadcast(*x), sum); }
LLMKERNELS_INLINE Floats product(Floats sum, Pairs w, const bf16* x) { return dot(w, broadcast_pair(x), sum); }
LLMKERNELS_INLINE Words product(Words sum, Bytes w, const int8_t* x) { return dot(sum, w, x); }
LLMKERNELS_INLINE Words product(Words sum, Quads w, const QuadInput* x) { return dot(sum, w, x); }
LLMKERNELS_INLINE Floats floats(Floats x) { return x; }

// Where the weights of a chunk begin, and what is taken off each of their channels.  Vectors from kVectors on belong to
// the next panel, `apart` bytes away.
struct Stored {
  const uint8_t* values;
  const float* offsets;  // [64], those of the next panel behind them
  int64_t apart;
  LLMKERNELS_INLINE const uint8_t* at(int64_t byte, int vector, int vector_bytes) const {
    return values + byte + vector / kVectors * apart + vector % kVectors * vector_bytes;
  }
};
// A load of one word, four columns or eight, for each channel of a vector.
struct StoredWords : Stored {
  static constexpr int kBytes = 4 * kPanel;
  static constexpr bool kStreams = true;
  LLMKERNELS_INLINE Words word_at(int64_t step, int vector) const {
    return load_words(at(step * kBytes, vector, 4 * kLanes));
  }
};

// int4 with float32 x: the zero point is taken off each code, which is exact.
struct Int4Floats : StoredWords {
  using Input = float;
  using Sum = Floats;
  static constexpr int kColumns = 1, kParts = 8;
  static constexpr const int* kOrder = kInOrder;
  static constexpr bool kLazy = false;
  static constexpr float kOffset = kTwo23;
  LLMKERNELS_INLINE Floats part(int64_t step, int i, int vector) const {
    return nibble(word_at(step, vector), i, load(offsets + vector * kLanes));
  }
};

// int4 with x of 16 bits: codes stay where they are in their half of a word, 16^i times too large, and x is as much
// smaller.
struct Int4Scaled : StoredWords {
  using Input = float;
  using Sum = Floats;
  static constexpr int kColumns = 1, kParts = 8;
  static constexpr const int* kOrder = kInOrder;
  static constexpr bool kLazy = true;
  static constexpr float kOffset = 0;
  LLMKERNELS_INLINE Floats part(int64_t step, int i, int vector) const {
    return nibble_in_place(word_at(step, vector), i);
  }
};

struct Fp4Floats : StoredWords {
  using Input = float;
  using Sum = Floats;
  static constexpr int kColumns = 1, kParts = 8;
  static constexpr const int* kOrder = kInOrder;
  static constexpr bool kLazy = false;
  static constexpr float kOffset = 0;
  LLMKERNELS_INLINE Floats part(int64_t step, int i, int vector) const { return fp4(word_at(step, vector), i); }
};

struct Int4Bytes : StoredWords {
  using Input = int8_t;
  using Sum = Words;
  static constexpr int kColumns = 8 / kByteParts, kParts = kByteParts;
  static constexpr const int* kOrder = kEvenFirst;
  static constexpr bool kLazy = true;
  static constexpr float kOffset = 0;
  LLMKERNELS_INLINE Bytes part(int64_t step, int i, int vector) const { return nibble_bytes(word_at(step, vector), i); }
};

struct Int8Quads : StoredWords {
  using Input = QuadInput;
  using Sum = Words;
  static constexpr int kColumns = 4, kParts = 1;
  static constexpr const int* kOrder = kQuadOrder;
  static constexpr bool kLazy = true;
  static constexpr float kOffset = kQuadBias;
  LLMKERNELS_INLINE Quads part(int64_t step, int, int vector) const { return quads(word_at(step, vector)); }
};

// Panels that were decoded.
struct PanelFloats : Stored {
  using Input = float;
  using Sum = Floats;
  static constexpr int kColumns = 1, kParts = 1, kBytes = kPanel * sizeof(float);
  static constexpr bool kStreams = false;
  LLMKERNELS_INLINE Floats part(int64_t step, int, int vector) const {
    return load(reinterpret_cast<const float*>(values + step * kBytes) + vector * kLanes);
  }
};
struct PanelPairs : Stored {
  using Input = bf16;
  using Sum = Floats;
  static constexpr int kColumns = 2, kParts = 1, kBytes = 2 * kPanel * sizeof(bf16);
  static constexpr bool kStreams = false;
  LLMKERNELS_INLINE Pairs part(int64_t step, int, int vector) const {
    return load_pairs(reinterpret_cast<const bf16*>(values + step * kBytes) + vector * 2 * kLanes);
  }
};

#if defined(__AVX512BF16__)
template <bool Integers>  // int4, or e2m1
struct NibblePairs : StoredWords {
  using Input = bf16;
  using Sum = Floats;
  static constexpr int kColumns = 2, kParts = 4;
  static constexpr const int* kOrder = kInHalves;
  static constexpr bool kLazy = Integers;
  static constexpr float kOffset = -8;  // the table has taken 8 off already
  CodeTable table = code_table(Integers);
  explicit NibblePairs(Stored stored) : StoredWords{stored} {}
  LLMKERNELS_INLINE Pairs part(int64_t step, int i, int vector) const {
    return nibble_pairs(word_at(step, vector), i, table);
  }
};

template <class T>  // int8_t or e4m3
struct TwoPairs : Stored {
  using Input = bf16;
  using Sum = Floats;
  static constexpr int kColumns = 2, kParts = 1, kBytes = 2 * kPanel;
  static constexpr const int* kOrder = kInOrder;
  static constexpr bool kLazy = __is_same(T, int8_t), kStreams = true;
  static constexpr float kOffset = 0;
  LLMKERNELS_INLINE Pairs part(int64_t step, int, int vector) const {
    return byte_pairs(reinterpret_cast<const T*>(at(step * kBytes, vector, 2 * kLanes)));
  }
};

template <class T>  // the same for x of more bits than bfloat16 has
struct ByteFloats : Stored {
  using Input = float;
  using Sum = Floats;
  static constexpr int kColumns = 1, kParts = 2, kBytes = 2 * kPanel;
  static constexpr const int* kOrder = kInOrder;
  static constexpr bool kLazy = false, kStreams = true;
  static constexpr float kOffset = 0;
  LLMKERNELS_INLINE Floats part(int64_t step, int i, int vector) const {
    const Pairs both = byte_pairs(reinterpret_cast<const T*>(at(step * kBytes, vector, 2 * kLanes)));
    return (i ? odd(both) : even(both)) - load(offsets + vector * kLanes);
  }
};
#else
template <class T>  // int8_t or e4m3
struct ByteFloats : Stored {
  using Input = float;
  using Sum = Floats;
  static constexpr int kColumns = 1, kParts = 1, kBytes = kPanel;
  static constexpr const int* kOrder = kInOrder;
  static constexpr bool kLazy = false, kStreams = true;
  static constexpr float kOffset = 0;
  LLMKERNELS_INLINE Floats part(int64_t step, int, int vector) const {
    const T* codes = reinterpret_cast<const T*>(at(step * kBytes, vector, kLanes));
    return load_codes(codes) - load(offsets + vector * kLanes);
  }
};
#endif

// What turns the sums of a chunk into parts of the result.
struct Scaling {
  const float* scales;   // [64] channels
  const float* offsets;  // [64] channels; used where the source is lazy
  const float* factors;  // [rows]
  const float* sums;     // [rows] of a row's x over the chunk
};

// totals[Panels][Rows][64] += scaled products of `steps` loads; x[Rows] lie kChunk apart.
template <int Rows, int Panels, bool Lazy, class Source>
LLMKERNELS_INLINE void multiply_rows(const Source& source, const typename Source::Input* x, int64_t steps,
                                     const Scaling& scaling, float* totals) {
  // Registers that hold sums; the others hold the words of as many vectors, what it takes to decode them, and x.
  constexpr int kSums = kRegisters == 32 ? 24 : Source::kStreams ? 8 : 12;
  constexpr int kFit = kSums / Rows;
  constexpr int kMost = kRegisters == 32 && kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  constexpr int kAll = Panels * kVectors, kAtOnce = least(kAll, kMost);
  constexpr int64_t kStride = kChunk<typename Source::Input>;
  constexpr int kVectorBytes = Source::kBytes / kVectors;
  const int64_t ahead = most<int64_t>(kAhead, steps * Source::kBytes);  // each pass asks for its part of the next chunk
  for (int first = 0; first < kAll; first += kAtOnce) {
    typename Source::Sum sum[Rows][kAtOnce] = {};
    for (int64_t step = 0; step < steps; ++step) {
      if (Source::kStreams)
        for (int v = 0; v < kAtOnce; v += most(1, 64 / kVectorBytes))
          __builtin_prefetch(source.at(step * Source::kBytes + ahead, first + v, kVectorBytes));
#pragma GCC unroll 8
      for (int i = 0; i < Source::kParts; ++i) {
        const typename Source::Input* at = x + (step * Source::kParts + i) * Source::kColumns;
        if constexpr (Rows < kAtOnce) {  // x of all rows stays in registers while vectors of weights pass
#pragma GCC unroll 8
          for (int v = 0; v < kAtOnce; ++v) {
            const auto w = source.part(step, i, first + v);
#pragma GCC unroll 8
            for (int row = 0; row < Rows; ++row) sum[row][v] = product(sum[row][v], w, at + row * kStride);
          }
        } else {  // the weights of all vectors stay while rows of x pass
          decltype(source.part(0, 0, 0)) w[kAtOnce];
#pragma GCC unroll 8
          for (int v = 0; v < kAtOnce; ++v) w[v] = source.part(step, i, first + v);
#pragma GCC unroll 8
          for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
            for (int v = 0; v < kAtOnce; ++v) sum[row][v] = product(sum[row][v], w[v], at + row * kStride);
        }
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      const Floats factor = broadcast(scaling.factors[row]), minus = broadcast(Lazy ? -scaling.sums[row] : 0.0f);
#pragma GCC unroll 8
      for (int v = 0; v < kAtOnce; ++v) {
        const int vector = first + v;
        Floats value = floats(sum[row][v]);
        if constexpr (Lazy) value = fma(load(scaling.offsets + vector * kLanes), minus, value);
        float* total = totals + (vector / kVectors * Rows + row) * kPanel + vector % kVectors * kLanes;
        store(total, fma(value, load(scaling.scales + vector * kLanes) * factor, load(total)));
      }
    }
  }
}

// Rows that share what was decoded.  With 32 registers, 8 rows by two vectors beat 16 by one and 6 by four.
constexpr int kMany = kRegisters == 32 ? 8 : 6;

// All rows of one panel, in tiles of `Most` rows as long as there are as many, then of fewer.
template <int Most, bool Lazy, class Source>
LLMKERNELS_INLINE void multiply_most(const Source& source, const typename Source::Input* x, int rows, int64_t steps,
                                     Scaling scaling, float* totals) {
  if constexpr (Most > 0) {
    for (; rows >= Most; rows -= Most, x += Most * kChunk<typename Source::Input>, totals += Most * kPanel) {
      multiply_rows<Most, 1, Lazy>(source, x, steps, scaling, totals);
      scaling.factors += Most;
      scaling.sums += Most;
    }
    constexpr int kNext = Most > 6 ? 6 : Most > 4 ? 4 : Most - 1;
    multiply_most<kNext, Lazy>(source, x, rows, steps, scaling, totals);
  }
}

// The decoded form of a chunk: what part() gives, one after the other.
LLMKERNELS_INLINE PanelFloats panel_of(Floats, const uint8_t* panel) { return {{panel, nullptr, 0}}; }
LLMKERNELS_INLINE PanelPairs panel_of(Pairs, const uint8_t* panel) { return {{panel, nullptr, 0}}; }
LLMKERNELS_INLINE void store_part_at(uint8_t* panel, int64_t part, int vector, Floats w) {
  store(reinterpret_cast<float*>(panel) + part * kPanel + vector * kLanes, w);
}
LLMKERNELS_INLINE void store_part_at(uint8_t* panel, int64_t part, int vector, Pairs w) {
  std::memcpy(panel + (part * kPanel + vector * kLanes) * sizeof(Pairs) / kLanes, &w, sizeof(w));
}

template <class Source>
void decode(const Source& source, int64_t steps, uint8_t* panel) {
  for (int64_t step = 0; step < steps; ++step) {
    for (int line = 0; line < Source::kBytes; line += 64)
      __builtin_prefetch(source.values + step * Source::kBytes + kAhead + line);
#pragma GCC unroll 8
    for (int i = 0; i < Source::kParts; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        store_part_at(panel, step * Source::kParts + i, v, source.part(step, i, v));
  }
}

// totals[panels][rows][64] += one chunk's products.  Few rows multiply what is decoded in registers; for more it is decoded
// once, into `scratch`, 16 KiB.  The sums are the same, bit for bit.
template <class Source>
void multiply_chunk(const Source& source, const typename Source::Input* x, int panels, int rows, int64_t columns,
                    const Scaling& scaling, float* totals, uint8_t* scratch) {
  constexpr bool kLazy = Source::kLazy, kIntegers = __is_same(typename Source::Sum, Words);
  // Codes in place are so cheap that, of 16 registers, more vectors serve better.
  constexpr int kDecoding = kRegisters == 32 ? kMany : __is_same(Source, Int4Scaled) ? 2 : 4;
  constexpr int kFew = kRegisters == 32 ? 32 : 4;
  const int64_t steps = columns / (Source::kParts * Source::kColumns);
  if (panels == kAbreast && rows == 1) {
    multiply_rows<1, kAbreast, kLazy>(source, x, steps, scaling, totals);
  } else if (panels == kAbreast) {
    multiply_rows<2, kAbreast, kLazy>(source, x, steps, scaling, totals);
  } else if (kIntegers || rows <= kFew) {
    multiply_most<kDecoding, kLazy>(source, x, rows, steps, scaling, totals);
  } else if constexpr (!kIntegers) {
    decode(source, steps, scratch);
    const auto panel = panel_of(source.part(0, 0, 0), scratch);
    multiply_most<kMany, kLazy>(panel, x, rows, columns / Source::kColumns, scaling, totals);
  }
}

}  // namespace llmkernels::LLMKERNELS_ISA
