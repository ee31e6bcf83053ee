"""Speculative decoding on documentation: tokens a forward pass of the model, guesses that came true, tokens a second.

    python bench/speculation.py --json FILE

The shipped checkpoint and its draft model, float32, one request at a time, greedy and sampled.  Every way of guessing
must write the very tokens that plain decoding writes, or nothing is recorded.  Tokens a forward are those that steps
with guesses brought, over their number: the first token of an answer comes from the prompt and is not counted.  Greedy,
a model of this size soon repeats itself, where n-grams guess all; so the first 16 tokens are also told by themselves.
Plain decoding is timed again right before each way, and `speedup` is over that: the machine's speed changes in between.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from llmkernels import roofline, status
from llmkernels.engine import LLM, SamplingParams, Speculation, shipped_model

DRAFT = shipped_model("manual-5m-draft")
WAYS = {
    "n-grams, k=4": Speculation(ngram=3),
    "draft, k=4": Speculation(draft=DRAFT),
    "draft, k=4, surer than 0.3": Speculation(draft=DRAFT, confidence=0.3),
    "draft tree, k=4 x 3": Speculation(draft=DRAFT, width=3),
    "n-grams, else draft, k=4": Speculation(draft=DRAFT, ngram=3),
    "tree of both, k=4 x 3": Speculation(draft=DRAFT, ngram=3, width=3),
}
PROMPTS = [
    "The read() system call attempts to read up to count bytes from file descriptor fd into the buffer starting at",
    "DESCRIPTION\n       ls lists information about the files in the current directory by default. Sort entries",
    "A package must not depend on a package of lower priority. The maintainer scripts of a package should",
    "The following example shows how to use the re module: import re\n\n>>> pattern = re.compile(",
    "RETURN VALUE\n       On success, zero is returned.  On error, -1 is returned, and errno is set to indicate",
    "To configure the network interface at boot time, edit the file /etc/network/interfaces and",
    "class datetime.date\n\nAn idealized naive date, assuming the current Gregorian calendar always was, and",
    "The init process is the first process of the system. It is started by the kernel after the root file",
]
WISHES = {
    "greedy, 16 tokens": SamplingParams(max_tokens=17, ignore_eos=True),
    "greedy, 96 tokens": SamplingParams(max_tokens=97, ignore_eos=True),
    "temperature 0.7, top-p 0.95, 96 tokens": SamplingParams(
        max_tokens=97, ignore_eos=True, temperature=0.7, top_p=0.95, seed=1
    ),
}


def measure(llm: LLM, wish: SamplingParams) -> tuple[list[list[int]], dict[str, float]]:
    """The tokens of every answer, and the row."""
    texts, steps, seconds, before = [], 0, 0.0, llm.stats()
    for prompt in PROMPTS:
        (output,) = llm.add(prompt, wish)
        while not output.tokens:
            llm.step()
        start = time.perf_counter()
        while output.finish_reason is None:
            llm.step()
            steps += 1
        seconds += time.perf_counter() - start
        texts.append(output.tokens)
    tokens = sum(len(text) - 1 for text in texts)
    row = {"tokens_per_forward": round(tokens / steps, 3), "tokens_per_second": round(tokens / seconds, 1)}
    guessed, accepted = (llm.stats()[f"{what}_tokens"] - before[f"{what}_tokens"] for what in ("guessed", "accepted"))
    if guessed:
        row |= {"guessed": guessed, "accepted": accepted, "accepted_share": round(accepted / max(1, guessed), 3)}
    return texts, row


def watch(forward: Any, times: dict[int, list[float]]) -> None:
    """Note the seconds of each of its passes, by the number of tokens."""
    run = forward.logits

    def logits(layout: Any, hidden: Any = None) -> Any:
        start = time.perf_counter()
        result = run(layout, hidden)
        times[len(layout.tokens)].append(time.perf_counter() - start)
        return result

    forward.logits = logits


def forwards() -> dict[str, float]:
    """Median microseconds of the passes that a step of draft, k=4, is made of, and of a plain step's; greedy."""
    wish, times = WISHES["greedy, 96 tokens"], [defaultdict(list) for _ in range(3)]
    for way, before in ((None, [0]), (WAYS["draft, k=4"], [1, 2])):
        llm = LLM(dtype="float32", device="cpu", speculation=way, prefix_reuse=False, max_length=512)
        measure(llm, wish)
        for forward, place in zip(llm.forwards, before, strict=True):
            watch(forward, times[place])
        measure(llm, wish)
    plain, target, draft = times
    each = {"plain, 1 token": plain[1], "verification, 5 tokens": target[5], "draft, 1 token": draft[1]}
    return {name: round(1e6 * median(seconds)) for name, seconds in each.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows, right = [], {}
    plain = LLM(dtype="float32", device="cpu", prefix_reuse=False, max_length=512)
    for name, wish in WISHES.items():
        right[name] = measure(plain, wish)[0]
    for way, speculation in WAYS.items():
        llm = LLM(dtype="float32", device="cpu", speculation=speculation, prefix_reuse=False, max_length=512)
        for name, wish in WISHES.items():
            texts, _ = measure(llm, wish)  # warms up
            if texts != right[name]:
                raise SystemExit(f"{way}, {name}: not the tokens of plain decoding")
            before, row = measure(plain, wish)[1]["tokens_per_second"], measure(llm, wish)[1]
            speed = {"plain_tokens_per_second": before, "speedup": round(row["tokens_per_second"] / before, 2)}
            rows.append({"guesses": way, "sampling": name, **row, **speed})
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        facts = {
            "command": "python bench/speculation.py --json FILE",
            "device": roofline.device_name(),
            "versions": status.versions(),
        }
        facts["forward_us"] = forwards()
        print(facts["forward_us"])
        options.json.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
