"""One file per op: its shapes, its cases, its cost, its reference.  No file here knows any backend."""

from llmkernels.ops import paged_attention as paged_attention
from llmkernels.ops import rms_norm as rms_norm
