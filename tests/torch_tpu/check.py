"""Run by `make test-torch-tpu`, in an environment of its own: the ops for torch_tpu tensors, with no TPU.

torch_tpu loads what TPU_LIBRARY_PATH names in the place of libtpu; here that is XLA's plugin for CPUs.  Tensors,
operators, donation and copies are then torch_tpu's own.  A CPU runs no Pallas kernel, so that the programs are those of
jax.numpy, and last of all a program with a kernel has to fail by its name.
"""

import os
import sys
import time
from pathlib import Path

from xla_plugins import xla_cpu_pjrt

os.environ["TPU_LIBRARY_PATH"] = str(Path(xla_cpu_pjrt.__file__).with_name("xla_cpu_pjrt.so"))
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch_tpu._loader
from adapter_parity import tally
from llmkernels.backends.xla import _program

import llmkernels
from llmkernels.integrations import torch_tpu as ops
from llmkernels.registry import OPS

torch_tpu._loader._init_device("tpu")  # it does so itself where it finds a TPU among the PCI devices


def there(x):
    return x.to("tpu")


def back(x):
    return x.cpu()


def main():
    begin = time.perf_counter()
    kernel, _program.kernel = _program.kernel, lambda op: None
    passed, failed = tally(ops, there, back)
    for check in (views_are_written, a_written_cache_keeps_its_memory, wrong_tensors):
        check()
        passed += 1
    _program.kernel = kernel
    a_kernel_is_in_the_program()
    seconds = time.perf_counter() - begin
    versions = f"torch {torch.__version__}, torch_tpu on XLA's CPU plugin"
    print(f"{versions}: {passed + 1} passed, {failed} failed of {len(OPS)} ops in {seconds:.0f} s")
    return int(failed > 0)


def written(view):
    """The cache [2 3 4 1 8] of whose part `view` a token of ones is written to slot 5."""
    cache = there(torch.zeros(2, 3, 4, 1, 8))
    ops.write_kv(there(torch.ones(1, 1, 8)), None, view(cache), None, there(torch.tensor([5])))
    return back(cache)


def views_are_written():
    assert float(written(lambda cache: cache[1]).sum()) == float(written(lambda cache: cache[1])[1, 1, 1].sum()) == 8
    # Keys and values in one allocation, which is written twice.
    both, new = there(torch.zeros(3, 4, 1, 16)), there(torch.ones(1, 1, 8))
    ops.write_kv(new, 2 * new, both[..., :8], both[..., 8:], there(torch.tensor([5])))
    assert back(both)[1, 1, 0].tolist() == [1.0] * 8 + [2.0] * 8
    assert float(back(both).sum()) == 24
    heads_first = there(torch.zeros(3, 2, 4, 8))
    ops.write_kv(there(torch.ones(1, 2, 8)), None, heads_first.permute(0, 2, 1, 3), None, there(torch.tensor([5])))
    assert float(back(heads_first)[1, :, 1].sum()) == float(back(heads_first).sum()) == 16


def a_written_cache_keeps_its_memory():
    cache, new, slots = there(torch.zeros(64, 16, 2, 64)), there(torch.ones(1, 2, 64)), there(torch.tensor([5]))
    ops.write_kv(new, None, cache, None, slots)
    back(cache)
    place = cache.data_ptr()
    for _ in range(3):
        ops.write_kv(new, None, cache, None, slots)
        assert float(back(cache).sum()) == 128
        assert cache.data_ptr() == place


def wrong_tensors():
    x = torch.ones(3, 8)
    told = error_of(ValueError, lambda: ops.rms_norm(x, x[0]))
    assert "an argument is of type Tensor; pass tensors on device 'tpu'" in told, told
    told = error_of(llmkernels.Unsupported, lambda: llmkernels.rms_norm(there(x), there(x[0]), backend="xla"))
    assert "x is on tpu:0; computes on cpu" in told, told


def a_kernel_is_in_the_program():
    cache, new = (there(torch.zeros(*shape, 2, 128, dtype=torch.bfloat16)) for shape in ((8, 16), (1,)))
    slots = there(torch.tensor([5]))
    told = error_of(RuntimeError, lambda: (ops.write_kv(new, None, cache, None, slots), back(cache)))
    assert "tpu_custom_call" in told, told


def error_of(kind, call):
    """What the error of this kind says that the call has to raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


if __name__ == "__main__":
    sys.exit(main())
