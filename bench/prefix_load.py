"""What prefix reuse is worth in an engine that is busy: many chats, many clients behind one system prompt.

    python bench/prefix_load.py --quick          few turns and requests; prints, and writes nothing
    python bench/prefix_load.py --json FILE      default: bench/results/<device>-prefix-load.json
    python bench/prefix_load.py --workload NAME  one of them, beside what FILE knows of the others

The same requests go to an engine with reuse and to one without, while BESIDE others decode in each of them:

    at once       CLIENTS prompts arrive in the same moment, and the next CLIENTS when these are answered.
    at random, X  prompts arrive one by one at random (exponential gaps), X times as many a second as the engine
                  without reuse answers when all of them wait.  They arrive at the same times in both.

The time to the first token counts from the arrival, so what waits for others is in it.  Nothing is cached when a
workload begins, and its first prompts are counted too.  Every page of the cache has been written before, as in a server
that has run for a while.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, permutations
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does, before torch reads it

import torch
from prefix import COMMANDS, LONG, SYSTEM

import llmkernels
from llmkernels import roofline, status
from llmkernels.bench import results
from llmkernels.engine import LLM, SamplingParams
from llmkernels.engine.output import Output

CLIENTS, TURNS, WAVES = 16, 20, 64
BESIDE = 4  # sequences that decode all the time
LOADS = (0.5, 0.8, 0.95)  # of what the engine without reuse can bear
WORKLOADS = ("chats", "shared_prompt", "long_prompt")
CHAT_ANSWER, ANSWER = 24, 8  # tokens of an answer in a chat, and to a question behind a system prompt


@dataclass
class Request:
    """A prompt, and whose it is: prefixes are shared under one name only."""

    prompt: str
    owner: str


class Busy:
    """An engine in which others decode."""

    def __init__(self, llm: LLM, answer: int):
        self.llm, self.wish = llm, SamplingParams(max_tokens=answer, ignore_eos=True)
        self._others: list[Output] = []

    def step(self) -> None:
        """One step, in which BESIDE others have a token each."""
        self._others = [output for output in self._others if output.finish_reason is None]
        while len(self._others) < BESIDE:
            beside = SamplingParams(max_tokens=256, ignore_eos=True)
            self._others += self.llm.add("The read() system call", beside, salt="beside")
        self.llm.step()

    def serve(self, requests: list[Request], arrivals: list[float], salt: str) -> list[tuple[float, int, int]]:
        """Send each request when its time (seconds) has come, and answer all.

        Of each: seconds to its first token, tokens of its prompt, and how many of those were cached.
        """
        for _ in range(3):
            self.step()
        outputs: list[Output] = []
        first: dict[int, float] = {}
        start = time.perf_counter()
        while len(outputs) < len(requests) or any(output.finish_reason is None for output in outputs):
            while len(outputs) < len(requests) and time.perf_counter() - start >= arrivals[len(outputs)]:
                request = requests[len(outputs)]
                outputs += self.llm.add(request.prompt, self.wish, salt=f"{salt} {request.owner}")
            self.step()
            now = time.perf_counter() - start
            for i, output in enumerate(outputs):
                if output.tokens and i not in first:
                    first[i] = now - arrivals[i]
        return [(first[i], len(output.prompt_tokens), output.cached_tokens) for i, output in enumerate(outputs)]

    def clear(self) -> None:
        """End the others."""
        for output in self._others:
            self.llm.abort(output)


def questions() -> Iterator[str]:
    """1300 different ones."""
    kinds = "What does the {} command do with the output of {}?", "What does {} do that the {} command cannot do?"
    asked = [kind.format(*pair) for kind in kinds for pair in permutations(COMMANDS, 2)]
    random.Random(0).shuffle(asked)
    for ask in asked:
        yield f"user: {ask}\nassistant:"


def chats(llm: LLM, turns: int) -> list[list[Request]]:
    """Of each turn the CLIENTS prompts: all that was said before in each chat, and a question."""
    asked, said, waves = questions(), [""] * CLIENTS, []
    for _ in range(turns):
        prompts = [text + next(asked) for text in said]
        waves.append([Request(prompt, f"chat {i}") for i, prompt in enumerate(prompts)])
        answers = llm.generate(prompts, SamplingParams(max_tokens=CHAT_ANSWER, ignore_eos=True))
        said = [f"{prompt}{answer.text}\n" for prompt, answer in zip(prompts, answers, strict=True)]
    return waves


def behind(owner: str, system: str, waves: int) -> list[list[Request]]:
    """Questions behind one system prompt: a single one, then CLIENTS of them in each wave."""
    asked = questions()
    prompts = [[f"system: {system}\n{next(asked)}" for _ in range(n)] for n in (1, *[CLIENTS] * waves)]
    return [[Request(prompt, owner) for prompt in wave] for wave in prompts]


def measure(on: LLM, off: LLM, waves: list[list[Request]], answer: int) -> dict[str, Any]:
    """Every way of arriving, with and without reuse."""
    engines = {"off": Busy(off, answer), "on": Busy(on, answer)}
    for busy in engines.values():  # the warm-up
        for wave in waves[:3]:
            busy.serve(wave, [0.0] * len(wave), "warm-up")
    once = {name: [busy.serve(wave, [0.0] * len(wave), "once") for wave in waves] for name, busy in engines.items()}
    requests = [request for wave in waves for request in wave]
    waiting = engines["off"].serve(requests, [0.0] * len(requests), "waiting")
    each = max(seconds for seconds, *_ in waiting) / len(requests)
    report = {"at_once": compared(*([*chain(*once[name])] for name in ("off", "on")))}
    for load in LOADS:
        draw = random.Random(0)
        arrivals = [*accumulate(draw.expovariate(load / each) for _ in requests)]
        spread = {name: busy.serve(requests, arrivals, f"random {load}") for name, busy in engines.items()}
        gap = {"gap_ms": round(1e3 * each / load, 2)}
        report[f"at_random_{load:.0%}"] = gap | compared(spread["off"], spread["on"])
    for busy in engines.values():
        busy.clear()
    return report


def compared(off: list[tuple[float, int, int]], on: list[tuple[float, int, int]]) -> dict[str, Any]:
    """What all requests add up to."""
    times = {name: told([seconds for seconds, *_ in rows]) for name, rows in (("off", off), ("on", on))}
    tokens, cached = (sum(row[i] for row in on) for i in (1, 2))
    return {
        "requests": len(on),
        "prompt_tokens": tokens,
        "cached_tokens": cached,
        "cached_share": round(cached / tokens, 4),
        "time_saved": {name: round(1 - times["on"][name] / times["off"][name], 4) for name in times["on"]},
        "off_ms": times["off"],
        "on_ms": times["on"],
    }


def told(seconds: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile, in ms."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    figures = {"mean": mean(seconds), "p50": cuts[49], "p99": cuts[98]}
    return {name: round(1e3 * value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few turns and requests; nothing is written unless asked")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--workload", choices=WORKLOADS, help="only this one")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = roofline.device_name("cpu")
    if not options.quick and (place := results.place(device)):
        options.json = options.json or place.with_name(f"{place.stem}-prefix-load.json")
    turns, waves = (4, 1) if options.quick else (TURNS, WAVES)
    report: dict[str, Any] = {
        "device": device,
        "command": "python bench/prefix_load.py, whole or by --workload",
        "versions": status.versions(),
        "threads": options.threads,
        "clients": CLIENTS,
        "beside": BESIDE,
    }
    if options.workload and options.json and options.json.exists():
        known = json.loads(options.json.read_text())
        report |= {name: known[name] for name in WORKLOADS if name in known}
    wanted = [options.workload] if options.workload else WORKLOADS
    with llmkernels.use(policy="silent"):
        on, off = (LLM(device="cpu", prefix_reuse=kept) for kept in (True, False))
        for llm in (on, off):
            cache = llm.forwards[0].cache
            cache.k.zero_(), cache.v.zero_()
        for name in wanted:
            if name == "chats":
                report[name] = measure(on, off, chats(off, turns), CHAT_ANSWER)
            else:
                system = {"shared_prompt": SYSTEM, "long_prompt": LONG}[name]
                report[name] = measure(on, off, behind(name, system, waves), ANSWER)
    for name in wanted:
        for way, row in report[name].items():
            saved = ", ".join(
                f"{key} {row['off_ms'][key]:.1f} -> {row['on_ms'][key]:.1f} ms, {share:.1%} less"
                for key, share in row["time_saved"].items()
            )
            print(f"{name} {way}: {row['cached_share']:.1%} of {row['prompt_tokens']} tokens cached; {saved}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
