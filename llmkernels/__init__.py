"""LLM kernels behind one door: each op below is a function on torch, JAX or NumPy arrays.

    import llmkernels
    y = llmkernels.rms_norm(x, weight)
    print(llmkernels.explain(llmkernels.rms_norm, x, weight))

Nothing heavy is imported before it is asked for.
"""

from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HERE = Path(__file__).parent
if not (_HERE / "backends").is_dir() and (_HERE.parent / "backends" / "__init__.py").is_file():
    __path__.append(str(_HERE.parent))  # a source tree that is not installed: backends/ lies beside the package

if TYPE_CHECKING:
    from llmkernels import jax_api as jax_api
    from llmkernels import ledger as ledger
    from llmkernels import quant as quant
    from llmkernels import testing as testing
    from llmkernels import torch_library as torch_library
    from llmkernels.discovery import Refusal as Refusal
    from llmkernels.discovery import Unsupported as Unsupported
    from llmkernels.ops.lora_gemm import lora_gemm as lora_gemm
    from llmkernels.ops.merge_attention import merge_attention as merge_attention
    from llmkernels.ops.norm_linear_activation import norm_linear_activation as norm_linear_activation
    from llmkernels.ops.paged_attention import paged_attention as paged_attention
    from llmkernels.ops.quantize_activation import quantize_activation as quantize_activation
    from llmkernels.ops.quantized_gemm import quantized_gemm as quantized_gemm
    from llmkernels.ops.rms_norm import rms_norm as rms_norm
    from llmkernels.ops.rotary_embedding import rotary_embedding as rotary_embedding
    from llmkernels.ops.sample import sample as sample
    from llmkernels.ops.silu_and_mul import silu_and_mul as silu_and_mul
    from llmkernels.ops.write_kv import write_kv as write_kv
    from llmkernels.registry import bind as bind
    from llmkernels.registry import explain as explain
    from llmkernels.settings import use as use

_PLACE = {
    "Refusal": "discovery",
    "Unsupported": "discovery",
    "bind": "registry",
    "explain": "registry",
    "use": "settings",
}


def __getattr__(name: str) -> Any:
    # `from llmkernels import ledger` asks here first
    if not name.startswith("_") and util.find_spec(f"llmkernels.{name}"):
        return import_module(f"llmkernels.{name}")
    if name in _PLACE:
        value = getattr(import_module(f"llmkernels.{_PLACE[name]}"), name)
    else:
        if name.startswith("_"):
            raise AttributeError(f"module 'llmkernels' has no attribute {name!r}")
        ops = import_module("llmkernels.registry").OPS
        import_module("llmkernels.ops")
        if name not in ops:
            raise AttributeError(f"llmkernels has no {name!r}; the ops are {', '.join(sorted(ops))}")
        value = ops[name].function
    globals()[name] = value
    return value
