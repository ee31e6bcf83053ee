"""optimize(model): RMSNorm, the linear layers behind it and the activation behind those as one norm_linear_activation.

    input_layernorm -> q_proj, k_proj, v_proj                             one product for the three
    post_attention_layernorm -> gate_proj, up_proj -> act(gate) * up      one product, and the activation in it

No module is replaced: the norm, the linear layers and the MLP get another `forward`, so names, parameters, the
state_dict and save_pretrained stay what they were, and restore(model) takes it away again.  The weights of one product
lie in one array, of which the layers' own weights become views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

import llmkernels
from llmkernels.integrations.transformers.quantized import QuantizedLinear
from llmkernels.quant import QuantizedWeight

PLAIN = ("input_layernorm", "post_attention_layernorm")
GEMMA = ("input_layernorm", "pre_feedforward_layernorm")
FAMILIES = (
    "Llama",
    "Mistral",
    "Ministral",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Granite",
    "SmolLM3",
    "Mixtral",
    "Qwen3Moe",
    "GptOss",
)
# Blocks that are known to apply these norms right before attention and MLP, which use nothing else of their output.
BLOCKS = {f"{family}DecoderLayer": PLAIN for family in FAMILIES}
BLOCKS |= {"Gemma2DecoderLayer": GEMMA, "Gemma3DecoderLayer": GEMMA}
GATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"swiglu": functional.silu, "geglu": functional.gelu}
MARK = "_llmkernels_changed"


@dataclass
class Report:
    """What optimize did: (modules, what they are now) and (modules, why they stayed)."""

    changed: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("replaced", *row) for row in self.changed] + [("left", *row) for row in self.left]
        width = max((len(row[1]) for row in rows), default=0)
        return "\n".join(f"{what:8}  {where:{width}}  {why}" for what, where, why in rows)

    __repr__ = __str__


def optimize(model: torch.nn.Module) -> Report:
    """Fuse what can be fused, and tell what was not and why.  Logits change within roundoff only.

    Raises:
        ValueError: the model is optimized already.
    """
    if MARK in model.__dict__:
        raise ValueError("the model is optimized already; restore(model) first, to do it again")
    report, changed = Report(), []
    for path, block in model.named_modules():
        norms = BLOCKS.get(type(block).__name__)
        if norms is None:
            if hasattr(block, "input_layernorm"):
                report.left.append((path, f"{type(block).__name__} is no block that is known"))
            continue
        for norm, part, fuse in ((norms[0], "self_attn", _attention), (norms[1], "mlp", _mlp)):
            try:
                chain, told = fuse(getattr(block, norm), getattr(block, part))
            except _Left as reason:
                report.left.append((f"{path}.{norm} -> {part}", str(reason)))
            else:
                changed += chain
                report.changed.append((f"{path}.{norm} -> {part}", told))
    if not report.changed and not report.left:
        report.left.append((type(model).__name__, "it has no block that is known"))
    if hasattr(model, "lm_head"):
        report.left.append(("norm -> lm_head", "the model hands out what lies between them"))
    model.__dict__[MARK] = changed
    return report


def restore(model: torch.nn.Module) -> None:
    """Take back what optimize did.

    Raises:
        ValueError: the model is not optimized.
    """
    if MARK not in model.__dict__:
        raise ValueError("the model is not optimized; there is nothing to restore")
    for module in model.__dict__.pop(MARK):
        del module.__dict__["forward"]


class _Left(Exception):
    """A chain stays as it is; the message says why."""


class Product:
    """norm(x) @ weightT + bias of all `linears` in one call; methods, so that a deep copy of the model is its own."""

    def __init__(self, norm: Any, one_more: bool, linears: Sequence[Any], activation: str = "none"):
        self.norm, self.one_more, self.linears, self.activation = norm, one_more, list(linears), activation
        self.eps = float(getattr(norm, "variance_epsilon", None) or norm.eps)
        self.rows = [linear.out_features for linear in linears]
        self.pack()

    def pack(self) -> None:
        """Lay the weights side by side; each layer keeps its share as a view."""
        with torch.no_grad():
            if isinstance(self.linears[0], QuantizedLinear):
                self.weight: Any = QuantizedWeight.concatenate([linear.quantized for linear in self.linears])
                for linear, values in zip(self.linears, self.weight.values.split(self.rows), strict=True):
                    linear.set_weight(replace(linear.quantized, values=values))
            else:
                self.weight = torch.cat([linear.weight for linear in self.linears])
                for linear, share in zip(self.linears, self.weight.split(self.rows), strict=True):
                    linear.weight.data = share
            self.bias: torch.Tensor | None = None
            if any(linear.bias is not None for linear in self.linears):
                given = [linear.bias for linear in self.linears]
                like = next(bias for bias in given if bias is not None)
                pairs = zip(given, self.rows, strict=True)
                self.bias = torch.cat([like.new_zeros(rows) if bias is None else bias for bias, rows in pairs])
                for linear, share in zip(self.linears, self.bias.split(self.rows), strict=True):
                    if linear.bias is not None:
                        linear.bias.data = share
        self.places = self.where()

    def where(self) -> list[int]:
        """Where the layers' parameters lie: elsewhere after model.to(...) or loading, and then they are packed anew."""
        stored = "values" if isinstance(self.linears[0], QuantizedLinear) else "weight"
        parameters = [getattr(linear, name) for linear in self.linears for name in (stored, "bias")]
        return [parameter.data_ptr() for parameter in parameters if parameter is not None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.where() != self.places:
            self.pack()
        gain = self.norm.weight
        if self.one_more:
            gain = (1 + gain.float()).to(x.dtype)
        return llmkernels.norm_linear_activation(
            x, self.weight, norm_weight=gain, bias=self.bias, activation=self.activation, eps=self.eps
        )


class Projections:
    """A product whose parts the block asks for one by one, with the same input."""

    def __init__(self, product: Product):
        self.product = product
        self.source: torch.Tensor | None = None
        self.parts: list[torch.Tensor | None] = [None] * len(product.rows)

    def take(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if self.source is not x or self.parts[index] is None:
            self.source, self.parts = x, list(self.product(x).split(self.product.rows, -1))
        part, self.parts[index] = self.parts[index], None
        if all(other is None for other in self.parts):
            self.source = None  # all are handed out: nothing is kept alive
        assert part is not None
        return part


@dataclass
class Projection:
    """One of them, as the forward of its layer."""

    of: Projections
    index: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of.take(x, self.index)


class Passed:
    """The forward of a norm that the product behind it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass
class GatedMlp:
    """down(act(gate) * up) of a product for gate and up; `act` where the product does not compute the activation."""

    product: Product
    down: torch.nn.Module
    act: Callable | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.product(x)
        if self.act is not None:
            gate, up = h.chunk(2, -1)
            h = self.act(gate) * up
        return self.down(h)


def _attention(norm: Any, block: Any) -> tuple[list[torch.nn.Module], str]:
    linears = _linears(block, ("q_proj", "k_proj", "v_proj"), norm)
    one_more = _one_more(norm)
    shared = Projections(_product(norm, one_more, linears))
    norm.forward = Passed().forward
    for index, linear in enumerate(linears):
        linear.forward = Projection(shared, index).forward
    return [norm, *linears], f"norm_linear_activation, {' + '.join(map(str, shared.product.rows))} features"


def _mlp(norm: Any, block: Any) -> tuple[list[torch.nn.Module], str]:
    linears = _linears(block, ("gate_proj", "up_proj"), norm, block)
    one_more = _one_more(norm)
    if not callable(act := getattr(block, "act_fn", None)) or not hasattr(block, "down_proj"):
        raise _Left(f"{type(block).__name__} is no gated MLP")
    probe = torch.linspace(-8, 8, 257)
    fits = [name for name, function in GATED.items() if torch.allclose(act(probe), function(probe), atol=1e-6)]
    activation = fits[0] if fits else "none"
    product = _product(norm, one_more, linears, activation)
    norm.forward = Passed().forward
    block.forward = GatedMlp(product, block.down_proj, None if fits else act).forward
    told = f"norm_linear_activation, {' + '.join(map(str, product.rows))} features, activation {activation!r}"
    return [norm, block], told if fits else f"{told}; {type(act).__name__} stays outside: the operation has none such"


def _product(norm: Any, one_more: bool, linears: list[Any], activation: str = "none") -> Product:
    try:
        return Product(norm, one_more, linears, activation)
    except ValueError as reason:  # weights that cannot become one
        raise _Left(str(reason)) from None


def _linears(block: Any, names: tuple[str, ...], *others: Any) -> list[Any]:
    """The linear layers of these names, which nothing else has changed already."""
    found = [getattr(block, name, None) for name in names]
    for name, linear in zip(names, found, strict=True):
        if linear is None:
            raise _Left(f"{type(block).__name__} has no {name}")
        if type(linear) not in (torch.nn.Linear, QuantizedLinear):
            raise _Left(f"{name} is a {type(linear).__name__}, not a Linear or QuantizedLinear")
    if len(kinds := {type(linear).__name__ for linear in found}) > 1:
        raise _Left(f"{', '.join(names)} are {' and '.join(sorted(kinds))}")
    for module in (*found, *others):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise _Left(f"{type(module).__name__} has hooks, or a forward of its own, that would be passed by")
        if any(parameter.is_meta for parameter in module.parameters()):
            raise _Left(f"the weights of {type(module).__name__} are not in memory")
    return found


def _one_more(norm: Any) -> bool:
    """Whether an RMSNorm multiplies by 1 + weight, as Gemma's does, and not by weight: seen by trying."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(eps, float) or not eps > 0:
        raise _Left(f"{type(norm).__name__} has no weight and eps, as an RMSNorm has")
    with torch.no_grad():
        x = torch.randn(4, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        got, normed = norm(x).float(), functional.rms_norm(x.float(), weight.shape, eps=eps)
        roundoff = 4 * torch.finfo(weight.dtype).eps
        for one_more in (False, True):
            if torch.allclose(got, normed * (weight.float() + one_more), rtol=roundoff, atol=roundoff):
                return one_more
    raise _Left(f"{type(norm).__name__} is no RMSNorm with gain weight or 1 + weight")
