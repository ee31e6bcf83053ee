"""Cases of paged_attention that only Triton's way of reading caches of one byte makes special; beside the contract's."""

from llmkernels.contract import Case

MIXED = {"new": (1, 13, 1, 5), "lengths": (40, 13, 1, 21), "heads": 8, "kv_heads": 2, "scales": "tensor"}
DECODE = {"new": (1, 1, 1), "lengths": (17, 33, 5), "heads": 16, "kv_heads": 1, "scales": "tensor"}
MLA = {"dim": 576, "v_dim": 512, "layout": "MLA", "scale": 192**-0.5}

BYTES = [
    Case("int8 cache, dim 72", MIXED | {"C": "int8", "dim": 72}),
    Case("MLA, e4m3 cache", DECODE | MLA | {"C": "float8_e4m3fn"}),
]
