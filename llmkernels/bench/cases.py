"""The calls worth timing: sizes of real models, drawn by the contracts' own `inputs`.

The contracts' cases are small and strange, for correctness; these are large and ordinary.  LLAMA is Llama 3.1 8B, whose
projections are 4096 x 4096 and 14336 x 4096; its attention has 32 heads, 8 KV heads and dim 128.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkernels.contract import Case

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
HEADS: dict[str, Any] = {"heads": 32, "kv_heads": 8, "dim": 128}
NEVER = 1 << 62
CPU_TOKENS = 1 << 16  # keys in a cache: 256 MiB of bfloat16; more takes a CPU longer than anyone waits


@dataclass(frozen=True)
class Timed:
    """A case, and where it is worth its time: in a quick run, on a CPU."""

    case: Case
    quick: bool = False
    cpu: bool = True


def timed(op: str, device: str, quick: bool) -> list[Case]:
    """The cases of `op` for this device; in a quick run the small ones only.  An op unknown here has none."""
    on_cpu = not device.startswith("cuda")
    return [t.case for t in BENCH.get(op, ()) if (t.quick or not quick) and (t.cpu or not on_cpu)]


def _timed(name: str, quick: bool = False, cpu: bool = True, **args: Any) -> Timed:
    return Timed(Case(name, args), quick, cpu)


def _decode(batch: int, context: int, quick: bool = False, **more: Any) -> Timed:
    """One new token a sequence.  The bounds that an engine tells are told, here and of prompts."""
    name = f"decode {batch} x {context}" + "".join(f", {v}" for v in more.values() if isinstance(v, str))
    bounds = {"max_seqlen_q": 1, "max_seqlen_k": context}
    args: Mapping[str, Any] = {"new": (1,) * batch, "lengths": (context,) * batch} | bounds | HEADS | more
    return Timed(Case(name, args), quick, cpu=batch * context <= CPU_TOKENS)


def _prefill(batch: int, tokens: int, cached: int = 0, quick: bool = False, cpu: bool = True, **more: Any) -> Timed:
    """A prompt, or a chunk of one behind `cached` keys."""
    name = f"prefill {batch} x {tokens}" + (f" after {cached}" if cached else "")
    name += "".join(f", {key} {value}" for key, value in more.items())
    bounds = {"max_seqlen_q": tokens, "max_seqlen_k": cached + tokens}
    args: Mapping[str, Any] = {"new": (tokens,) * batch, "lengths": (cached + tokens,) * batch} | bounds | HEADS | more
    return Timed(Case(name, args), quick, cpu)


def _gemm(rows: int, out: int, scheme: str, quick: bool = False, cpu: bool = True) -> Timed:
    """rows x HIDDEN times a quantized weight."""
    in_ = min(out, HIDDEN)
    return _timed(f"{scheme} {rows} x {in_} -> {out}", quick, cpu, scheme=scheme, rows=rows, out=out, in_=in_)


def _linear(rows: int, features: int, name: str, quick: bool = False, cpu: bool = True, **more: Any) -> Timed:
    """A norm, a projection and an activation; gated ones have twice the features."""
    in_ = min(features, HIDDEN)
    args = {"rows": rows, "features": features, "in_": in_, "norm_weight": True} | more
    return _timed(f"{name} {rows} x {in_} -> {features}", quick, cpu, **args)


ROWS = (1, 16, 512)
QKV = HIDDEN + 2 * 1024  # query, key and value projections in one

BENCH: dict[str, list[Timed]] = {
    "rms_norm": [
        *(_timed(f"{rows} x {HIDDEN}", rows == 16, rows=rows, hidden=HIDDEN) for rows in ROWS),
        _timed(f"512 x {HIDDEN} + residual", rows=512, hidden=HIDDEN, residual=True),
        _timed(f"8192 x {HIDDEN}", cpu=False, rows=8192, hidden=HIDDEN),
    ],
    "silu_and_mul": [
        *(_timed(f"{rows} x {INTERMEDIATE}", rows == 16, rows=rows, width=INTERMEDIATE) for rows in ROWS),
        _timed(f"8192 x {INTERMEDIATE}", cpu=False, rows=8192, width=INTERMEDIATE),
    ],
    "rotary_embedding": [
        *(_timed(f"{tokens} tokens", tokens == 16, tokens=tokens, max_positions=4096, **HEADS) for tokens in ROWS),
        _timed("8192 tokens", cpu=False, tokens=8192, max_positions=8192, **HEADS),
    ],
    "write_kv": [
        *(_timed(f"{t} tokens", t == 16, tokens=t, kv_heads=8, dim=128, pages=t // 16 + 64) for t in ROWS),
        _timed("512 tokens, int8", tokens=512, kv_heads=8, dim=128, pages=288, C="int8", scales="tensor"),
        _timed("8192 tokens", cpu=False, tokens=8192, kv_heads=8, dim=128, pages=1024),
    ],
    "merge_attention": [
        *(_timed(f"{tokens} tokens", tokens == 16, tokens=tokens, heads=32, v_dim=128) for tokens in ROWS),
        _timed("8192 tokens", cpu=False, tokens=8192, heads=32, v_dim=128),
    ],
    "sample": [
        *(_timed(f"greedy, {rows} rows", rows=rows, vocab=VOCABULARY, temperature=0.0) for rows in (1, 32)),
        _timed("temperature, 32 rows", rows=32, vocab=VOCABULARY, temperature=0.7),
        _timed("top-p, 4 rows of 32k", True, rows=4, vocab=32768, temperature=0.7, top_p=0.95),
        _timed("top-p, 32 rows", rows=32, vocab=VOCABULARY, temperature=0.7, top_p=0.95),
        _timed("top-k, top-p, min-p, 32 rows", rows=32, vocab=VOCABULARY, top_k=50, top_p=0.9, min_p=0.05),
    ],
    "quantize_activation": [
        *(_timed(f"int8, {rows} x {HIDDEN}", rows == 16, rows=rows, hidden=HIDDEN) for rows in ROWS),
        _timed(f"e4m3, 512 x {HIDDEN}", rows=512, hidden=HIDDEN, dtype="float8_e4m3fn"),
        _timed(
            f"e4m3, 8192 x {HIDDEN}, group 128", cpu=False, rows=8192, hidden=HIDDEN, dtype="float8_e4m3fn", group=128
        ),
    ],
    "quantized_gemm": [
        _gemm(1, 1024, "w4a16_g128", quick=True),
        _gemm(16, 1024, "w8a8", quick=True),
        *(_gemm(rows, HIDDEN, "w4a16_g128") for rows in (1, 4, 16, 64, 512)),
        *(_gemm(rows, HIDDEN, scheme) for scheme in ("w4a8_g128", "w8a8") for rows in (1, 4, 16, 64, 512)),
        *(_gemm(rows, HIDDEN, scheme) for scheme in ("w8a16", "fp8_row") for rows in (1, 16, 512)),
        *(
            _gemm(rows, HIDDEN, scheme)
            for scheme in ("w4a16_g128_zp", "w4a16_g128_actorder", "mxfp4")
            for rows in (1, 16)
        ),
        *(_gemm(rows, HIDDEN, "fp8_block", cpu=False) for rows in (1, 16, 512)),
        _gemm(1, 11008, "w4a16_g128"),  # Llama 2 7B
        *(_gemm(rows, INTERMEDIATE, "w4a16_g128") for rows in (1, 16)),
        *(_gemm(8192, INTERMEDIATE, s, cpu=False) for s in ("w4a16_g128", "w8a8", "fp8_row", "fp8_block")),
    ],
    "norm_linear_activation": [
        _linear(16, 1024, "rms, silu", quick=True, activation="silu"),
        *(_linear(rows, HIDDEN, "rms, silu", activation="silu") for rows in (1, 512)),
        *(_linear(rows, QKV, "rms, residual", residual=True, return_residual=True) for rows in ROWS),
        *(_linear(rows, 2 * INTERMEDIATE, "rms, swiglu", activation="swiglu", cpu=rows < 512) for rows in ROWS),
        *(_linear(rows, QKV, "rms, w4a16_g128", scheme="w4a16_g128") for rows in (1, 16)),
        _linear(16, 4 * HIDDEN, "layer, gelu_tanh", norm="layer", norm_bias=True, activation="gelu_tanh"),
        _linear(8192, QKV, "rms", cpu=False),
    ],
    "lora_gemm": [
        _timed("16 rows, 4 adapters of rank 16, 1024", True, rows=16, in_=1024, out=1024, rank=16, count=4),
        *(
            _timed(f"{rows} rows, 8 adapters of rank {rank}", rows=rows, in_=HIDDEN, out=HIDDEN, rank=rank, count=8)
            for rows, rank in ((1, 16), (16, 16), (16, 64), (512, 16))
        ),
    ],
    "paged_attention": [
        _decode(1, 512, quick=True),
        *(
            _decode(batch, context)
            for batch in (1, 8, 32)
            for context in (512, 4096, 16384)
            if (batch, context) != (1, 512)
        ),
        _decode(8, 4096, C="int8", scales="tensor"),
        _decode(8, 4096, C="float8_e4m3fn", scales="tensor"),
        _decode(8, 4096, layout="HND"),
        _prefill(1, 128, quick=True),
        _prefill(1, 1024),
        _prefill(1, 256, cached=2048),
        _prefill(1, 512, cached=3584),
        _prefill(4, 4096, cpu=False),
        _prefill(1, 8192, cpu=False),
        _prefill(8, 5, cached=2048),
        _prefill(1, 1024, window=(256, 0)),
    ],
}
