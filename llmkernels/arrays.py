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
        if kind := _unreadable(value):
            raise ValueError(f"{op}: {name} is {kind}")
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


def _unreadable(value: Any) -> str | None:
    """What an array is whose elements do not lie at its strides, or are not what lies there, and what to do."""
    torch = sys.modules.get("torch")
    if _is_numpy(value):
        if hasattr(value, "mask"):
            return "a masked array, and the mask would be lost; pass filled() of it"
        if any(stride < 0 or stride % value.itemsize for stride in value.strides):
            return f"an array of strides {value.strides}, in bytes; pass numpy.ascontiguousarray of it"
        return None
    if not torch or not isinstance(value, torch.Tensor):
        return None
    if value.is_nested:
        return "a nested tensor; pass its values in one tensor, with the lengths where the contract asks for them"
    if value.layout is not torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.')}; pass a dense one: to_dense() makes it"
    if value.is_neg():
        return "a view that negates what lies in memory; pass resolve_neg() of it"
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return "inside a transform of torch.func (vmap, grad); kernels only infer, whole batches: call it outside"
    return None


def refuse_gradients(op: str, call: Mapping[str, Any]) -> None:
    """ValueError where torch would have to differentiate the call."""
    names = [name for name, value in call.items() if getattr(value, "requires_grad", False)]
    if names and sys.modules["torch"].is_grad_enabled():
        raise ValueError(f"{op}: {names[0]} requires a gradient; kernels only infer: use torch.no_grad()")


def refuse_unwritable(op: str, written: Mapping[str, Any]) -> None:
    """ValueError where a call writes in place what is read-only to NumPy (torch would crash in a mapped file), or
    one element for several."""
    for name, array in written.items():
        if _is_numpy(array) and not array.flags.writeable:
            raise ValueError(f"{op}: {name} is read-only, and the call writes it; pass a copy")
        strides = array.strides if _is_numpy(array) else array.stride()
        if any(size > 1 and not stride for size, stride in zip(array.shape, strides, strict=True)):
            raise ValueError(f"{op}: {name} is expanded, one element for several, and the call writes it; pass a copy")


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return bool(numpy) and isinstance(value, numpy.ndarray)  # type: ignore[union-attr]


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
    if _is_numpy(value):
        if value.dtype.type.__module__ == "ml_dtypes":  # bfloat16 and FP8
            return torch.from_numpy(value.view(f"uint{8 * value.itemsize}")).view(getattr(torch, value.dtype.name))
        return torch.from_numpy(value)
    if not hasattr(value, "__dlpack_device__"):
        raise ValueError(f"{value} holds no values yet: inside jax.jit call the ops of llmkernels.jax_api")
    return torch.from_dlpack(value)


def from_torch(value: Any, family: str) -> Any:
    if value is None:
        return None
    if family == "numpy":
        import torch

        name = str(value.dtype).removeprefix("torch.")
        if name != "bfloat16" and not name.startswith("float8"):
            return value.numpy()
        try:
            import ml_dtypes
        except ModuleNotFoundError:
            raise ValueError(f"NumPy alone has no {name}, in which the answer is: pip install ml_dtypes") from None
        return value.view(getattr(torch, f"uint{8 * value.itemsize}")).numpy().view(getattr(ml_dtypes, name))
    import jax

    return jax.dlpack.from_dlpack(value.contiguous())
