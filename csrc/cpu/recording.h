// Calls of kernels kept in order, with their arguments, and made again without Python between them.
//
// A recording of some tokens and sequences can be replayed for other numbers of them: strides and addresses stay, and what
// the table calls a TokenCount or a SequenceCount changes in proportion.
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "cpu/table.h"

namespace llmkernels {

struct Sizes {
  int64_t tokens = 1, sequences = 1;
};

// While a recording is open on a thread, every call that this thread makes is added to it.  The caller keeps alive what
// the arguments point to, and may change its values, for as long as it replays.
class Recording {
 public:
  struct Call {
    const char* kernel;
    std::function<Status(const Sizes& before, const Sizes& now)> run;
  };

  explicit Recording(Sizes sizes) : sizes_(sizes) {}

  // The open recording of this thread, null where there is none.
  static Recording*& open() {
    static thread_local Recording* recording = nullptr;
    return recording;
  }

  const Sizes& sizes() const { return sizes_; }
  void add(Call call) { calls_.push_back(std::move(call)); }
  size_t count() const { return calls_.size(); }

  // Makes every call again, in order, up to the first one that fails; it and its Status, or null and kOk.
  std::pair<const char*, Status> replay(const Sizes& now) const {
    for (const Call& call : calls_)
      if (const Status status = call.run(sizes_, now); status != kOk) return {call.kernel, status};
    return {nullptr, kOk};
  }

 private:
  Sizes sizes_;
  std::vector<Call> calls_;
};

}  // namespace llmkernels
