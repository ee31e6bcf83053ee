"""What a quantization scheme is, and its name.

w4a16_g128            4-bit weights, a scale for 128 columns of a row (32, 64, 128; without _g: for the whole row)
w4a16_g128_zp         the same with zero points
w4a16_g128_actorder   the same with columns stored in GPTQ's act-order
w8a16  w8a8  w4a8     8-bit weights; a8: activations are rounded to int8 too, each row with a scale of its own
w8a8_static           ... all rows with the one scale that calibration found
fp8_tensor  fp8_row   e4m3 weights, one scale for all or one a row; activations are rounded to e4m3 too, per row
fp8_block             e4m3 weights, a scale for 128 x 128; activations per row and 128 columns, DeepSeek-V3
fp8_row_static        activations with one calibrated scale
fp8_row_a16           activations stay as they are
mxfp4                 e2m1 weights, a power of two for 32 columns of a row, OCP Microscaling 1.0
"""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

GROUPS = (32, 64, 128)
BLOCK = 128  # rows and columns that share a scale in fp8_block
MX_GROUP = 32

_INTEGER = re.compile(
    r"w(?P<bits>[48])a(?P<a>16|8)(_g(?P<group>\d+))?(?P<zp>_zp)?(?P<order>_actorder)?(?P<static>_static)?"
)
_FP8 = re.compile(r"fp8_(?P<granularity>tensor|row|block)(?P<rest>_static|_a16)?")


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored, and whether its activations are rounded too.

    Args:
        weight: 'int4', 'int8', 'fp8' (e4m3) or 'mxfp4' (e2m1).
        granularity: what shares a scale: 'group' (columns of a row), 'row', 'tensor' or 'block'.
        group: the columns of a group; 0 where granularity is 'row' or 'tensor'.
        symmetric: False where each scale has a zero point.
        act_order: True where columns are stored in another order than the features of x.
        activation: what x is rounded to before the product: 'int8', 'fp8' or None.
        dynamic: False where one calibrated input_scale is used instead of each row's own largest value.

    Attributes:
        name: as above.  Said once, as a string, since torch.compile with dynamic shapes takes `group` for a number that
            varies, and cannot spell it.

    Raises:
        ValueError: a combination that no kernel could be asked for.
    """

    weight: str
    granularity: str = "row"
    group: int = 0
    symmetric: bool = True
    act_order: bool = False
    activation: str | None = None
    dynamic: bool = True
    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.weight not in _GRANULARITIES:
            raise ValueError(f"Scheme: weight is {self.weight!r}; use one of {', '.join(_GRANULARITIES)}")
        if self.granularity not in (allowed := _GRANULARITIES[self.weight]):
            raise ValueError(
                f"Scheme: granularity is {self.granularity!r}; {self.weight} weights take {' or '.join(allowed)}"
            )
        if self.group not in (groups := _groups(self.weight, self.granularity)):
            raise ValueError(
                f"Scheme: group is {self.group}; {self.weight} weights with a scale a {self.granularity} "
                f"take {' or '.join(map(str, groups))}"
            )
        if self.activation not in (None, rounded := _ACTIVATIONS[self.weight]):
            choice = f"{rounded!r} or None" if rounded else "None"
            raise ValueError(f"Scheme: activation is {self.activation!r}; {self.weight} weights take {choice}")
        if self.weight in ("fp8", "mxfp4") and not (self.symmetric and not self.act_order):
            raise ValueError(f"Scheme: {self.weight} weights have no zero points and no act-order; leave both out")
        if not self.dynamic and (self.activation is None or self.granularity == "block"):
            what = "activation is None" if self.activation is None else "block scales find those of x as they go"
            raise ValueError(f"Scheme: dynamic is False, but {what}; leave it out")
        object.__setattr__(self, "name", self._spelled())

    def __str__(self) -> str:
        return self.name

    @property
    def activation_group(self) -> int:
        """Columns of x that share a scale; 0 is the whole row."""
        return BLOCK if self.granularity == "block" else 0

    @property
    def packed(self) -> bool:
        """Whether two values share a byte."""
        return self.weight in ("int4", "mxfp4")

    def _spelled(self) -> str:
        if self.weight == "mxfp4":
            return "mxfp4"
        static = "" if self.dynamic else "_static"
        if self.weight == "fp8":
            return f"fp8_{self.granularity}{static if self.activation else '_a16'}"
        marks = [
            f"w{self.weight[-1]}a{8 if self.activation else 16}",
            f"_g{self.group}" if self.group else "",
            "" if self.symmetric else "_zp",
            "_actorder" if self.act_order else "",
            static,
        ]
        return "".join(marks)


_GRANULARITIES = {
    "int4": ("group", "row"),
    "int8": ("group", "row"),
    "fp8": ("tensor", "row", "block"),
    "mxfp4": ("group",),
}
_ACTIVATIONS = {"int4": "int8", "int8": "int8", "fp8": "fp8", "mxfp4": None}


def _groups(weight: str, granularity: str) -> tuple[int, ...]:
    if granularity == "block":
        return (BLOCK,)
    if granularity == "group":
        return (MX_GROUP,) if weight == "mxfp4" else GROUPS
    return (0,)


@cache
def _parse(name: str) -> Scheme | None:
    if name == "mxfp4":
        return Scheme("mxfp4", "group", MX_GROUP)
    if found := _INTEGER.fullmatch(name):
        return Scheme(
            f"int{found['bits']}",
            "group" if found["group"] else "row",
            int(found["group"] or 0),
            symmetric=not found["zp"],
            act_order=bool(found["order"]),
            activation="int8" if found["a"] == "8" else None,
            dynamic=not found["static"],
        )
    if found := _FP8.fullmatch(name):
        activation = None if found["rest"] == "_a16" else "fp8"
        granularity, group = found["granularity"], BLOCK if found["granularity"] == "block" else 0
        return Scheme("fp8", granularity, group, activation=activation, dynamic=found["rest"] != "_static")
    return None


def scheme(name: Any) -> Scheme:
    """The scheme of this name: scheme("w4a16_g128_zp"); str() gives the name back.  A Scheme is returned as it is.

    Raises:
        ValueError: no scheme is called so.
    """
    if isinstance(name, Scheme):
        return name
    found = _parse(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"scheme {name!r} is unknown; use a name such as {', '.join(SCHEMES)}")
    return found


SCHEMES = (
    *(f"w4a16{group}{mark}" for group in ("", "_g32", "_g64", "_g128") for mark in ("", "_zp")),
    "w4a16_g128_actorder",
    "w4a8_g128",
    "w8a16",
    "w8a16_g128",
    "w8a8",
    "w8a8_static",
    "fp8_tensor",
    "fp8_tensor_static",
    "fp8_row",
    "fp8_block",
    "fp8_row_a16",
    "mxfp4",
)
