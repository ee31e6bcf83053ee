"""What structured answers cost a token, and how many of 200 schemas they keep: python bench/structured.py [--json FILE]

The same requests with and without a structure, on the shipped checkpoint; each of the schemas, beside as many free
tokens; and the parts alone: filling a mask, applying it to the logits, compiling.  Every answer that ended is checked
with jsonschema.  Without --json it writes bench/results/<device>-structured.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import jsonschema
import numpy as np
import torch

import llmkernels
from llmkernels import roofline, status
from llmkernels.bench import results
from llmkernels.engine import LLM, Output, SamplingParams, Structure
from llmkernels.structured.grammar import Grammars
from llmkernels.structured.masks import Masks, forbid

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from schemas import REALISTIC, SCHEMAS  # noqa: E402  (beside the tests)

BATCHES, TOKENS, ROUNDS = (1, 16), 64, 5
FREE = Structure(regex="(.|\\n)*")  # allows all text: the price without a shorter answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    torch.set_num_threads(2)
    device = roofline.device_name("cpu")
    with llmkernels.use(policy="silent"):
        llm = LLM(device="cpu", prefix_reuse=False)
        record = {"device": device, "command": "python bench/structured.py", "versions": status.versions()}
        record |= {"tokens": [overhead(llm, batch) for batch in BATCHES], "parts": parts(llm), "schemas": kept(llm)}
    print(json.dumps(record, indent=1))
    if options.json is None and (place := results.place(device)):
        options.json = place.with_name(f"{place.stem}-structured.json")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def overhead(llm: LLM, batch: int) -> dict:
    """Microseconds a step, free and under a grammar that allows all text."""
    times: dict[str, list[float]] = {"free": [], "bound": []}
    for _ in range(ROUNDS):
        for name, structure in (("free", None), ("bound", FREE)):
            params = SamplingParams(max_tokens=TOKENS, structure=structure, temperature=0.8, seed=1)
            start = time.perf_counter()
            outputs = llm.generate([[5, 6, 7, 8]] * batch, params)
            steps = max(len(output.tokens) for output in outputs)
            times[name].append((time.perf_counter() - start) / steps * 1e6)
    free, bound = median(times["free"]), median(times["bound"])
    return {"batch": batch, "free_us": free, "bound_us": bound, "overhead_us_a_token": (bound - free) / batch}


def parts(llm: LLM) -> dict:
    """Microseconds of each part alone, on the realistic schemas."""
    stop, vocab = frozenset([1]), llm.config.vocab  # the shipped tokenizer's end of text
    grammars = Grammars(llm.tokenizer, vocab, stop)
    compiling, filling, forbidding = [], [], []
    for schema, _ in REALISTIC:
        structure = Structure(json_schema=schema)
        start = time.perf_counter()
        grammar = grammars.compiled(structure)
        compiling.append((time.perf_counter() - start) * 1e6)
        guide, logits = grammars.guide(grammar, stop), torch.zeros(1, vocab)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            masks = Masks.begin([guide], vocab)
            masks.wait()
            filling.append((time.perf_counter() - start) * 1e6)
            start = time.perf_counter()
            masks.forbid(logits)
            forbidding.append((time.perf_counter() - start) * 1e6)
    grammars.close()
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, (2, 32, 4096), dtype=np.int32)  # a large vocabulary's
    large, times = torch.randn(32, 131072), []
    for _ in range(9):
        start = time.perf_counter()
        forbid(large, range(32), bits[0] & bits[1])  # of a grammar, and of UTF-8
        times.append((time.perf_counter() - start) * 1e6)
    return {
        "compile_us": median(compiling),
        "fill_and_join_us": median(filling),
        "forbid_4096_us": median(forbidding),
        "forbid_32x131072_us": median(times),
    }


def kept(llm: LLM) -> dict:
    """How many schemas are refused with the name of the keyword, what became of the others' answers, and what a token
    of those cost beside one of a free answer of the same length, compiling left out."""
    count = {"schemas": len(SCHEMAS), "refused_by_name": 0, "valid": 0, "cut_at_200_tokens": 0, "invalid": 0}
    tokens, seconds = 0, {"bound": 0.0, "free": 0.0}
    for schema, word in SCHEMAS:
        try:
            structure = Structure(json_schema=json.dumps(schema))
        except ValueError as error:
            count["refused_by_name" if word and word in str(error) else "invalid"] += 1
            continue
        wish = SamplingParams(max_tokens=200, temperature=1.0, seed=1, structure=structure)
        grammar = llm.prepare(wish)
        output, seconds["bound"] = timed(llm, wish, seconds["bound"])
        del grammar
        tokens += len(output.tokens)
        free = SamplingParams(max_tokens=len(output.tokens), temperature=1.0, seed=1, ignore_eos=True)
        _, seconds["free"] = timed(llm, free, seconds["free"])
        if output.finish_reason != "stop":
            count["cut_at_200_tokens"] += 1
            continue
        right = word is None and jsonschema.Draft202012Validator(schema).is_valid(json.loads(output.text))
        count["valid" if right else "invalid"] += 1
    each = {f"{name}_us_a_token": round(total / tokens * 1e6, 1) for name, total in seconds.items()}
    return count | {"tokens": tokens, **each}


def timed(llm: LLM, wish: SamplingParams, before: float) -> tuple[Output, float]:
    """The answer, and the seconds so far with those that it took."""
    start = time.perf_counter()
    (output,) = llm.generate("{", wish)
    return output, before + time.perf_counter() - start


if __name__ == "__main__":
    main()
