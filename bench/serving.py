"""`llmkernels serve` under load beside llama.cpp and transformers: the same weights, requests, threads, machine.

    python bench/serving.py --quick             the shipped checkpoint, 1 and 16 at once; two minutes
    python bench/serving.py --json FILE         both models, bfloat16 and 4 bits, 1 to 32 at once; some twenty minutes

On a machine that others use too, --rounds 3 asks the engines in turn, three times, and keeps each one's median.
In parts, --model, --weights, --engine and --at say which; rows of a FILE that is there already are kept, but for those
that are measured anew.
Ours is measured as its users have it, over HTTP with streaming, and once more without HTTP.  The peers run without:
llama.cpp's C functions in a continuous batching loop, since the server that llama-cpp-python ships answers one request
at a time, and transformers' continuous batching.  What the ratios say of our server is therefore no flattery.
Every engine is a process of its own, one at a time.  Before anything is timed, all of them must write the same greedy
text from the shipped checkpoint in float32.  `make peers` installs llama.cpp.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmkernels import cache_folder, roofline, status
from llmkernels.bench import serving
from llmkernels.engine import shipped_model

SHIPPED, RANDOM = "manual-5m", "llama-0.5b"
CONTEXT, THREADS, LIMIT = 512, 2, 360  # tokens; threads; seconds for one engine at one concurrency
LLAMA = {  # 0.51 billion parameters
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 64000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
}
# How ours rounds, and what llama.cpp calls the nearest it has; both multiply 4-bit weights with 8-bit activations.
FOUR_BITS = {"quantize": "w4a8_g128", "quantize_head": "w8a16"}
ENGINES = ("llmkernels serve", "llmkernels", "llama.cpp", "transformers")
PLANS = {  # model, weights, at once, requests a client
    "full": [
        (SHIPPED, "bfloat16", (1, 4, 16, 32), 6),
        (SHIPPED, "4 bits", (1, 4, 16, 32), 6),
        (RANDOM, "bfloat16", (1, 4, 16, 32), 2),
        (RANDOM, "4 bits", (1, 4, 16, 32), 2),
    ],
    "quick": [(SHIPPED, "bfloat16", (1, 16), 6)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two minutes")
    parser.add_argument("--model", choices=(SHIPPED, RANDOM), help="only this one")
    parser.add_argument("--weights", choices=("bfloat16", "4 bits"), help="only these")
    parser.add_argument("--engine", choices=ENGINES, help="only this one; the others were found to agree before")
    parser.add_argument("--at", type=int, nargs="+", help="only with so many clients at once")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured, in turn; the median is kept")
    parser.add_argument("--json", type=Path, help="write the report there, or into it")
    options = parser.parse_args()
    os.environ |= {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    start, rows = time.monotonic(), known(options.json)
    if not options.engine:
        check()
    for model, weights, rates, per_client in PLANS["quick" if options.quick else "full"]:
        at = tuple(count for count in rates if not options.at or count in options.at)
        engines = [options.engine] if options.engine else [e for e in ENGINES if runs(e, weights)]
        if not at or options.model not in (None, model) or options.weights not in (None, weights):
            continue
        found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for engine in engines * options.rounds:
            for row in measure(engine, model, weights, at, per_client):
                found.setdefault(key(row), []).append(row)
                show(row, time.monotonic() - start)
                rows[key(row)] = median(found[key(row)])
                if options.json:
                    write(options.json, rows)
    compare([*rows.values()])


def write(report: Path, rows: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    facts = {
        "device": roofline.device_name(),
        "threads": THREADS,
        "versions": status.versions(),
        "command": "python bench/serving.py --json FILE, whole or in parts",
        "recorded": time.strftime("%Y-%m-%d"),
    }
    text = ",\n".join(json.dumps(rows[name]) for name in sorted(rows))
    report.write_text(json.dumps(facts)[:-1] + ', "rows": [\n' + text + "\n]}\n")


def known(report: Path | None) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows of a report that is there."""
    rows = json.loads(report.read_text())["rows"] if report and report.exists() else []
    return {key(row): row for row in rows}


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The middle one by tokens a second, with those of all."""
    ordered = sorted(rows, key=lambda row: row["total_tokens_per_second"])
    return ordered[len(rows) // 2] | {"rounds": [row["total_tokens_per_second"] for row in rows]}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["weights"], row["concurrency"], ENGINES.index(row["engine"])


def runs(engine: str, weights: str) -> bool:
    return engine != "transformers" or weights != "4 bits"


def folder() -> Path:
    place = cache_folder.folder() / "serving"
    place.mkdir(mode=0o700, exist_ok=True)
    return place


def checkpoint(model: str) -> Path:
    path = shipped_model(SHIPPED) if model == SHIPPED else folder() / model
    if not (path / "config.json").exists():
        say(f"writing {model}")
        random_checkpoint(path)
    return path


def random_checkpoint(path: Path) -> None:
    """LLAMA with normal weights of the usual size, the same ones every time, and a tokenizer of a word a token."""
    path.mkdir(exist_ok=True)
    source = torch.Generator().manual_seed(0)
    hidden, inner = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    queries, keys = (LLAMA[n] * LLAMA["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=source)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": normal(LLAMA["vocab_size"], hidden), "model.norm.weight": ones}
    for at in (f"model.layers.{layer}." for layer in range(LLAMA["num_hidden_layers"])):
        tensors |= {f"{at}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        tensors |= {f"{at}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(LLAMA["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    words.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps(LLAMA))  # last: what has it is whole


def gguf(model: str, kind: str) -> Path:
    """The same weights as llama.cpp reads them: float32, bf16 or q4_0."""
    import llama_cpp_peer

    whole, target = folder() / f"{model}.gguf", folder() / f"{model}-{kind}.gguf"
    target = whole if kind == "float32" else target
    if not target.exists():
        say(f"converting {model} to {kind}")
        if not whole.exists():
            llama_cpp_peer.convert(checkpoint(model), whole)
        if target != whole:
            llama_cpp_peer.quantize(whole, target, kind, THREADS)
    return target


def work(model: str, weights: str, rates: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = {"float32": "float32", "bfloat16": "bf16", "4 bits": "q4_0"}
    return {
        "checkpoint": str(checkpoint(model)),
        "gguf": str(gguf(model, kinds[weights])),
        "kind": weights,
        "threads": THREADS,
        "context": CONTEXT,
        "ours": FOUR_BITS if weights == "4 bits" else {"dtype": weights},
        "rates": rates,
    }


def vocabulary(model: str) -> int:
    return 1000 if model == SHIPPED else LLAMA["vocab_size"]


def requests(model: str, concurrency: int, per_client: int) -> list[Any]:
    asked = serving.workload(serving.most(concurrency, per_client), vocabulary(model), concurrency)
    return [[one.prompt, one.max_tokens] for one in asked]


def check() -> None:
    """The same greedy text from all of them, several requests at once, in float32: or there is nothing to compare."""
    say("checking that all engines write the same text")
    task = work(SHIPPED, "float32", [{"concurrency": 4, "requests": requests(SHIPPED, 4, 2)}])
    told = {engine: next(run(engine, task))["answers"] for engine in ("llmkernels", "llama.cpp", "transformers")}
    for engine, answers in told.items():
        if answers != told["llmkernels"]:
            raise SystemExit(f"{engine} and llmkernels disagree on {SHIPPED} in float32; nothing was timed")


def measure(
    engine: str, model: str, weights: str, concurrency: tuple[int, ...], per_client: int
) -> Iterator[dict[str, Any]]:
    facts = {"model": model, "weights": weights, "engine": engine}
    say(f"{model}, {weights}: {engine}")
    if engine == "llmkernels serve":
        flags = ["--dtype", weights]
        if weights == "4 bits":
            flags = ["--quantize", FOUR_BITS["quantize"], "--quantize-head", FOUR_BITS["quantize_head"]]
        flags += ["--device", "cpu", "--max-length", str(CONTEXT)]
        with serving.started(str(checkpoint(model)), *flags) as url:
            for row in serving.measure(
                url, concurrency, vocab=vocabulary(model), per_client=per_client, seen=lambda *at: say(f"{model}: {at}")
            ):
                yield facts | row
        return
    rates = [{"concurrency": count, "requests": requests(model, count, per_client)} for count in concurrency]
    for row in run(engine, work(model, weights, rates)):
        del row["answers"]
        yield facts | row


def run(engine: str, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What serving_peers.py says of an engine, as it comes; SystemExit where it fails, or takes longer than LIMIT."""
    program = [sys.executable, str(Path(__file__).with_name("serving_peers.py")), engine]
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        watch = threading.Timer(limit := LIMIT * len(task["rates"]), process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps(task))
            process.stdin.close()
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
            code, late = process.wait(), not watch.is_alive()
        finally:
            watch.cancel()
            process.kill()
        if late:
            raise SystemExit(f"{engine} was stopped after {limit} s; --at and --engine measure less at a time")
        if code:
            errors.seek(0)
            raise SystemExit(f"{engine} failed: {errors.read().strip().splitlines()[-1:]}")


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def show(row: dict[str, Any], passed: float) -> None:
    say("")
    first, between = row["first_token_ms"], row["between_tokens_ms"]
    print(
        f"{passed:4.0f} s  {row['model']:10} {row['weights']:8} {row['engine']:16} {row['concurrency']:3} at once"
        f"  {row['total_tokens_per_second']:8.0f} tokens/s, {row['answer_tokens_per_second']:7.0f} of answers"
        f"  first {first['p50']:6.0f} {first['p99']:6.0f} ms  between {between['p50']:6.1f} {between['p99']:6.1f} ms",
        flush=True,
    )


def compare(rows: list[dict[str, Any]]) -> None:
    """Our rate over each peer's, total tokens a second."""
    rates = {
        (row["model"], row["weights"], row["concurrency"], row["engine"]): row["total_tokens_per_second"]
        for row in rows
    }
    for model, weights, count, engine in rates:
        if engine == "llmkernels serve":
            peers = {
                peer: rates[model, weights, count, engine] / rates[model, weights, count, peer]
                for peer in ("llama.cpp", "transformers")
                if (model, weights, count, peer) in rates
            }
            words = ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in peers.items())
            print(f"{model}, {weights}, {count} at once: llmkernels serve has {words}")


if __name__ == "__main__":
    main()
