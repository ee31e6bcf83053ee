// The Python module _native: each kernel of the table as a function of numbers; addresses are integers, 0 is none.
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "cpu/recording.h"
#include "cpu/table.h"

namespace py = pybind11;
namespace llmkernels {
namespace {

// What Python passes for a parameter of a kernel, and back.
template <class T>
using Passed = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, std::conditional_t<std::is_enum_v<T>, int64_t, T>>;

template <class T>
T native(Passed<T> value, const Sizes& before, const Sizes& now) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else if constexpr (std::is_same_v<T, TokenCount>) {
    return T(value / before.tokens * now.tokens);
  } else if constexpr (std::is_same_v<T, SequenceCount>) {
    return T(value / before.sequences * now.sequences);
  } else {
    return value;
  }
}

// Whether a size of a call is a multiple of what the recording counts.
template <class T>
bool proportional(Passed<T> value, const Sizes& sizes) {
  if constexpr (std::is_same_v<T, TokenCount>) return value % sizes.tokens == 0;
  if constexpr (std::is_same_v<T, SequenceCount>) return value % sizes.sequences == 0;
  return true;
}

void raise(const char* name, Status status) {
  switch (status) {
    case kOk:
      return;
    case kOutOfMemory:
      PyErr_NoMemory();
      throw py::error_already_set();
    case kBadDType:
      throw std::runtime_error(std::string(name) + ": the kernel was given a dtype it does not know");
    case kBadValue:
      throw py::value_error(std::string(name) +
                            ": a row holds NaN or +inf, or no finite number; use(checked=True) tells which one");
    case kBadIndex:
      throw py::index_error(std::string(name) + ": an index points outside its array; see it with use(checked=True)");
  }
}

// One function of the module.  Python's lock is released while the kernel runs.
template <class... Parameters>
void kernel(py::module_& module, const char* name, Status (*Table::*entry)(Parameters...)) {
  module.def(name, [name, entry](Passed<Parameters>... arguments) {
    const auto run = [=](const Sizes& before, const Sizes& now) {
      return (table().*entry)(native<Parameters>(arguments, before, now)...);
    };
    Status status;
    {
      py::gil_scoped_release unlocked;
      status = run({}, {});
    }
    raise(name, status);
    if (Recording* recording = Recording::open()) {
      if (!(proportional<Parameters>(arguments, recording->sizes()) && ...))
        throw std::runtime_error(std::string(name) + ": its rows are no multiple of the recording's tokens or sequences");
      recording->add({name, run});
    }
  });
}

void recordings(py::module_& module) {
  py::class_<Recording>(module, "Recording",
                        "with Recording(tokens, sequences) as recording: the kernels called inside, by this thread, run "
                        "and are kept; recording.replay(tokens, sequences) makes the same calls again, on the same "
                        "addresses, with as many rows as these numbers ask for.")
      .def(py::init([](int64_t tokens, int64_t sequences) {
             if (tokens < 1 || sequences < 1) throw py::value_error("a recording needs at least one token and one sequence");
             return Recording({tokens, sequences});
           }),
           py::arg("tokens") = 1, py::arg("sequences") = 1)
      .def("__enter__",
           [](py::object self) {
             if (Recording::open()) throw std::runtime_error("a recording is open on this thread already; close it first");
             Recording::open() = &self.cast<Recording&>();
             return self;
           })
      .def("__exit__", [](Recording&, py::args) { Recording::open() = nullptr; })
      .def("__len__", &Recording::count)
      .def(
          "replay",
          [](const Recording& recording, int64_t tokens, int64_t sequences) {
            if (tokens < 0 || sequences < 0) throw py::value_error("a replay has no less than 0 tokens and sequences");
            std::pair<const char*, Status> failed;
            {
              py::gil_scoped_release unlocked;
              failed = recording.replay({tokens, sequences});
            }
            raise(failed.first, failed.second);
          },
          py::arg("tokens") = 1, py::arg("sequences") = 1);
}

}  // namespace
}  // namespace llmkernels

PYBIND11_MODULE(_native, module) {
  using namespace llmkernels;
  module.def("isa", [] { return table().name; }, "The instruction set whose kernels answer on this machine.");
  py::dict dtypes;
  dtypes["float32"] = int(kFloat32);
  dtypes["bfloat16"] = int(kBFloat16);
  dtypes["float16"] = int(kFloat16);
  dtypes["int8"] = int(kInt8);
  dtypes["float8_e4m3fn"] = int(kFloat8E4M3);
  dtypes["float8_e5m2"] = int(kFloat8E5M2);
  module.attr("DTYPES") = dtypes;
  using namespace py::literals;
  module.attr("STORAGE") = py::dict("dense"_a = int(kDense), "int4"_a = int(kInt4Panels), "fp4"_a = int(kFp4Panels),
                                    "int8"_a = int(kInt8Panels), "float8"_a = int(kFloat8Panels),
                                    "int4_products"_a = int(kInt4Products), "int8_products"_a = int(kInt8Products));
  module.attr("ROUNDING") = py::dict("none"_a = int(kNoRounding), "int8"_a = int(kToInt8), "fp8"_a = int(kToFloat8));
  module.attr("NORM") = py::dict("none"_a = int(kNoNorm), "rms"_a = int(kRmsNorm), "layer"_a = int(kLayerNorm));
  module.attr("ACTIVATION") =
      py::dict("none"_a = int(kNoActivation), "silu"_a = int(kSilu), "gelu"_a = int(kGelu), "gelu_tanh"_a = int(kGeluTanh),
               "relu"_a = int(kRelu), "swiglu"_a = int(kSwiglu), "geglu"_a = int(kGeglu));
  recordings(module);
  kernel(module, "gemm", &Table::gemm);
  kernel(module, "lora_gemm", &Table::lora_gemm);
  kernel(module, "paged_attention", &Table::paged_attention);
  kernel(module, "rms_norm", &Table::rms_norm);
  kernel(module, "merge_attention", &Table::merge_attention);
  kernel(module, "quantize_activation", &Table::quantize_activation);
  kernel(module, "rotary_embedding", &Table::rotary_embedding);
  kernel(module, "sample", &Table::sample);
  kernel(module, "silu_and_mul", &Table::silu_and_mul);
  kernel(module, "write_kv", &Table::write_kv);
}
