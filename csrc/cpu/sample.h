// Draws a token from each row of logits.  Nothing is sorted: the boundaries of top-k and top-p are found by three
// passes of a radix descent over the scores, as histograms of counts or of probability.
#pragma once
#include <math.h>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmkernels::LLMKERNELS_ISA {

// Scores are at most 0; the bits of their magnitudes rise as they fall.
LLMKERNELS_INLINE uint32_t key_of(float score) { return bit_cast<uint32_t>(score) & 0x7fffffff; }

// The least key such that all keys up to it reach `target`: in number, or in mass where it is given.  Only keys up to
// `limit` count; where they do not reach it, the largest of them.
inline uint32_t boundary(const float* scores, const float* mass, int64_t vocab, uint32_t limit, double target) {
  constexpr int kShifts[] = {31, 21, 10, 0};  // digits of 10, 11 and 10 bits
  uint32_t prefix = 0;
  double before = 0;
  for (int digit = 1; digit < 4; ++digit) {
    const int above = kShifts[digit - 1], shift = kShifts[digit];
    const uint32_t last = (1u << (above - shift)) - 1;
    double totals[2048] = {};
    for (int64_t i = 0; i < vocab; ++i) {
      const uint32_t key = key_of(scores[i]);
      if (key <= limit && key >> above == prefix) totals[key >> shift & last] += mass ? mass[i] : 1.0f;
    }
    uint32_t chosen = 0;
    for (uint32_t bucket = 0; bucket <= last; ++bucket) {
      if (totals[bucket] == 0) continue;
      chosen = bucket;
      if (before + totals[bucket] >= target) break;
      before += totals[bucket];
    }
    prefix = prefix << (above - shift) | chosen;
  }
  return prefix;
}

struct Draw {
  float uniform, temperature, top_p, min_p;
  int64_t top_k;
};

// The token, or -1 where a logit is NaN or infinite, or all forbid.  scores and mass: vocab floats of scratch each.
template <class T>
int64_t draw(const T* logits, int64_t vocab, const Draw& wish, float* scores, float* mass) {
  const Floats infinity = broadcast(INFINITY);
  Floats top = -infinity, worst = -infinity;
  int64_t whole = 0;
  for (; whole + kLanes <= vocab; whole += kLanes) {
    const Floats value = load(logits + whole);
    top = max(top, value);
    worst = max(worst, less(value, infinity, -infinity, infinity));  // NaN is not less
  }
  float best = largest(top);
  bool wrong = largest(worst) > 0;
  for (; whole < vocab; ++whole) {
    const float value = widen(logits[whole]);
    wrong |= !(value < INFINITY);
    best = most(best, value);
  }
  if (wrong || best == -INFINITY) return -1;
  if (wish.temperature == 0) {
    int64_t token = 0;
    while (token + 1 < vocab && widen(logits[token]) != best) ++token;
    return token;
  }
  const Floats highest = broadcast(best), temperature = broadcast(wish.temperature);
  each_vector(vocab, [&](int64_t i, auto n) {
    const Floats score = (load(logits + i, n) - highest) / temperature;
    store(scores + i, score, n);
    store(mass + i, exp(score), n);
  });
  uint32_t limit = key_of(-INFINITY);
  if (wish.top_k > 0 && wish.top_k < vocab) limit = boundary(scores, nullptr, vocab, limit, double(wish.top_k));
  if (wish.top_p < 1) {
    double kept = 0;
    for (int64_t i = 0; i < vocab; ++i) kept += key_of(scores[i]) <= limit ? mass[i] : 0.0f;
    limit = boundary(scores, mass, vocab, limit, double(wish.top_p) * kept);
  }
  double total = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    if (key_of(scores[i]) > limit || mass[i] < wish.min_p) mass[i] = 0;
    total += mass[i];
  }
  const double target = wish.uniform * total;
  double upto = 0;
  int64_t token = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    if (mass[i] == 0) continue;
    token = i;
    upto += mass[i];
    if (upto > target) break;
  }
  return token;
}

// All but logits, uniform and tokens may be null.
Status sample(int dtype, const void* logits, int64_t stride, const void* uniform, const void* temperature,
              const void* top_k, const void* top_p, const void* min_p, void* tokens, TokenCount rows, int64_t vocab,
              int threads) {
  const auto value = [](const void* values, int64_t row, float otherwise) {
    return values ? static_cast<const float*>(values)[row] : otherwise;
  };
  int worst = kOk;
  const Status status = with_float(dtype, [&](auto element) {
    using T = decltype(element);
    parallel_ranges(rows, 16 * vocab, threads, [&](int64_t begin, int64_t end) {
      float* memory = static_cast<float*>(scratch(kOwn, 2 * vocab * sizeof(float)));
      if (!memory) {
#pragma omp atomic write
        worst = kOutOfMemory;
        return;
      }
      for (int64_t row = begin; row < end; ++row) {
        const Draw wish{value(uniform, row, 0), value(temperature, row, 1), value(top_p, row, 1), value(min_p, row, 0),
                        top_k ? static_cast<const int32_t*>(top_k)[row] : 0};
        int64_t& token = static_cast<int64_t*>(tokens)[row];
        token = draw(static_cast<const T*>(logits) + row * stride, vocab, wish, memory, memory + vocab);
        if (token < 0) {
#pragma omp atomic write
          worst = kBadValue;
        }
      }
    });
    return kOk;
  });
  return status == kOk ? Status(worst) : status;
}

}  // namespace llmkernels::LLMKERNELS_ISA
