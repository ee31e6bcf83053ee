"""Linear layers with quantized weights in transformers models: quantization_config=LlmkernelsConfig("w4a16_g128").

Loading rounds a dense checkpoint to nearest, or reads one that save_pretrained wrote; for the checkpoints that other
tools wrote, see checkpoints.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import llmkernels
from llmkernels.quant import QuantizedWeight, Scheme, quantize, scheme
from llmkernels.quant.weight import PARTS

METHOD = "llmkernels"


class QuantizedLinear(torch.nn.Module):
    """y = x @ weightT + bias by quantized_gemm.  The parts of the QuantizedWeight are buffers, in their own dtypes."""

    bias: torch.nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None = None):
        super().__init__()
        self.scheme: Scheme = weight.scheme
        self.out_features, self.in_features = weight.shape
        self.set_weight(weight)
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias, requires_grad=False))

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Hold the parts of another weight of this shape."""
        self.scheme = weight.scheme
        for name in PARTS:
            self.register_buffer(name, getattr(weight, name))
        self._weight: QuantizedWeight | None = weight

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, of the buffers as they are now: a loader or .to(device) may have replaced them."""
        parts = [self._buffers[name] for name in PARTS]
        held = self._weight
        if held is None or any(part is not getattr(held, name) for name, part in zip(PARTS, parts, strict=True)):
            values, scales, zeros, permutation, input_scale = parts
            held = QuantizedWeight(values, scales, zeros, permutation, self.scheme, input_scale, self.in_features)
            self._weight = held
        return held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return llmkernels.quantized_gemm(x, self.quantized, bias=self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, bias={self.bias is not None}"

    def _apply(self, fn: Callable, recurse: bool = True) -> "QuantizedLinear":
        """model.to(torch.bfloat16) changes activations and the bias, never what a quantized weight is written in."""

        def change(tensor: torch.Tensor) -> torch.Tensor:
            changed: torch.Tensor = fn(tensor)
            return changed if tensor is self.bias or changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(change, recurse)

    def __deepcopy__(self, memo: dict) -> "QuantizedLinear":
        bias = None if self.bias is None else self.bias.detach().clone()
        copied = QuantizedLinear(self.quantized.map(torch.Tensor.clone), bias)
        memo[id(self)] = copied
        return copied.train(self.training)


class LlmkernelsConfig(QuantizationConfigMixin):
    """What from_pretrained(quantization_config=...) takes, and what is saved in config.json.

    Args:
        scheme: of llmkernels.quant, such as "w4a16_g128", "w8a8", "fp8_block", "mxfp4".
        skip: names of linear layers that stay dense: whole names, their ends ("lm_head") or patterns ("*.mlp.*").
        schemes: layers with another scheme than that, by whole name; save_pretrained writes it.

    Raises:
        ValueError: no such scheme.
    """

    def __init__(
        self,
        scheme: str = "w4a16_g128",
        skip: Sequence[str] = ("lm_head",),
        schemes: Mapping[str, str] | None = None,
        **more: Any,
    ):
        self.quant_method = METHOD
        self.scheme = str(llmkernels.quant.scheme(scheme))
        self.skip = [skip] if isinstance(skip, str) else list(skip)
        self.schemes = {layer: str(llmkernels.quant.scheme(name)) for layer, name in (schemes or {}).items()}
        if unknown := set(more) - {"quant_method"}:
            raise ValueError(f"LlmkernelsConfig has no {', '.join(sorted(unknown))}; it takes scheme, skip and schemes")

    def skips(self, layer: str) -> bool:
        return any(layer == name or layer.endswith(f".{name}") or fnmatch(layer, name) for name in self.skip)

    def scheme_of(self, layer: str) -> Scheme:
        return scheme(self.schemes.get(layer, self.scheme))


class Rounded(ConversionOps):
    """A dense weight, as soon as it is read: rounded, and its Linear replaced, so that few dense ones are ever held."""

    def __init__(self, config: LlmkernelsConfig):
        self.config = config

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: Any = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        (dense,) = input_dict.values()
        name = full_layer_name.rpartition(".")[0]
        weight = quantize(dense[0] if isinstance(dense, list) else dense, self.config.scheme_of(name))
        replace(model, name, QuantizedLinear(weight, model.get_submodule(name).bias))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class LlmkernelsQuantizer(HfQuantizer):
    """Puts QuantizedLinear in the place of Linear: an empty one before a quantized checkpoint is read into it, a
    rounded one when a dense weight was read."""

    quantization_config: LlmkernelsConfig

    def __init__(self, quantization_config: Any, **options: Any):
        super().__init__(quantization_config, **options)
        chosen = scheme(quantization_config.scheme)
        if not self.pre_quantized and (chosen.act_order or not chosen.dynamic):
            raise ValueError(
                f"scheme {chosen} needs calibration data, and from_pretrained only rounds to nearest: use one without "
                "act-order or static scales, or a checkpoint that is quantized already"
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **options: Any) -> None:
        if not self.pre_quantized:
            return
        stored = stored_tensors(checkpoint_files)
        for name, linear in list(linears(model)):
            parts = {part: stored[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in stored}
            if "values" in parts:
                to, columns = self.quantization_config.scheme_of(name), linear.in_features
                empty = {part: parts.get(part) for part in PARTS}
                weight = QuantizedWeight(**empty, scheme=to, in_features=columns)
                replace(model, name, QuantizedLinear(weight, linear.bias))

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        name, _, part = param_name.rpartition(".")
        if self.pre_quantized or part != "weight" or self.quantization_config.skips(name):
            return False
        return type(model.get_submodule(name)) is torch.nn.Linear

    def get_quantize_ops(self) -> "Rounded":
        return Rounded(self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
            raise ValueError(
                f"no layer is quantized: the model has {sum(1 for _ in linears(model))} linear layers, and skip="
                f"{self.quantization_config.skip} names them all; leave some out"
            )

    def is_serializable(self, *args: Any, **options: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]:
            weight = layer.quantized.dequantize(dtype or torch.float32)
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = torch.nn.Parameter(weight, requires_grad=False)
            dense.register_parameter("bias", layer.bias)
            replace(model, name, dense)
        return model


def linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The plain linear layers; a subclass may do more than a product, and stays."""
    return ((name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear)


def replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, last, module)


def stored_tensors(files: Sequence[str] | None) -> dict[str, torch.Tensor]:
    """Name -> an empty tensor (on the device "meta") like the one in the checkpoint's safetensors files."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(
            "a quantized checkpoint is read from safetensors files only; convert it, or pass use_safetensors"
        )
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_slice(name)
                found[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
    return found


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
