"""RMSNorm for vLLM, as a provider of its IR ops; see vllm.py beside this file."""

from torch import Tensor
from vllm import ir

import llmkernels
from llmkernels.integrations.vllm import PROVIDER


def takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return llmkernels.rms_norm(x, weight, eps=epsilon)


def takes_residual(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return variance_size is None and weight is not None and x.dtype == x_residual.dtype == weight.dtype


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    return llmkernels.rms_norm(x, weight, residual=x_residual, eps=epsilon)


def register() -> None:
    """Offer both; vLLM takes a provider's name once only."""
    for op, offered, run in (
        (ir.ops.rms_norm, takes, rms_norm),
        (ir.ops.fused_add_rms_norm, takes_residual, fused_add_rms_norm),
    ):
        if PROVIDER not in op.impls:
            op.register_impl(PROVIDER, supports_args=offered)(run)
