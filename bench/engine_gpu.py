"""Tokens a second of the engine on a GPU, its decode steps as CUDA graphs, with torch.compile, and neither: the same
text, or no number and exit code 1.

    python bench/engine_gpu.py --json FILE      written anew after each kind, so that what ran is kept
    python bench/engine_gpu.py --read           instead, milliseconds to read a prompt of so many tokens: recorded up
                                                to 64 tokens, to 256, and not at all; how many first tokens are equal

The shipped checkpoint, and random weights of Llama 3.2 1B's shape (written into the cache folder on the first run).
Decode is 128 tokens after prompts of 96, greedy, for 1 and 16 sequences at once; the best of some rounds counts.  All
prompts are read in one step, too long for a graph, since steps that are filled up are equal up to roundoff only.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine import RANDOM, SHIPPED, checkpoint, folder, random_checkpoint

from llmkernels import ledger, roofline, status, use
from llmkernels.engine import LLM, SamplingParams

PROMPT, DECODE, ROUNDS = 96, 128, 3
KINDS = {
    SHIPPED: ({"dtype": "float32"}, {"dtype": "bfloat16"}),
    RANDOM: ({"dtype": "bfloat16"}, {"quantize": "w4a16_g128"}),
}
SEQUENCES = (1, 16)
MODES = ({"graphs": 64}, {"graphs": 64, "compile": True}, {"graphs": False})
READ = (8, 32, 64, 65, 96, 128, 192, 256, 257)  # tokens of a prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="triton", help="which must answer every call")
    parser.add_argument("--model", choices=tuple(KINDS), help="only this one")
    parser.add_argument("--read", action="store_true", help="prompts instead of decoding")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here")
    rows, differ = [], []
    for model in [options.model] if options.model else KINDS:
        for kind, sequences in itertools.product(KINDS[model], (1,) if options.read else SEQUENCES):
            try:
                found = (read if options.read else measure)(model, kind, sequences, options.backend)
            except Differ as error:
                differ.append(str(error))
                print(error, flush=True)
                continue
            rows += found
            print(*map(json.dumps, found), sep="\n", flush=True)
            if options.json:
                facts = {"device": roofline.device_name("cuda"), "versions": status.versions(), "rows": rows}
                options.json.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(len(differ) > 0)


class Differ(Exception):
    """Two ways to run the same model wrote different texts."""


def measure(model: str, kind: dict, sequences: int, backend: str) -> list[dict]:
    """A row for each of MODES.  Differ where their texts do."""
    write_checkpoint(model)
    rows, texts = [], []
    for mode in MODES:
        with use(backend, policy="strict"):
            found, text = decode(model, kind | mode, sequences)
        rows.append({"model": model, **kind, "sequences": sequences, **mode, "backend": backend, **found})
        texts.append(text)
        if text != texts[0]:
            raise Differ(f"{model} {kind}, {sequences} sequences: {mode} writes another text than {MODES[0]}")
    return rows


def write_checkpoint(model: str) -> None:
    """If it is not there."""
    if model == RANDOM and not (checkpoint(model) / "config.json").exists():
        folder().mkdir(mode=0o700, exist_ok=True)
        random_checkpoint(checkpoint(model))


def read(model: str, kind: dict, sequences: int, backend: str) -> list[dict]:
    """A row for each way to record: the median milliseconds of prompts of READ tokens, and the memory that it takes."""
    write_checkpoint(model)
    rows, first = [], []
    for graphs in (64, 256, False):
        llm = None
        gc.collect()  # of the LLM before
        torch.cuda.empty_cache()
        with use(backend, policy="strict"):
            llm = LLM(checkpoint(model), tokenizer=False, device="cuda", prefix_reuse=False, graphs=graphs, **kind)
            before, milliseconds, tokens = torch.cuda.memory_reserved(), {}, []
            for count in READ:
                prompts = [[3 + 7 * i % 900 for i in range(count)]] * sequences
                times = []
                for _ in range(4 + 20):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True))
                    times.append(time.perf_counter() - start)
                milliseconds[count] = round(1e3 * statistics.median(times[4:]), 3)
                tokens.append(outputs[0].tokens)
        first.append(tokens)
        more = (torch.cuda.memory_reserved() - before) >> 20
        found = {"ms": milliseconds, "more_mib": more, "first_tokens_equal": sum(map(list.__eq__, tokens, first[0]))}
        rows.append({"model": model, **kind, "graphs": graphs, "backend": backend, **found})
    return rows


def decode(model: str, kind: dict, sequences: int) -> tuple[dict, list[list[int]]]:
    """(tokens a second of decoding, and of everything, of all sequences together; steps), and what was written."""
    told = {"max_length": 512, "prefix_reuse": False, "max_batch_tokens": sequences * PROMPT}
    llm = LLM(checkpoint(model), tokenizer=False, device="cuda", **told, **kind)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, llm.config.vocab, (sequences, PROMPT), generator=generator).tolist()

    def run(tokens: int) -> tuple[float, list[list[int]]]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
        return time.perf_counter() - start, [list(output.tokens) for output in outputs]

    run(DECODE), run(DECODE)  # compiles, packs, records
    ledger.reset()
    first = min(run(1)[0] for _ in range(ROUNDS))
    whole, text = min((run(DECODE) for _ in range(ROUNDS)), key=lambda pair: pair[0])
    stats = llm.stats()
    found = {
        "decode_tokens_per_second": round(sequences * (DECODE - 1) / (whole - first), 1),
        "milliseconds_per_step": round(1e3 * (whole - first) / (DECODE - 1), 3),
        "replayed_steps": stats["decode_replayed_steps"],
        "plain_steps": stats["decode_plain_steps"],
    }
    return found, text


if __name__ == "__main__":
    main()
