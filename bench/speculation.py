"""Speculative decoding on documentation: tokens a forward pass of the model, guesses that came true, tokens a second.

    python bench/speculation.py --json FILE

The shipped checkpoint and its draft model, float32, one request at a time, greedy and sampled.  Every way of guessing
must write the very tokens that plain decoding writes, or nothing is recorded.  Tokens a forward are those that steps
with guesses brought, over their number: the first token of an answer comes from the prompt and is not counted.  Greedy,
a model of this size soon repeats itself, where n-grams guess all; so the first 16 tokens are also told by themselves.
"""

import argparse
import json
import time
from pathlib import Path

from llmkernels import roofline, status
from llmkernels.engine import LLM, SamplingParams, Speculation, shipped_model

DRAFT = shipped_model("manual-5m-draft")
WAYS = {
    "plain": None,
    "n-grams, k=4": Speculation(ngram=3),
    "draft, k=4": Speculation(draft=DRAFT),
    "draft tree, k=4 x 2": Speculation(draft=DRAFT, width=2),
    "draft tree, k=4 x 3": Speculation(draft=DRAFT, width=3),
    "draft tree, k=4 x 6": Speculation(draft=DRAFT, width=6),
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
    speculator = llm._runner.speculator
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
    if speculator:
        guessed, accepted = (
            llm.stats()[f"{what}_tokens"] - before[f"{what}_tokens"] for what in ("guessed", "accepted")
        )
        row |= {"guessed": guessed, "accepted": accepted, "accepted_share": round(accepted / max(1, guessed), 3)}
    return texts, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows, right = [], {}
    for way, speculation in WAYS.items():
        llm = LLM(dtype="float32", device="cpu", speculation=speculation, prefix_reuse=False, max_length=512)
        for name, wish in WISHES.items():
            texts, _ = measure(llm, wish)  # warms up
            if texts != right.setdefault(name, texts):
                raise SystemExit(f"{way}, {name}: not the tokens of plain decoding")
            rows.append({"guesses": way, "sampling": name, **measure(llm, wish)[1]})
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        facts = {"device": roofline.device_name(), "versions": status.versions()}
        options.json.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
