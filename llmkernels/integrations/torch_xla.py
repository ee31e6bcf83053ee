"""The ops for tensors of torch-xla 2.9, its last release: lazy tensors of an XLA device.

    import torch_xla
    from llmkernels.integrations import torch_xla as ops

    x = torch.randn(4, 64, device="xla")
    y = ops.rms_norm(x, torch.ones(64, device="xla"))
    torch_xla.sync()

Each call becomes part of the lazy graph: torch-xla traces the jax program of the op and puts its HLO there.  Arguments,
results and what is written in place are those of the public functions.  It needs torch 2.9 and jax 0.7.1, so it lives
in an environment of its own: `make test-torch-xla` makes that and runs the parity test, on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch_xla.core.xla_builder import call_jax

from llmkernels.integrations.over_jax import functions


def _bridge(function: Callable, tensors: Sequence[torch.Tensor], written: Sequence[int]) -> Sequence[torch.Tensor]:
    return call_jax(function, tuple(tensors))


def _is_xla(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "xla"


globals().update(functions(_bridge, _is_xla, "tensors on device 'xla'"))
