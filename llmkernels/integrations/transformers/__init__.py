"""transformers runs on llmkernels: attention of every model, quantized linear layers, fused norms and projections.

    from llmkernels.integrations import transformers as adapter
    adapter.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="llmkernels")

docs/transformers.md tells the rest.
"""

from collections.abc import Sequence

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    raise ImportError(
        "llmkernels.integrations.transformers needs transformers 5.23 or newer, whose caches it reads in place; "
        f"this is {transformers.__version__}: pip install 'llmkernels[transformers]'"
    )

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.quantizers import auto

from llmkernels.integrations.transformers import attention, masks, paged, quantized
from llmkernels.integrations.transformers.checkpoints import take_over
from llmkernels.integrations.transformers.fused import Report, optimize, restore
from llmkernels.integrations.transformers.quantized import LlmkernelsConfig, QuantizedLinear

__all__ = ["LlmkernelsConfig", "QuantizedLinear", "Report", "optimize", "register", "restore"]


def register(checkpoints: Sequence[str] = ()) -> None:
    """Make attn_implementation="llmkernels" and LlmkernelsConfig known to transformers.

    Args:
        checkpoints: quant_methods of checkpoints that llmkernels shall load in place of transformers' own classes, for
            all models loaded later: any of "gptq", "awq", "compressed-tensors", "fp8".

    Raises:
        ValueError: a quant_method that cannot be read.
    """
    AttentionInterface.register(attention.NAME, attention.attention)
    AttentionMaskInterface.register(attention.NAME, masks.mask)
    paged.allow(attention.NAME)
    auto.AUTO_QUANTIZER_MAPPING[quantized.METHOD] = quantized.LlmkernelsQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[quantized.METHOD] = LlmkernelsConfig
    take_over([checkpoints] if isinstance(checkpoints, str) else checkpoints)
