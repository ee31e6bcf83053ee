// Which kernels run on this machine, and the memory they work in.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/table.h"

namespace llmkernels {

#if defined(__x86_64__)
namespace avx512 {
extern const Table kernels;
}
namespace avx2 {
extern const Table kernels;
}
#endif
namespace portable {
extern const Table kernels;
}

namespace {

struct Candidate {
  const char* name;
  const Table* table;
  bool runs;
};

const Table& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                          __builtin_cpu_supports("avx512bf16");
  const Candidate candidates[] = {{"avx512", &avx512::kernels, has_avx512},
                                  {"avx2", &avx2::kernels, has_avx2},
                                  {"portable", &portable::kernels, true}};
#else
  const Candidate candidates[] = {{"portable", &portable::kernels, true}};
#endif
  const char* variable = std::getenv("LLMKERNELS_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string offered;
  for (const Candidate& candidate : candidates) {
    if (!candidate.runs) continue;
    if (wanted.empty() || wanted == candidate.name) return *candidate.table;
    offered += (offered.empty() ? "" : ", ") + std::string(candidate.name);
  }
  throw std::invalid_argument("LLMKERNELS_CPU_ISA is '" + wanted + "'; this processor runs " + offered);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

const Table& table() {
  static const Table& chosen = choose();
  return chosen;
}

bool pair_dot_pays() {
#if defined(__x86_64__)
  static const bool pays = __builtin_cpu_is("amd");
  return pays;
#else
  return false;
#endif
}

void* scratch(Scratch kind, int64_t bytes) {
  static thread_local std::pair<std::unique_ptr<void, Free>, int64_t> kept[2];
  auto& [memory, size] = kept[kind];
  if (bytes > size) {
    memory.reset();
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;  // a multiple of the alignment, and little left to chance
    memory.reset(std::aligned_alloc(64, rounded));
    size = memory ? rounded : 0;
  }
  return memory.get();
}

}  // namespace llmkernels
