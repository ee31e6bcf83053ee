"""Mistakes planted in the source of the Triton kernels, and whether the conformance kit notices each one.

    python tests/triton_faults.py [NAME ...]      one JSON object: name -> what the kit said, null where it said nothing

Each fault copies backends/triton, changes a line, and runs the cases of one op in the interpreter until one fails.  The
unchanged kernels pass the same cases.  tests/test_triton_faults.py runs this in a process of its own, because Triton
decides when it is imported whether it interprets.
"""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 60  # seconds for a fault, of which none takes five; one that hangs counts as not noticed


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` wherever it stands in the file; the named cases of the op in `dtype` should notice."""

    file: str
    old: str
    new: str
    op: str
    cases: tuple[str, ...]
    dtype: str = "float32"


def attention(old, new, *cases):
    return Fault("_attention", old, new, "paged_attention", cases)


def words(file, old, new, *cases):
    """Caches of one byte are read as words of two where q has 16 bits."""
    return Fault(file, old, new, "paged_attention", cases, "float16")


def product(old, new, *cases):
    return Fault("_product", old, new, "quantized_gemm", cases)


LARGE = "w4a16_g128, 17 x"  # parts of the names of cases: the first with more rows than _few.py takes, and two bands
LARGER = "w4a16_g128_zp, 64 x"

FAULTS = {
    # paged_attention
    "a key of the future": attention("<= position[:, None] + right", "<= position[:, None] + right + 1", "mixed"),
    "the window holds a key too many": attention(
        ">= position[:, None] - left", ">= position[:, None] - left - 1", "window"
    ),
    "keys past the end are not masked": attention(
        "seen = live[None, :]", "seen = (key >= 0)[None, :]", "not causal", "padding"
    ),
    "values read with the stride of keys": attention(
        "kv_head.to(tl.int64) * v_head", "kv_head.to(tl.int64) * k_head", "v_dim below dim", "packed"
    ),
    "a page's slots read with the head's stride": attention("slot * k_slot", "slot * k_head", "mixed", "HND"),
    "the scale of the first head": attention("kv_head * k_scale_head", "0 * k_scale_head", "int8 cache"),
    "a share ends a block too early": attention(
        "tl.minimum(begin + share, hi)", "tl.minimum(begin + share - BLOCK_N, hi)", "long decode"
    ),
    "tiles of the last sequence belong to the one before": attention("(seq < seqs)", "(seq < seqs - 1)", "mixed"),
    "a band's heads are all its first": attention("tl.program_id(0) % band", "0", "chunk"),
    "every head has the tiles of the first": attention("tl.program_id(1) * band", "0", "mixed"),
    "every tile begins at the first token": attention(
        "(tile - (begin_token // TOKENS + seq)) * TOKENS", "0 * TOKENS", "long prefill", "prefill"
    ),
    "the sum is not rescaled when the maximum rises": attention(
        "acc = acc * shrink[:, None]", "acc = acc * 1.0", "long decode", "long prefill"
    ),
    "the last share is left out of the reduction": attention(
        "mask=share < SHARES, other", "mask=share < SHARES - 1, other", "long decode"
    ),
    "dropped sink": attention(
        "total = total * tl.exp2(top - above) + tl.exp2(sink - above)", "total = total * tl.exp2(top - above)", "sinks"
    ),
    "lse in base 2": attention("(top + tl.log2(total)) * LN2", "(top + tl.log2(total))", "mixed"),
    "the tree's mask of the token before": attention(
        "token.to(tl.int64)[:, None] * tree_row", "(token.to(tl.int64)[:, None] - 1) * tree_row", "tree"
    ),
    "words: odd channels of q and even ones of keys": words(
        "_attention", "tl.trans(k_a_odd)", "tl.trans(k_a)", "int8 cache"
    ),
    "words: of the channels beyond a power of two": words(
        "_attention", "tl.trans(k_b_odd)", "tl.trans(k_b)", "int8 cache, dim 72"
    ),
    "words: even and odd channels of values change places": words(
        "_attention", "tl.join(acc, acc_odd)", "tl.join(acc_odd, acc)", "e4m3 cache"
    ),
    "words: odd channels are not rescaled when the maximum rises": words(
        "_attention", "acc_odd * shrink[:, None]", "acc_odd * 1.0", "rising maximum, e4m3"
    ),
    "words: scores of rows that were made smaller": words(
        "_attention", "(larger * factor)", "(larger * 0.0 + factor)", "int8 cache"
    ),
    "words: the sign of int8": words("_bytes", "^ 0x6480", "^ 0x6400", "int8 cache"),
    # merge_attention, write_kv, rotary_embedding, sample, silu_and_mul
    "a merged part keeps its weight": Fault(
        "merge_attention", "(weight_b / total)[:, None]", "weight_b[:, None]", "merge_attention", ("",)
    ),
    "slot -1 is stored": Fault("write_kv", "(slot < 0) | (slot >= capacity)", "slot >= capacity", "write_kv", ("",)),
    "the token's stride of keys for values": Fault(
        "write_kv", "v + token * v_token", "v + token * k_token", "write_kv", ("",)
    ),
    "multiplied by the cache's scale": Fault("write_kv", "tl.div_rn(x, tl.load(", "(x * tl.load(", "write_kv", ("",)),
    "rotated the other way": Fault("rotary_embedding", "b * c + a * s", "b * c - a * s", "rotary_embedding", ("",)),
    "uniform is not scaled by the mass": Fault(
        "sample", "tl.load(uniform + row) * total", "tl.load(uniform + row)", "sample", ("",)
    ),
    "the gate is the second half": Fault(
        "silu_and_mul",
        "gate / (1.0 + tl.exp(-gate)) * value",
        "value / (1.0 + tl.exp(-value)) * gate",
        "silu_and_mul",
        ("",),
    ),
    # rms_norm, quantize_activation: _rows.py
    "the mean of the padded width": Fault("_rows", "squares / width + eps", "squares / BLOCK + eps", "rms_norm", ("",)),
    "the residual read with the stride of x": Fault(
        "_rows", "residual_row)[:, None]", "x_row + 1)[:, None]", "rms_norm", ("residual",)
    ),
    "columns past the row are not masked": Fault(
        "_rows", "else column < own", "else column < own + 1", "rms_norm", ("",)
    ),
    "the sign counts for the largest": Fault("_rows", " & 0x7FFFFFFF", "", "quantize_activation", ("",)),
    "the scale of the group before": Fault(
        "_rows",
        "tl.store(scales + index[:, None]",
        "tl.store(scales + (index ^ 1)[:, None]",
        "quantize_activation",
        ("group",),
    ),
    # quantized_gemm, norm_linear_activation: _product.py, _codes.py, _epilogue.py
    "weights read with the stride of columns": product(
        "safe_feature.to(tl.int64) * weight_row", "safe_feature.to(tl.int64) * columns", LARGE
    ),
    "a column past the end is stored": Fault(
        "_epilogue", "(column < width)", "(column < width + 1)", "quantized_gemm", ("",)
    ),
    "the scale of another group": product("// GROUP", "// (2 * GROUP)", LARGE),
    "a share of the columns begins a block too late": product(
        "begin = share * length", "begin = share * (length + BLOCK_K)", LARGE
    ),
    "few rows: nibbles in the wrong order": Fault(
        "_few", "_dot(q1, a1, part", "_dot(q1, a3, part", "quantized_gemm", ("w4a16",)
    ),
    "few rows: halves of a byte in the wrong order": Fault(
        "_few", "_dot(high, odd,", "_dot(high, even,", "quantized_gemm", ("w4a8", "mxfp4")
    ),
    "few rows: the sums of half the slices": Fault(
        "_few", "sums = first + second", "sums = first", "quantized_gemm", ("",)
    ),
    "few rows: a slice has the scale of the next group": Fault(
        "_few", "* WIDE) // GROUP, groups", "* WIDE) // GROUP + 1, groups", "quantized_gemm", ("w4a16",)
    ),
    "few rows: weights read with the stride of columns": Fault(
        "_few", "* weight_row)", "* columns)", "quantized_gemm", ("w4a16",)
    ),
    "few rows: a share begins a block too late": Fault(
        "_few", "begin = share * length", "begin = share * (length + BLOCK_K)", "quantized_gemm", ("mxfp4, 16 x",)
    ),
    "few rows: columns past the end": Fault(
        "_few", "(column < columns)[None, :]", "(column < columns + 1)[None, :]", "quantized_gemm", ("",)
    ),
    "an adapter's rank read with the column's stride": Fault(
        "lora_gemm", "(r * a_rank)", "(r * a_column)", "lora_gemm", ("",)
    ),
    "a share of the columns of x left out": Fault(
        "lora_gemm", "tl.static_range(SPLIT)", "tl.static_range(SPLIT - 1)", "lora_gemm", ("",)
    ),
    "rows without an adapter, or of one before, are written": Fault(
        "lora_gemm", "own = (mine == adapter)", "own = (mine <= adapter)", "lora_gemm", ("",)
    ),
    "an adapter is passed over": Fault("lora_gemm", "count, ADAPTERS)", "count, ADAPTERS + 1)", "lora_gemm", ("",)),
    "unpacked with the scale of another group": Fault(
        "_dequantize", "* BLOCK_K // GROUP + tl", "* BLOCK_K // GROUP + 1 + tl", "quantized_gemm", (LARGER,)
    ),
    "the second band of tiles is the first": product("band = index // (BAND * tiles_n)", "band = index * 0", LARGER),
    "tiles of features in the order of rows": product("within // height", "within % height", LARGE),
    "every second tile of a program is left out": product(
        "tl.cdiv(features, BLOCK_N), tl.num_programs(0)", "tl.cdiv(features, BLOCK_N), 2 * tl.num_programs(0)", LARGER
    ),
    "the halves of a described tile are exchanged": product(
        "2 * tile * HALF], left", "2 * tile * HALF], right", LARGER
    ),
    "the last share is not added": product("tl.static_range(SPLIT)", "tl.static_range(SPLIT - 1)", LARGE),
    "nibbles in the wrong order": product("_dot(odd, high, _dot(even, low", "_dot(even, high, _dot(odd, low", LARGE),
    "the symmetric zero point is 7": Fault(
        "_codes", "low.to(tl.int8) - 8", "low.to(tl.int8) - 7", "quantized_gemm", ("w4a16",)
    ),
    "gate and value of a pair swapped": Fault(
        "_epilogue",
        "activated(gate, ACTIVATION) * value",
        "activated(value, ACTIVATION) * gate",
        "norm_linear_activation",
        ("swiglu", "geglu"),
    ),
    "the bias of half the features": Fault(
        "_epilogue", "tl.load(bias + feature,", "tl.load(bias + feature // 2,", "norm_linear_activation", ("",)
    ),
}


def main(names):
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT))
    import triton  # noqa: F401  loaded once; each fault has a process of its own, for some read where nothing is

    from llmkernels import testing  # noqa: F401

    told = {}
    forked = multiprocessing.get_context("fork")
    for name in names or FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = forked.Pipe(duplex=False)
            process = forked.Process(target=plant_and_run, args=(FAULTS[name], Path(folder), theirs))
            process.start()
            theirs.close()
            try:
                told[name] = ours.recv() if ours.poll(PATIENCE) else None
            except EOFError:  # it wrote over memory that is not its own
                process.join()
                told[name] = f"crashed with {process.exitcode}" if process.exitcode < 0 else None
            process.kill()
            process.join()
    print(json.dumps(told))


def plant_and_run(fault, folder, pipe):
    import llmkernels.backends as backends

    shutil.copytree(ROOT / "backends" / "triton", folder / "triton")
    plant(fault, folder / "triton")
    backends.__path__.insert(0, str(folder))
    pipe.send(first_failure(fault))


def plant(fault, folder):
    file = folder / f"{fault.file}.py"
    text = file.read_text()
    if fault.old not in text:
        raise ValueError(f"{file.name} no longer has {fault.old!r}: plant the fault elsewhere")
    file.write_text(text.replace(fault.old, fault.new))


def first_failure(fault):
    """What the kit said first, or None."""
    from triton_cases import BYTES

    from llmkernels import testing
    from llmkernels.registry import get

    contract = get(fault.op).contract
    cases = [*contract.cases, *(BYTES if fault.op == "paged_attention" else [])]
    wanted = [case for part in fault.cases for case in cases if part in case.name and not case.raises]
    for case in wanted:
        result = testing.check(contract, fault.dtype, case, "triton")
        if result.verdict == "failed":
            return f"{case.name}: {result.reasons[0].splitlines()[0]}"
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
