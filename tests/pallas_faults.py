"""Mistakes planted in the sources of the Pallas kernels, and whether interpreted calls notice each one.

    python tests/pallas_faults.py [NAME ...]      one JSON object: name -> what was noticed, null where nothing was

Each fault copies backends/xla, changes a line, and runs small calls until one is wrong: those of pallas_calls.py in
both modes of the interpreter, or cases of a contract, "op, dtype, part of their names".  Each has its own process and
time limit: a copy that nobody starts is waited for without end.  That counts as not noticed, since a slow machine looks
the same.  "like CHIP: SCHEME" is a product of many rows, one of them with NaN, as it would run on that chip.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 120  # seconds
MANY_ROWS = {"rows": 520, "out": 1100, "in_": 1300, "x_special": "NaN", "input_scale": 0.25}


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in a file; without `old` the block table names a page that does not exist."""

    calls: tuple[str, ...]
    old: str = ""
    new: str = ""
    file: str = "_attention.py"


FAULTS = {
    "no wait for a copy": Fault(("decode",), "await_pages(block, not edge)", "pass"),
    "no wait for whole blocks": Fault(
        ("decode",), "if full:", "if full:\n                continue\n            if False:"
    ),
    "a copy into the buffer that is read": Fault(
        ("decode",), "k_buffer.at[buffer, i], arrived", "k_buffer.at[1 - buffer, i], arrived"
    ),
    "every copy into one buffer": Fault(("decode",), "lax.rem(number + block, 2)", "0 * (number + block)"),
    "a page that does not exist": Fault(("decode",)),
    "values at the edge are not cleared": Fault(("decode",), "            clear(", "            _ignore("),
    "the scale of the first head": Fault(("int8 cache",), "scales[head] * factor", "scales[0] * factor"),
    "the scale of keys for values": Fault(("int8 cache",), "scales[kv_heads + head]", "scales[head]"),
    "the window holds a key too few": Fault(("window",), "own - options.window[0])", "own - options.window[0] + 1)"),
    "a key of the future": Fault(("mixed",), "end = jnp.minimum(end, own + 1)", "end = jnp.minimum(end, own + 2)"),
    "a block that leaves the window of some rows is not masked": Fault(
        ("window",), "begin >= position + live - 1 - options.window[0]", "begin >= position - options.window[0]"
    ),
    "a block of the future of some rows is not masked": Fault(
        ("window",), "end <= position + 1\n", "end <= position + live\n"
    ),
    "the sum is not rescaled": Fault(("decode",), "total[held, part] = shrink * total", "total[held, part] = total"),
    "a token is put before its page is there": Fault(
        ("a step that writes",),
        """        await_pages(block, not edge)
        if options.writes:
            pl.when(block + 1 == blocks)(lambda: write_token(buffer, block))
""",
        """        if options.writes:
            pl.when(block + 1 == blocks)(lambda: write_token(buffer, block))
        await_pages(block, not edge)
""",
    ),
    "no wait for the page that is written": Fault(
        ("a step that writes",), "pltpu.make_async_copy(stage, stage, stored).wait()", "pass"
    ),
    "write_kv waits for no tile": Fault(
        ("write_kv, bfloat16, some tokens",), "        fetch(run, end)\n", "", "write_kv.py"
    ),
    "write_kv forgets the other slots of a word": Fault(
        ("write_kv, bfloat16, some tokens",), "(words & kept) | new", "new", "_slots.py"
    ),
    "write_kv takes a tile before it was written": Fault(
        ("write_kv, bfloat16, a full cache",), "jnp.diff(slots // height) != 0", "slots[1:] >= 0", "write_kv.py"
    ),
    "one scale for two groups": Fault(
        ("quantize_activation, float32, int8, 5 x 2048, group 64",),
        "lane == first + i",
        "lane == first",
        "quantize_activation.py",
    ),
    "columns left over are not summed": Fault(
        ("rms_norm, float32, rows=7-hidden=1000-residual=False",),
        "join(found, rest)",
        "found",
        "_rows.py",
    ),
    "pairs are turned the other way": Fault(
        ("rotary_embedding, float32, some tokens",), "(1, -1)", "(1, 1)", "rotary_embedding.py"
    ),
    "the adapter of another tile": Fault(
        ("lora_gemm, float32, some rows",), "(used[t], j, 0)", "(used[0], j, 0)", "lora_gemm.py"
    ),
    "the last columns are left out": Fault(
        ("lora_gemm, float32, 16 x 512",), "pl.loop(0, size // piece)", "pl.loop(0, size // piece - 1)", "lora_gemm.py"
    ),
    "many rows: the scales of the first groups": Fault(
        ("quantized_gemm, bfloat16, w4a16_g128, batch",),
        "lane_taken(numbers, group + at * columns // kind.group)",
        "lane_taken(numbers, group)",
        "_stored.py",
    ),
    "few rows: the scales of other features": Fault(
        ("quantized_gemm, bfloat16, w4a16_g128, 17 x",), "_parted(own) if bits else own", "own", "_nibbles.py"
    ),
    "few rows: all groups of a pair have the scales of one": Fault(
        ("quantized_gemm, bfloat16, w4a16_g128, 17 x",), "at // kind.group + i", "at // kind.group", "_nibbles.py"
    ),
    "few rows: all columns are less by the sums of the first": Fault(
        ("quantized_gemm, bfloat16, w4a16_g128, 16 x 256 x 1024",), "at // blocks.run * LANES", "0", "_nibbles.py"
    ),
    "rounded rows: each has the reciprocal of the first": Fault(
        ("like v5e: w8a8",), "zip(strips, factors, strict=True)", "zip(strips, [factors[0]] * len(strips))", "_bytes.py"
    ),
    "rounded rows: one that is not finite has a scale": Fault(
        ("like v5e: w8a8_static",), "jnp.where(peak < jnp.inf, scale, jnp.nan)", "scale", "_bytes.py"
    ),
    "rows are rounded by the reciprocals of others": Fault(
        ("like v6e: w8a8",), "* factors[strip]", "* factors[pl.ds(0, STRIP)]", "_w8a8.py"
    ),
    "the second half of a run is not rounded": Fault(
        ("like v6e: w8a8",), "round_run(runs[turn], first, half)", "round_run(runs[turn], 0, half)", "_w8a8.py"
    ),
    "a run is multiplied before it is rounded": Fault(
        ("like v7x: w8a8",), "                round_run(at + RUN, 0, rows)", "                pass", "_w8a8.py"
    ),
    "pieces behind meet the run of the first": Fault(
        ("like v6e: w8a8",),
        "(first, turn - i) for i, first",
        "(first, min(turn, len(runs) - 1)) for i, first",
        "_w8a8.py",
    ),
    "x is multiplied in the order of a run before": Fault(
        ("like v6e: w4a16",), "kept[at // RUN][...]", "kept[max(0, at // RUN - 1)][...]", "_ordered.py"
    ),
    "only the first run is put into order": Fault(("like v6e: w4a16",), "order(at + RUN)", "order(at)", "_ordered.py"),
    "the first rows of a run are put into order again and again": Fault(
        ("like v6e: w4a16",), "pl.ds(first, STRIP), pl", "pl.ds(0, STRIP), pl", "_ordered.py"
    ),
    "zero points of the group before": Fault(
        ("quantized_gemm, float32, w4a16_g128_zp, 17 x",),
        "taken = column(numbers, group)",
        "taken = column(numbers, 0)",
        "_stored.py",
    ),
}


