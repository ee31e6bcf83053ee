"""The one form in which quantized weights travel: loaders make it of any checkpoint format, backends pack it anew."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llmkernels.arrays import family
from llmkernels.contract import FLOATS
from llmkernels.quant.scheme import BLOCK, Scheme, scheme
from llmkernels.shapes import dtype_name

PARTS = ("values", "scales", "zeros", "permutation", "input_scale")
_VALUES = {"int4": "uint8", "int8": "int8", "fp8": "float8_e4m3fn", "mxfp4": "uint8"}
_SCALES = {"int4": FLOATS, "int8": FLOATS, "fp8": ("float32",), "mxfp4": ("uint8",)}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [out, in], quantized.

        w[n, j] = scales[n, g(j)] * (q[n, j] - zeros[n, g(j)])

    for stored column j of group g(j).  Stored column j belongs to feature permutation[j] of x.  A last group may be
    short.  Parts are arrays of one library on one device; what is written into them after the first use may go
    unnoticed.

    Args:
        values: int4: uint8[out, ceil(in/2)], even column in the low nibble, 0 to 15.  mxfp4: the same, e2m1 codes.
            int8: int8[out, in].  fp8: float8_e4m3fn[out, in].
        scales: int4, int8: float32, bfloat16 or float16 [out, groups], one group where a scale serves a row.
            fp8: float32, [1, 1] (tensor), [out, 1] (row) or [ceil(out/128), ceil(in/128)] (block).
            mxfp4: uint8[out, ceil(in/32)], exponents e of 2 ** (e - 127).
        zeros: int4: uint8[out, groups], 0 to 15.  int8: int8[out, groups].  None where the scheme is symmetric, and
            then 8 (int4) or 0 (int8).
        permutation: int32[in], of schemes with act-order; None of others.
        scheme: a Scheme or its name.
        input_scale: float32[1], of schemes with a calibrated scale of the activations; None of others.
        in_features: the columns of the dense weight; None is as many as `values` holds, which for packed ones is even.

    Raises:
        ValueError: a part that does not fit the scheme, by name.  Values of parts are read by `check_values` only.
    """

    values: Any
    scales: Any
    zeros: Any
    permutation: Any
    scheme: Scheme
    input_scale: Any = None
    in_features: int | None = None
    packed: dict[str, Any] = field(
        default_factory=dict, init=False, repr=False
    )  # backend -> its own form of this weight

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", scheme(self.scheme))
        if self.in_features is None and len(getattr(self.values, "shape", ())) == 2:
            object.__setattr__(self, "in_features", self.values.shape[1] * (2 if self.scheme.packed else 1))
        self._check_parts()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense weight."""
        return self.values.shape[0], self.in_features  # type: ignore[return-value]

    @property
    def groups(self) -> int:
        """How many scales a row has; for block scales, how many blocks lie side by side."""
        group = self.scheme.group
        return -(-self.shape[1] // group) if group else 1

    @property
    def dtype(self) -> Any:
        """The dtype of the stored values."""
        return self.values.dtype

    @property
    def device(self) -> Any:
        return getattr(self.values, "device", "cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self._parts().values())

    @cached_property
    def signature(self) -> str:
        """Everything that the choice of a kernel may depend on, in a string: scheme, shape and layout of each part."""
        parts = self._parts()
        text = [f"{name} {dtype_name(part)}{tuple(part.shape)}{_strides(part)}" for name, part in parts.items()]
        return sys.intern(f"{self.scheme} {self.shape} on {self.device}: {', '.join(text)}")

    def map(self, change: Callable[[Any], Any]) -> "QuantizedWeight":
        """The same weight with every part that is there replaced by change(part), and nothing packed yet."""
        return replace(self, **{name: change(part) for name, part in self._parts().items()})

    def to(self, device: Any) -> "QuantizedWeight":
        """The same weight on another device (torch); itself where it is there already."""
        moved = {name: part.to(device) for name, part in self._parts().items()}
        return self if all(moved[name] is part for name, part in self._parts().items()) else replace(self, **moved)

    @classmethod
    def concatenate(cls, weights: Sequence["QuantizedWeight"]) -> "QuantizedWeight":
        """One weight whose rows are those of all `weights`, in order (torch): q, k and v, or gate and up.

        Products with it are those with each, exactly.  fp8_tensor becomes fp8_row, because scales may differ.

        Raises:
            ValueError: weights that no one scheme can hold together.
        """
        return _concatenate(weights)

    def dequantize(self, dtype: Any = None) -> Any:
        """The dense weight [out, in], columns in the order of x's features.

        Computed in float32, rounded once to it and once more to a smaller dtype; in float64, exactly, where dtype is
        float64.
        """
        import torch

        from llmkernels.quant import codes

        dtype = dtype or torch.float32
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        columns = self.shape[1]
        if self.scheme.weight == "mxfp4":
            q = codes.e2m1_values(codes.unpack(self.values, columns), wide)
            scales = codes.e8m0_values(self.scales, wide)
        else:
            q = (codes.unpack(self.values, columns) if self.scheme.packed else self.values).to(wide)
            scales = self.scales.to(wide)
        if self.scheme.weight == "int4" and self.zeros is None:
            q = q - 8
        elif self.zeros is not None:
            q = q - self._spread(self.zeros.to(wide))
        w = (q * self._spread(scales)).to(dtype)
        if self.permutation is None:
            return w
        dense = torch.empty_like(w)
        dense[:, self.permutation.long()] = w
        return dense

    def check_values(self) -> None:
        """Read the small parts once: ValueError for scales, zero points or a permutation that cannot be meant."""
        if "checked" not in self.__dict__:
            _check_scales(self)
            _check_zeros(self)
            _check_permutation(self)
            self.__dict__["checked"] = True

    def _spread(self, per_group: Any) -> Any:
        """[rows or blocks, groups] -> one number for each stored value, as far as broadcasting does not do it."""
        rows, columns = self.shape
        if self.scheme.granularity == "block":
            per_group = per_group.repeat_interleave(BLOCK, 0)[:rows]
        if self.scheme.group:
            per_group = per_group.repeat_interleave(self.scheme.group, 1)[:, :columns]
        return per_group

    def _parts(self) -> dict[str, Any]:
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    def _check_parts(self) -> None:
        family("QuantizedWeight", self._parts())
        kind = self.scheme.weight
        _check_part(self, "values", self.values, ("out", "columns"), (_VALUES[kind],))
        rows, columns = self.shape
        if isinstance(columns, bool) or not hasattr(columns, "__index__"):
            raise ValueError(f"QuantizedWeight: in_features is {columns!r:.80}; give the columns of the dense weight")
        stored = -(-columns // 2) if self.scheme.packed else columns
        if self.values.shape[1] != stored:
            raise ValueError(
                f"QuantizedWeight: in_features is {columns}, but values has shape {tuple(self.values.shape)}; "
                f"{kind} stores {columns} columns in {stored}"
            )
        shape = {
            "tensor": (1, 1),
            "block": (-(-rows // BLOCK), self.groups),
        }.get(self.scheme.granularity, (rows, self.groups))
        _check_part(self, "scales", self.scales, shape, _SCALES[kind])
        _check_part(self, "zeros", self.zeros, None if self.scheme.symmetric else shape, (_VALUES[kind],))
        _check_part(self, "permutation", self.permutation, (columns,) if self.scheme.act_order else None, ("int32",))
        _check_part(self, "input_scale", self.input_scale, None if self.scheme.dynamic else (1,), ("float32",))


def _concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    import torch

    where = "QuantizedWeight.concatenate:"
    if not weights:
        raise ValueError(f"{where} weights is empty; pass at least one")
    first = weights[0]
    for at, other in enumerate(weights):
        if (other.scheme, other.shape[1]) != (first.scheme, first.shape[1]):
            raise ValueError(
                f"{where} weights[{at}] is {other.scheme} with {other.shape[1]} columns, weights[0] {first.scheme} "
                f"with {first.shape[1]}; only weights of one scheme and input become one: keep them apart"
            )
        for name in ("permutation", "input_scale"):
            mine, part = getattr(first, name), getattr(other, name)
            if part is not None and not torch.equal(part, mine):
                raise ValueError(
                    f"{where} {name} of weights[{at}] is not that of weights[0], and one weight has one; keep them "
                    "apart"
                )
    if first.scheme.granularity == "block" and any(weight.shape[0] % BLOCK for weight in weights[:-1]):
        raise ValueError(
            f"{where} the weights have {', '.join(str(weight.shape[0]) for weight in weights)} rows; a block of "
            f"{BLOCK} rows with one scale would reach over two of them: keep them apart"
        )
    to = first.scheme
    parts: dict[str, Any] = {
        name: [getattr(weight, name) for weight in weights] for name in ("values", "scales", "zeros")
    }
    if to.granularity == "tensor":
        to = replace(to, granularity="row")
        parts["scales"] = [weight.scales.expand(weight.shape[0], 1) for weight in weights]
    joined: dict[str, Any] = {name: None if p[0] is None else torch.cat(p) for name, p in parts.items()}
    return replace(first, scheme=to, **joined)


def _check_part(weight: QuantizedWeight, name: str, part: Any, shape: tuple | None, dtypes: tuple[str, ...]) -> None:
    """`shape` None: the part must be None.  A name in it stands for any size."""
    where = f"QuantizedWeight: {name}"
    if shape is None or part is None:
        if part is not None:
            raise ValueError(
                f"{where} is given, but the scheme {weight.scheme} has none; leave it out or name another scheme"
            )
        if shape is not None:
            raise ValueError(
                f"{where} is missing; the scheme {weight.scheme} needs it: {' or '.join(dtypes)} {_text(shape)}"
            )
        return
    if not hasattr(part, "shape") or not hasattr(part, "dtype"):
        raise ValueError(f"{where} is {part!r:.80}, of type {type(part).__name__}; pass an array")
    if dtype_name(part) not in dtypes:
        raise ValueError(f"{where} is {dtype_name(part)}; the scheme {weight.scheme} wants {' or '.join(dtypes)}")
    have = tuple(part.shape)
    if len(have) != len(shape) or any(
        isinstance(want, int) and want != size for want, size in zip(shape, have, strict=True)
    ):
        of = "" if name == "values" else f" of {weight.shape[0]} x {weight.shape[1]}"
        raise ValueError(f"{where} has shape {have}; the scheme {weight.scheme}{of} wants {_text(shape)}")


def _text(shape: tuple) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _strides(part: Any) -> str:
    stride = getattr(part, "stride", None)
    return str(tuple(stride()) if callable(stride) else getattr(part, "strides", ""))


def _check_scales(weight: QuantizedWeight) -> None:
    from llmkernels.arrays import to_torch
    from llmkernels.quant.codes import E8M0_NAN

    scales = to_torch(weight.scales)
    bad = scales == E8M0_NAN if weight.scheme.weight == "mxfp4" else ~scales.isfinite()
    if bool(bad.any()):
        at = [int(i) for i in bad.nonzero()[0]]
        raise ValueError(
            f"QuantizedWeight: scales{at} is {_value(scales, at)}; scales are finite numbers: quantize the weight again"
        )
    if weight.input_scale is not None and not 0 < (value := float(weight.input_scale[0])) < float("inf"):
        raise ValueError(f"QuantizedWeight: input_scale is {value}; it is a finite number above 0: calibrate again")


def _value(scales: Any, at: list[int]) -> str:
    value = scales[tuple(at)].item()
    return f"{value}, an e8m0 NaN" if isinstance(value, int) else str(value)


def _check_zeros(weight: QuantizedWeight) -> None:
    from llmkernels.arrays import to_torch

    if weight.zeros is not None and weight.scheme.weight == "int4":
        zeros = to_torch(weight.zeros)
        if bool((zeros > 15).any()):
            at = [int(i) for i in (zeros > 15).nonzero()[0]]
            raise ValueError(
                f"QuantizedWeight: zeros{at} is {int(zeros[tuple(at)])}; 4-bit zero points are 0 to 15: unpack them"
            )


def _check_permutation(weight: QuantizedWeight) -> None:
    from llmkernels.arrays import to_torch

    if weight.permutation is None:
        return
    columns, order = weight.shape[1], to_torch(weight.permutation).long()
    outside = (order < 0) | (order >= columns)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"QuantizedWeight: permutation[{at}] is {int(order[at])}; features of x are 0 to {columns - 1}"
        )
    if bool((counts := order.bincount(minlength=columns)).ne(1).any()):
        feature = int(counts.argmin())
        raise ValueError(
            f"QuantizedWeight: permutation leaves out feature {feature} of x; it must name each of {columns} once"
        )
