"""One file per op: its shapes, its cases, its cost, its reference.  No file here knows any backend."""

from llmkernels.ops import lora_gemm as lora_gemm
from llmkernels.ops import merge_attention as merge_attention
from llmkernels.ops import norm_linear_activation as norm_linear_activation
from llmkernels.ops import paged_attention as paged_attention
from llmkernels.ops import quantize_activation as quantize_activation
from llmkernels.ops import quantized_gemm as quantized_gemm
from llmkernels.ops import rms_norm as rms_norm
from llmkernels.ops import rotary_embedding as rotary_embedding
from llmkernels.ops import sample as sample
from llmkernels.ops import silu_and_mul as silu_and_mul
from llmkernels.ops import write_kv as write_kv
