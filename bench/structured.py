"""What structured answers cost a token, and how many of 200 schemas they keep: python bench/structured.py

The same requests with and without a structure, on the shipped checkpoint, and the parts alone: filling a mask, applying
it to the logits, compiling.  Every answer that ended is checked with jsonschema.  Writes
bench/results/<device>-structured.json.
"""

import json
import platform
import sys
import time
from pathlib import Path
from statistics import median

import jsonschema
import torch

import llmkernels
from llmkernels.engine import LLM, SamplingParams, Structure
from llmkernels.roofline import device_name
from llmkernels.structured.masks import Masks

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from schemas import REALISTIC, SCHEMAS  # noqa: E402  (beside the tests)

BATCHES, TOKENS, ROUNDS = (1, 16), 64, 5
FREE = Structure(regex="(.|\\n)*")  # allows all text: the price without a shorter answer


def main() -> None:
    torch.set_num_threads(2)
    with llmkernels.use(policy="silent"):
        llm = LLM(prefix_reuse=False)
        record = {"device": device_name("cpu"), "torch": torch.__version__, "python": platform.python_version()}
        record |= {"tokens": [overhead(llm, batch) for batch in BATCHES], "parts": parts(llm), "schemas": kept(llm)}
    print(json.dumps(record, indent=1))
    slug = record["device"].lower().replace(" ", "-").replace("(", "").replace(")", "").replace(",", "")
    (ROOT / "bench" / "results" / f"{slug}-structured.json").write_text(json.dumps(record, indent=1) + "\n")


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
    grammars = llm._grammars
    compiling, filling, forbidding = [], [], []
    for schema, _ in REALISTIC:
        structure = Structure(json_schema=schema)
        start = time.perf_counter()
        grammar = grammars.compiled(structure)
        compiling.append((time.perf_counter() - start) * 1e6)
        guide, logits = grammars.guide(grammar, frozenset()), torch.zeros(1, llm.config.vocab)
        start = time.perf_counter()
        masks = Masks.begin([guide], llm.config.vocab)
        masks._filled.result()
        filling.append((time.perf_counter() - start) * 1e6)
        start = time.perf_counter()
        masks.forbid(logits)
        forbidding.append((time.perf_counter() - start) * 1e6)
    large, bits = torch.randn(32, 131072), torch.randint(-(2**31), 2**31, (32, 4096)).to(torch.int32)
    wide = []
    for _ in range(9):
        masks = Masks([*range(32)], bits, Masks.begin([guide], llm.config.vocab)._filled)
        start = time.perf_counter()
        masks.forbid(large)
        wide.append((time.perf_counter() - start) * 1e6)
    return {
        "compile_us": median(compiling),
        "fill_and_join_us": median(filling),
        "forbid_4096_us": median(forbidding),
        "forbid_32x131072_us": median(wide),
    }


def kept(llm: LLM) -> dict:
    """How many schemas are refused with the name of the keyword, and what became of the others' answers."""
    count = {"schemas": len(SCHEMAS), "refused_by_name": 0, "valid": 0, "cut_at_200_tokens": 0, "invalid": 0}
    for schema, word in SCHEMAS:
        try:
            structure = Structure(json_schema=json.dumps(schema))
        except ValueError as error:
            count["refused_by_name" if word and word in str(error) else "invalid"] += 1
            continue
        output = llm.generate("{", SamplingParams(max_tokens=200, temperature=1.0, seed=1, structure=structure))[0]
        if output.finish_reason != "stop":
            count["cut_at_200_tokens"] += 1
            continue
        right = word is None and jsonschema.Draft202012Validator(schema).is_valid(json.loads(output.text))
        count["valid" if right else "invalid"] += 1
    return count


if __name__ == "__main__":
    main()
