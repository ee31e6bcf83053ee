"""Whose array is it, and how the reference, written in torch, answers for all of them."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

FAMILIES = {"torch": "torch", "jax": "jax", "jaxlib": "jax", "numpy": "numpy"}


def is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def family(op: str, call: Mapping[str, Any]) -> str:
    """'torch', 'jax' or 'numpy'; ValueError where a call mixes them or its arrays lie on two devices."""
    owners: dict[str, str] = {}
    places: dict[str, str] = {}
    for name, value in call.items():
        if is_array(value):
            array = value.values if hasattr(value, "scheme") else value
            owners.setdefault(FAMILIES.get(type(array).__module__.partition(".")[0], _torch_or_unknown(array)), name)
            if hasattr(array, "device"):  # what jax.jit traces has none
                places.setdefault(str(array.device), name)
    if len(owners) > 1:
        raise ValueError(
            f"{op}: {' but '.join(f'{n} is a {o} array' for o, n in owners.items())}; pass arrays of one library"
        )
    if len(places) > 1:
        raise ValueError(f"{op}: {' but '.join(f'{n} is on {p}' for p, n in places.items())}; put them on one device")
    return next(iter(owners), "torch")


def refuse_gradients(op: str, call: Mapping[str, Any]) -> None:
    """ValueError where torch would have to differentiate the call."""
    names = [name for name, value in call.items() if getattr(value, "requires_grad", False)]
    if names and sys.modules["torch"].is_grad_enabled():
        raise ValueError(f"{op}: {names[0]} requires a gradient; kernels only infer: use torch.no_grad()")


def _torch_or_unknown(array: Any) -> str:
    torch = sys.modules.get("torch")
    if torch and isinstance(array, torch.Tensor):  # a subclass that another library defines
        return "torch"
    return type(array).__module__


def through_torch(reference: Callable, family: str) -> Callable:
    """`reference`, which takes torch tensors, as a function on arrays of `family`, through DLPack on the CPU."""
    if family == "torch":
        return reference

    def run(*args: Any, **options: Any) -> Any:
        results = reference(*map(to_torch, args), **{name: to_torch(value) for name, value in options.items()})
        if isinstance(results, tuple):
            return tuple(from_torch(r, family) for r in results)
        return from_torch(results, family)

    return run


def to_torch(value: Any) -> Any:
    import torch

    if not is_array(value) or isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "scheme"):
        return value.map(to_torch)
    if type(value).__module__.startswith("numpy"):
        return torch.from_numpy(value)
    if not hasattr(value, "__dlpack_device__"):
        raise ValueError(f"{value} holds no values yet: inside jax.jit call the ops of llmkernels.jax_api")
    return torch.from_dlpack(value)


def from_torch(value: Any, family: str) -> Any:
    if value is None:
        return None
    if family == "numpy":
        return value.numpy()
    import jax

    return jax.dlpack.from_dlpack(value.contiguous())
