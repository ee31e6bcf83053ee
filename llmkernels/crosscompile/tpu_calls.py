"""The calls that a backend's Pallas kernels are compiled for: every kind of call, at sizes of real models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 128  # Llama 3 8B
HIDDEN = 4096
LARGE = ("v6e", "v7x")  # chips whose matrix unit is 256 wide: kernels of their own for some products of many rows


@dataclass(frozen=True)
class Call:
    """One call of an op by shapes.

    Args:
        arrays, options: name -> (shape, dtype), or a Python value; a weight is ('weight', scheme, out, in).
        kernel: the module that has the kernel, where it is not the op's own.
        always: targets that have a kernel of their own for this call, which no other call reaches.
    """

    op: str
    name: str
    dtype: str
    arrays: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    kernel: str = ""
    always: tuple[str, ...] = ()


def calls() -> Iterator[Call]:
    yield from _attention()
    yield from _products()
    yield from _layers()
    yield from _writes()
    yield from _rows()
    yield from _adapters()
    yield from _steps()
    yield product("w4a16", 512, LARGE)


def chosen(targets: Sequence[str]) -> Iterator[tuple[Call, str]]:
    """(call, target): the first call of each op for every target, the others by turns for one, and for `always`."""
    seen: set[str] = set()
    for i, call in enumerate(calls()):
        turn = [targets[i % len(targets)], *(name for name in call.always if name in targets)]
        mine = targets if call.op not in seen else dict.fromkeys(turn)
        seen.add(call.op)
        yield from ((call, name) for name in mine)


def attention(
    name: str, tokens: int = 8, seqs: int = 8, keys: int = 2048, heads: int = HEADS, kv_heads: int = KV_HEADS,
    dim: int = DIM, v_dim: int | None = None, page: int = PAGE, dtype: str = "bfloat16", stored: str | None = None,
    writes: bool = False, **options: Any,
) -> Call:  # fmt: skip
    """A call of paged_attention; writes: of the kernel that writes what it reads."""
    pages = keys // page
    cache = (min(seqs * pages, 4096), page, kv_heads)
    arrays = {
        "q": ((tokens, heads, dim), dtype),
        "k_cache": ((*cache, dim), stored or dtype),
        "v_cache": ((*cache, v_dim or dim), stored or dtype),
        "block_table": ((seqs, pages), "int32"),
        "seq_lens": ((seqs,), "int32"),
        "cu_seqlens_q": ((seqs + 1,), "int32"),
    }
    if writes:
        new: Any = ((tokens, kv_heads, dim), dtype)
        first, *others = arrays.items()
        slots = {"slots": ((tokens,), "int32")}
        arrays = dict([first, ("k", new), ("v", new), *others[:2]]) | slots | dict(others[2:])
    defaults = {"scale": None, "causal": True, "window": (-1, -1), "soft_cap": 0.0, "return_lse": False}
    absent = dict.fromkeys(("sinks", "alibi_slopes", "k_scale", "v_scale", "tree_mask"))
    bounds = {"max_seqlen_q": None, "max_seqlen_k": None}
    kernel = "_decode" if writes else ""
    return Call("paged_attention", name, dtype, arrays, defaults | absent | bounds | options, kernel)


def _attention() -> Iterator[Call]:
    head = ((HEADS,), "float32")
    one = ((1,), "float32")
    yield attention("decode 8 x 2k")
    yield attention("decode 64 x 16k", tokens=64, seqs=64, keys=16384)
    yield attention("decode, pages of 16", page=16)
    yield attention("decode, heads of 64", dim=64)
    yield attention("decode, heads of 256", dim=256)
    yield attention("decode, MHA", heads=8)
    yield attention("decode, group of 7", heads=14, kv_heads=2)
    yield attention("decode, MLA", heads=16, kv_heads=1, dim=576, v_dim=512)
    for stored in ("int8", "float8_e4m3fn", "float8_e5m2"):
        yield attention(f"decode, {stored} cache", stored=stored, k_scale=one, v_scale=one)
    yield attention("decode", dtype="float16")
    yield attention("decode", dtype="float32")
    yield attention("prefill 2 x 256", tokens=512, seqs=2)
    yield attention("prefill 1 x 2048", tokens=2048, seqs=1)
    yield attention("chunks in float32", tokens=64, seqs=2, dtype="float32")
    yield attention("window and lse", tokens=64, seqs=4, window=(1024, 0), return_lse=True)
    yield attention("soft cap, sinks", tokens=64, seqs=4, soft_cap=30.0, sinks=head)
    yield attention("ALiBi", tokens=64, seqs=4, alibi_slopes=head)
    yield attention("tree", tokens=64, seqs=8, tree_mask=((64, 1), "uint32"))


def _steps() -> Iterator[Call]:
    """Decode whose attention writes."""
    one = ((1,), "float32")
    yield attention("decode that writes", writes=True, max_seqlen_q=1)
    yield attention("decode that writes, int8", stored="int8", k_scale=one, v_scale=one, writes=True, max_seqlen_q=1)


def product(scheme: str, rows: int, always: tuple[str, ...] = ()) -> Call:
    """A call of quantized_gemm."""
    arrays: dict[str, Any] = {"x": ((rows, HIDDEN), "bfloat16"), "weight": ("weight", scheme, HIDDEN, HIDDEN)}
    return Call("quantized_gemm", f"{scheme}, {rows} rows", "bfloat16", arrays, {"bias": None}, always=always)


def _products() -> Iterator[Call]:
    schemes = (
        "w4a16_g128",
        "w4a16_g128_zp",
        "w4a16_g32",
        "w4a8_g128",
        "w8a16",
        "w8a8",
        "fp8_row",
        "fp8_block",
        "mxfp4",
    )
    for scheme in schemes:
        for rows in (8, 512):
            yield product(scheme, rows, LARGE if (scheme, rows) == ("w8a8", 512) else ())


def _layers() -> Iterator[Call]:
    options = {"norm": "rms", "norm_bias": None, "residual": None, "bias": None, "eps": 1e-6, "return_residual": False}
    gain = ((HIDDEN,), "bfloat16")
    dense: Any = ((2 * HIDDEN, HIDDEN), "bfloat16")
    for name, weight in (("dense", dense), ("w4a16_g128", ("weight", "w4a16_g128", 2 * HIDDEN, HIDDEN))):
        for rows in (8, 512):
            for activation in ("swiglu", "gelu_tanh"):
                yield Call(
                    "norm_linear_activation", f"rms, {name}, {activation}, {rows} rows", "bfloat16",
                    {"x": ((rows, HIDDEN), "bfloat16"), "weight": weight},
                    options | {"norm_weight": gain, "activation": activation},
                )  # fmt: skip


def _writes() -> Iterator[Call]:
    def call(name: str, tokens: int, stored: str, page: int = PAGE, heads: int = KV_HEADS, dim: int = DIM) -> Call:
        new, cache = ((tokens, heads, dim), "bfloat16"), ((256, page, heads, dim), stored)
        arrays = {"k": new, "v": new, "k_cache": cache, "v_cache": cache, "slots": ((tokens,), "int32")}
        scale = None if stored in ("bfloat16", "float16", "float32") else ((heads,), "float32")
        return Call("write_kv", name, "bfloat16", arrays, {"k_scale": scale, "v_scale": scale})

    yield call("decode", 64, "bfloat16")
    yield call("chunk of 2048", 2048, "bfloat16")
    yield call("pages of 16", 64, "bfloat16", page=16)
    yield call("heads of 64", 64, "bfloat16", dim=64)
    for stored in ("int8", "float8_e4m3fn", "float8_e5m2"):
        yield call(f"{stored} cache", 64, stored)
    yield call("int8 cache, pages of 16", 64, "int8", page=16)


def _rows() -> Iterator[Call]:
    for dtype in ("bfloat16", "float32", "float16"):
        x, gain, where = ((2048, HIDDEN), dtype), ((HIDDEN,), dtype), "" if dtype == "bfloat16" else f"{dtype}, "
        norm = {"x": x, "weight": gain}
        yield Call("rms_norm", f"{where}2048 rows", dtype, norm, {"residual": None, "eps": 1e-6})
        yield Call("rms_norm", f"{where}2048 rows, residual", dtype, norm, {"residual": x, "eps": 1e-6})
        yield Call("silu_and_mul", f"{where}2048 x 14336", dtype, {"x": ((2048, 28672), dtype)})
        for to, group in (("int8", 0), ("float8_e4m3fn", 0), ("float8_e4m3fn", 128), ("int8", 64)):
            options = {"dtype": to, "group": group, "scale": None}
            name = f"{where}{to}, group {group}" if group else f"{where}{to}"
            yield Call("quantize_activation", name, dtype, {"x": x}, options)
    for dim, half, interleaved in ((128, 64, False), (128, 64, True), (64, 32, False), (256, 64, False)):
        table = ((8192, half), "bfloat16")
        arrays = {
            "q": ((2048, HEADS, dim), "bfloat16"),
            "k": ((2048, KV_HEADS, dim), "bfloat16"),
            "cos": table,
            "sin": table,
            "positions": ((2048,), "int32"),
        }
        name = f"{half} pairs of {dim} channels{', interleaved' if interleaved else ''}"
        yield Call("rotary_embedding", name, "bfloat16", arrays, {"interleaved": interleaved})


def _adapters() -> Iterator[Call]:
    for rows, rank, dtype in ((8, 16, "bfloat16"), (512, 64, "bfloat16"), (64, 16, "float32"), (64, 16, "float16")):
        arrays = {
            "y": ((rows, HIDDEN), dtype),
            "x": ((rows, HIDDEN), dtype),
            "a": ((8, rank, HIDDEN), dtype),
            "b": ((8, HIDDEN, rank), dtype),
            "adapters": ((rows,), "int32"),
            "scales": ((8,), "float32"),
        }
        yield Call("lora_gemm", f"{dtype}, {rows} rows, rank {rank}", dtype, arrays)


def arguments(call: Call, weight_of: Callable, array: Callable) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """(arrays in order, arrays among the options, Python values), every array made by `array(shape, dtype)`."""

    def made(value: Any) -> Any:
        if _is_weight(value):
            return weight_of(*value[1:])
        return array(*value) if _is_array(value) else value

    named = {name: made(value) for name, value in call.options.items() if _is_array(value)}
    fixed = {name: value for name, value in call.options.items() if not _is_array(value)}
    return [made(value) for value in call.arrays.values()], named, fixed


def _is_weight(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 4 and value[0] == "weight"


def _is_array(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple)
