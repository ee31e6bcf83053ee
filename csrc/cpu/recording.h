// Calls of kernels kept in order, with their arguments, and made again without Python between them.
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "cpu/table.h"

namespace llmkernels {

// While a recording is open on a thread, every call that this thread makes is added to it.  The caller keeps alive what
// the arguments point to, and may change its values, for as long as it replays.
class Recording {
 public:
  struct Call {
    const char* kernel;
    std::function<Status()> run;
  };

  // The open recording of this thread, null where there is none.
  static Recording*& open() {
    static thread_local Recording* recording = nullptr;
    return recording;
  }

  void add(const char* kernel, std::function<Status()> run) { calls_.push_back({kernel, std::move(run)}); }
  size_t size() const { return calls_.size(); }

  // Makes every call again, in order, up to the first one that fails; it and its Status, or null and kOk.
  std::pair<const char*, Status> replay() const {
    for (const Call& call : calls_)
      if (const Status status = call.run(); status != kOk) return {call.kernel, status};
    return {nullptr, kOk};
  }

 private:
  std::vector<Call> calls_;
};

}  // namespace llmkernels
