"""Tokens a second of the engine beside llama.cpp: the same shapes, the same threads, one sequence, greedy.

    python bench/engine.py --prepare            the files: a random model of 1B, both models as GGUF; minutes, 7 GB
    python bench/engine.py --json FILE          every model and way of rounding it, on as many threads as torch takes
    python bench/engine.py --model llama-1b --only w4a8_g128 q4_0

Prefill is a prompt of 512 tokens in one pass until the first token is there; decode the 64 tokens after a prompt of 16.
The best of some rounds counts, the engines taking turns.  Before anything is timed, both must write the same greedy
text from the shipped checkpoint in float32.  `make peers` installs llama.cpp.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does, before torch reads it

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from safetensors.torch import save_file

from llmkernels import cache_folder, roofline, status
from llmkernels.engine import LLM, SamplingParams, shipped_model

PREFILL, PROMPT, DECODE, CHECKED = 512, 16, 64, 24  # tokens
ROUNDS = 5
SHIPPED, RANDOM = "manual-5m", "llama-1b"
# llama.cpp keeps the head at 6 bits, which we do not have: 8 are more to read, 4 fewer.  "_head4" has 4 on both sides.
# Of the 1B model q4_0 reads 763 MB a token, w4a8_g128 765, and with heads of 4 bits 695 and 637.  On the shipped
# checkpoint 8 cost 0.001 of 4.14 nats a token, with activations at 8 bits too, and 4 in groups of 32 cost 0.023.
OURS = {
    "bfloat16": {"dtype": "bfloat16"},
    **{s: {"quantize": s, "quantize_head": "w8a16"} for s in ("w4a16_g32", "w4a16_g128")},
    **{s: {"quantize": s, "quantize_head": "w8a8"} for s in ("w4a8_g32", "w4a8_g128")},
    **{f"{s}_head4": {"quantize": s, "quantize_head": s} for s in ("w4a8_g32", "w4a8_g128")},
}
THEIRS = ("q4_0", "q4_K_M", "q4_0_head4")
LLAMA_1B = {  # Llama 3.2 1B without its stretched rotary angles, which change no shape
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prepare", action="store_true", help="write the files into the cache folder and stop")
    parser.add_argument("--model", choices=(SHIPPED, RANDOM), help="only this one")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *THEIRS), help="only these ways of rounding")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the best of so many counts")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    options = parser.parse_args()
    models = [options.model] if options.model else [SHIPPED, RANDOM]
    if options.prepare:
        for model in models:
            prepare(model)
        return
    check()
    rows = [row for model in models for row in measure(model, options.only or (*OURS, *THEIRS), options.rounds)]
    if options.json:
        keep(options.json, rows)


def folder() -> Path:
    return cache_folder.folder() / "engine"


def checkpoint(model: str) -> Path:
    return shipped_model(SHIPPED) if model == SHIPPED else folder() / model


def prepare(model: str) -> None:
    """Write what is missing: the random checkpoint, its GGUF in float32 and rounded."""
    import llama_cpp_peer

    folder().mkdir(mode=0o700, exist_ok=True)
    if not (checkpoint(model) / "config.json").exists():
        random_checkpoint(checkpoint(model))
    whole = folder() / f"{model}.gguf"
    for kind in THEIRS:
        target = folder() / f"{model}-{kind}.gguf"
        if not whole.exists() and (model == SHIPPED or not target.exists()):
            llama_cpp_peer.convert(checkpoint(model), whole)
        if not target.exists():
            llama_cpp_peer.quantize(whole, target, kind, torch.get_num_threads())
    if model != SHIPPED:
        whole.unlink(missing_ok=True)  # 6 GB that nothing reads any more


def random_checkpoint(path: Path) -> None:
    """LLAMA_1B with normal weights of the usual size, the same ones every time."""
    path.mkdir(exist_ok=True)
    source = torch.Generator().manual_seed(0)
    hidden, inner = LLAMA_1B["hidden_size"], LLAMA_1B["intermediate_size"]
    queries, keys = (LLAMA_1B[n] * LLAMA_1B["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=source)

    tensors = {"model.embed_tokens.weight": normal(LLAMA_1B["vocab_size"], hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(LLAMA_1B["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
            ("self_attn.o_proj", (hidden, queries)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            tensors[f"{at}{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(LLAMA_1B))  # last: what has it is whole


def engine(model: str, **options: Any) -> Callable[[list[int]], Iterator[int]]:
    """Greedy tokens without an end, from our engine."""
    llm = LLM(
        checkpoint(model),
        tokenizer=False,
        device="cpu",
        max_batch_tokens=PREFILL,
        max_length=2 * PREFILL,
        prefix_reuse=False,  # or only the first round would compute the prompt
        **options,
    )

    def generate(prompt: list[int]) -> Iterator[int]:
        (output,) = llm.add(prompt, SamplingParams(max_tokens=PREFILL, ignore_eos=True))
        try:
            while True:
                llm.step()
                yield output.tokens[-1]
        finally:
            llm.abort(output)

    return generate


def llama_cpp(model: str, kind: str = "") -> Callable[[list[int]], Iterator[int]]:
    import llama_cpp_peer  # here, so that what needs no llama.cpp can be imported without it

    file = folder() / f"{model}{'-' * bool(kind)}{kind}.gguf"
    if not file.exists():
        raise SystemExit(f"{file} is missing; run python bench/engine.py --prepare first")
    return llama_cpp_peer.Model(file, torch.get_num_threads(), 2 * PREFILL, PREFILL).generate


def check() -> None:
    """The same text from both, in float32: otherwise there is nothing to compare."""
    tokens = [take(run(ids(PROMPT)), CHECKED) for run in (engine(SHIPPED, dtype="float32"), llama_cpp(SHIPPED))]
    if tokens[0] != tokens[1]:
        raise SystemExit(f"the engines disagree on {SHIPPED} in float32: {tokens[0]} and {tokens[1]}")


def measure(model: str, kinds: tuple[str, ...], rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of tokens a second, printed as they are known."""
    runs = {("llmkernels", kind): engine(model, **OURS[kind]) for kind in kinds if kind in OURS}
    runs |= {("llama.cpp", kind): llama_cpp(model, kind) for kind in kinds if kind in THEIRS}
    best = dict.fromkeys(runs, (0.0, 0.0))
    for _ in range(rounds):
        for key, run in runs.items():
            best[key] = tuple(map(max, best[key], speeds(run)))  # type: ignore[assignment]
    for (who, kind), (prefill, decode) in best.items():
        print(
            f"{model:10} {who:10} {kind:11} prefill {prefill:8.1f}  decode {decode:7.1f}  tokens a second", flush=True
        )
        yield {
            "model": model,
            "engine": who,
            "weights": kind,
            "threads": torch.get_num_threads(),
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
            "recorded": time.strftime("%Y-%m-%d"),
        }


def speeds(run: Callable[[list[int]], Iterator[int]]) -> tuple[float, float]:
    """(prefill, decode) in tokens a second."""
    start = time.perf_counter()
    take(run(ids(PREFILL)), 1)
    prefill = PREFILL / (time.perf_counter() - start)
    going = run(ids(PROMPT))
    next(going)
    start = time.perf_counter()
    take(going, DECODE)
    return prefill, DECODE / (time.perf_counter() - start)


def take(tokens: Iterator[int], count: int) -> list[int]:
    return [next(tokens) for _ in range(count)]


def ids(count: int) -> list[int]:
    """Token ids that both models have, and that are no special ones."""
    return [10 + 7 * i % 4000 for i in range(count)]


def keep(file: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a file; each replaces an older one of the same model, engine, weights and number of threads."""
    key = ("model", "engine", "weights", "threads")
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    merged = {tuple(row[name] for name in key): row for row in (*known, *rows)}
    facts = {"device": roofline.device_name(), "versions": status.versions()}
    text = ",\n".join(json.dumps(merged[k]) for k in sorted(merged))
    file.write_text(json.dumps(facts)[:-1] + ', "rows": [\n' + text + "\n]}\n")


if __name__ == "__main__":
    main()
