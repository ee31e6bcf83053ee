"""Checkpoints that other tools quantized, in transformers: register(checkpoints=("gptq", "awq", ...)).

transformers reads config.json, sees quant_method and asks its registry who loads that.  There these classes take the
place of its own, which need a package for each format.  The tensors are loaded as they are stored, then each layer
becomes a QuantizedLinear; nothing is rounded again.  Such a model is saved as LlmkernelsConfig describes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmkernels.integrations.transformers.quantized import (
    LlmkernelsConfig,
    LlmkernelsQuantizer,
    QuantizedLinear,
    linears,
    replace,
    stored_tensors,
)
from llmkernels.quant import QuantizedWeight, formats

QUANTIZED = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")  # one of these marks a quantized layer


class StoredConfig(QuantizationConfigMixin):
    """A quantization_config of config.json, every key kept as it is."""

    def __init__(self, **config: Any):
        self.__dict__.update(config)


class StoredLinear(torch.nn.Module):
    """The tensors of one layer as a checkpoint stores them, until they are all read."""

    bias: torch.nn.Parameter | None

    def __init__(self, tensors: Mapping[str, torch.Tensor], columns: int, bias: torch.nn.Parameter | None):
        super().__init__()
        self.columns = columns
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)


class StoredQuantizer(LlmkernelsQuantizer):
    """Loads a checkpoint of llmkernels.quant.formats."""

    quantization_config: Any

    def __init__(self, quantization_config: Any, **options: Any):
        HfQuantizer.__init__(self, quantization_config, **options)
        if not self.pre_quantized:
            raise ValueError(
                f"quant_method {quantization_config.quant_method!r} is for checkpoints that are quantized already; "
                "to round a dense one at load, pass LlmkernelsConfig(scheme)"
            )
        self.stored = formats.read(quantization_config.to_dict())

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **options: Any) -> None:
        found = stored_tensors(checkpoint_files)
        for name, linear in list(linears(model)):
            if self.stored.scheme(name) is None:
                continue
            shapes = self.stored.tensors(name, linear.out_features, linear.in_features)
            tensors = {part: found.get(f"{name}.{part}") for part in shapes}
            for part, shape in shapes.items():
                have = tensors[part]
                if have is None or tuple(have.shape) != shape:
                    what = "is missing" if have is None else f"has shape {tuple(have.shape)}"
                    raise ValueError(
                        f"{name}.{part} {what}; quantization_config and the layer's {linear.out_features} x "
                        f"{linear.in_features} ask for {shape}: use the config.json made with this checkpoint"
                    )
            replace(model, name, StoredLinear(tensors, linear.in_features, linear.bias))  # type: ignore[arg-type]
        read = {name for name, module in model.named_modules() if isinstance(module, StoredLinear)}
        stored = {name.rpartition(".")[0] for name in found if name.rpartition(".")[2] in QUANTIZED}
        if unread := sorted(stored - read):
            raise ValueError(
                f"the checkpoint holds {len(unread)} quantized layers that are no linear layers of "
                f"{type(model).__name__}, {unread[0]} the first; experts held in one tensor cannot be read: take a "
                "dense checkpoint, or one of which only attention is quantized"
            )

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        schemes = {}
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, StoredLinear)]:
            weight: QuantizedWeight = self.stored.weight(name, dict(layer.named_buffers()), layer.columns)
            bias = None if layer.bias is None else layer.bias.detach()
            replace(model, name, QuantizedLinear(weight, bias))
            schemes[name] = str(weight.scheme)
        names = list(schemes.values())
        if not names:
            raise ValueError("quantization_config says that the checkpoint is quantized, but no linear layer of it is")
        usual = max(set(names), key=names.count)
        others = {layer: name for layer, name in schemes.items() if name != usual}
        self.quantization_config = LlmkernelsConfig(usual, skip=(), schemes=others)
        model.config.quantization_config = self.quantization_config


def take_over(methods: Sequence[str]) -> None:
    """Load checkpoints of these quant_methods by StoredQuantizer from now on."""
    for method in methods:
        if method not in formats.READERS:
            raise ValueError(f"checkpoints names {method!r}; the readable ones are {', '.join(formats.READERS)}")
    for method in methods:
        auto.AUTO_QUANTIZER_MAPPING[method] = StoredQuantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = StoredConfig
