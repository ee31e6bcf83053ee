// Work spread over threads by OpenMP: the runtime that torch uses, and as many threads as torch does.
#pragma once
#include <cstdint>

namespace llmkernels::LLMKERNELS_ISA {

template <class T>
constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T most(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements below which a second thread costs more than it brings: waking it takes some microseconds.
constexpr int64_t kGrain = 32768;

// body(begin, end) over equal parts of 0 .. count; `work` is what one of them costs, in elements.
template <class Body>
void parallel_ranges(int64_t count, int64_t work, int threads, Body body) {
  const int64_t parts = most<int64_t>(1, least<int64_t>(least<int64_t>(threads, count), count * work / kGrain));
  if (parts == 1) {
    body(int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) body(count * part / parts, count * (part + 1) / parts);
}

// body(task) for tasks of unequal length, each taken by the first thread that is free.
template <class Body>
void parallel_tasks(int64_t tasks, int threads, Body body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
#pragma omp parallel for num_threads(int(least<int64_t>(threads, tasks))) schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

}  // namespace llmkernels::LLMKERNELS_ISA
