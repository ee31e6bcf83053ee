"""The ops for torchax tensors: torch tensors that are jax arrays, on a TPU, a GPU or the CPU.

    import torchax
    from llmkernels.integrations import torchax as ops

    with torchax.default_env():
        x = torch.randn(4, 64, device="jax")
        y = ops.rms_norm(x, torch.ones(64, device="jax"))

Arguments, results and what is written in place are those of the public functions, inside torchax's jit as well.  Only:
int32 passes where the contract says int64, and comes back, because torchax has no int64 unless jax_enable_x64 is set.
Tested with torchax 0.0.14.dev20261026 on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchax
from torchax import interop

from llmkernels.integrations.over_jax import functions


def _bridge(function: Callable, tensors: Sequence[torch.Tensor], written: Sequence[int]) -> Sequence[torch.Tensor]:
    return interop.call_jax(function, *tensors)


def _is_torchax(value: Any) -> bool:
    return isinstance(value, (torchax.tensor.Tensor, torchax.tensor.View))


globals().update(functions(_bridge, _is_torchax, "torchax tensors, made with device='jax'", torchax.default_env))