def main(names):
    told = {}
    for name in names or FAULTS:
        fault = FAULTS[name]
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(ROOT / "backends" / "xla", Path(folder) / "xla")
            plant(fault, Path(folder) / "xla" / "tpu" / fault.file)
            program = [sys.executable, __file__, "--run", folder, json.dumps(fault.calls), "" if fault.old else "page"]
            try:
                done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE, check=False)
            except subprocess.TimeoutExpired:
                told[name] = None
                continue
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        told[name] = json.loads(done.stdout.splitlines()[-1])  # the interpreter tells of races above it
    print(json.dumps(told))


def plant(fault, file):
    text = file.read_text()
    if fault.old not in text:
        raise ValueError(f"{file.name} no longer has {fault.old!r}: plant the fault elsewhere")
    text = text.replace(fault.old, fault.new) if fault.old else text
    file.write_text(text + "\n\ndef _ignore(*_):\n    pass\n")


def run(folder, calls, page):
    """What is wrong with the first call that is, or None."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import llmkernels.backends as backends

    backends.__path__.insert(0, folder)
    from pallas_calls import MODES, complaint, product_like

    from llmkernels import testing

    for name in calls:
        if name.startswith("like "):
            like, scheme = name.removeprefix("like ").split(": ")
            result = product_like(like, "quantized_gemm", scheme, MANY_ROWS)
            found = [str(result)] if result.verdict == "failed" else []
        elif "," in name:
            found = [
                str(r) for r in testing.conform("xla", *name.split(", ", 2), emulate=True) if r.verdict == "failed"
            ]
        else:
            found = [complaint(name, mode, 999 if page else None) for mode in MODES]
        if what := next(filter(None, found), None):
            return what
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(run(sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])))
    else:
        main(sys.argv[1:])
