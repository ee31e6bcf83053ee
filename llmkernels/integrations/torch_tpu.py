"""The ops for tensors of torch_tpu, PyTorch's own backend for TPUs: tensors of device 'tpu'.

    import torch_tpu
    from llmkernels.integrations import torch_tpu as ops

    x = torch.randn(4, 64, device="tpu")
    y = ops.rms_norm(x, torch.ones(64, device="tpu"))

Each kind of call becomes an operator of torch by torch.tpu.pallas.jax_op, which traces the jax program of the op,
Pallas kernels in it, for torch_tpu to compile and run: jax itself computes nothing.  Arguments, results and what is
written in place are those of the public functions.  What is written is donated, so that a cache is not copied.

torch_tpu holds the chip, and a second client would wait for it: jax is told to look at the CPU only, unless
JAX_PLATFORMS says otherwise.  Written against torch_tpu 0.2.0, whose jax_op calls itself experimental.
`make test-torch-tpu` runs every op through that version's runtime, XLA for the CPU in the place of libtpu; on a TPU it
never ran.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import count
from typing import Any

import jax
import torch
import torch_tpu  # noqa: F401  makes torch.tpu

from llmkernels.integrations.over_jax import functions

DEVICE_KINDS = {  # jax's names, by which the kernels choose their blocks, of what torch_tpu calls
    "TPU v4": "TPU v4",
    "TPU v5e": "TPU v5 lite",
    "TPU v5p": "TPU v5",
    "TPU v6e": "TPU v6 lite",
    "TPU v7": "TPU7x",
}
_numbers = count()

if not jax.config.jax_platforms:  # type: ignore[attr-defined]
    jax.config.update("jax_platforms", "cpu")


def _bridge(function: Callable, tensors: Sequence[torch.Tensor], written: Sequence[int]) -> Sequence[torch.Tensor]:
    homes = [x.untyped_storage().data_ptr() for x in tensors]
    donated = tuple(i for i in written if homes.count(homes[i]) == 1)
    kept = [x for i, x in enumerate(tensors) if i not in donated]
    return _operator(function, donated)([tensors[i] for i in donated], kept)


@cache
def _operator(function: Callable, donated: tuple[int, ...]) -> Callable:
    """The function as an operator of torch, (donated tensors, the others) -> results."""

    def call(given: Sequence[jax.Array], kept: Sequence[jax.Array]) -> list[jax.Array]:
        arrays = [*kept]
        for i, array in zip(donated, given, strict=True):  # ascending
            arrays.insert(i, array)
        with _chip():
            return [*function(*arrays)]

    name = f"llmkernels_torch_tpu::call{next(_numbers)}"
    return torch.tpu.pallas.jax_op(name, call, donate_argnums=(0,))  # type: ignore[attr-defined]


def _is_tpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "tpu"


def _chip() -> AbstractContextManager:
    """What is traced inside is for the chip at hand, and fits every chip where that is none of the five."""
    kind = DEVICE_KINDS.get(torch.tpu.get_device_name(), "TPU")  # type: ignore[attr-defined]
    return jax.default_device(jax.sharding.AbstractDevice(kind, 1, "tpu"))


globals().update(functions(_bridge, _is_tpu, "tensors on device 'tpu'"))
