"""What prefix reuse and pages are worth, on the shipped checkpoint.

    python bench/prefix.py --quick                  a few turns and requests; prints, and writes nothing
    python bench/prefix.py --json FILE --plot FILE  default: bench/results/<device>-prefix.json and .png
    python bench/prefix.py --model PATH             another checkpoint: --json <device>-prefix-<its name>.json
    python bench/prefix.py --quantize w4a8_g128     its weights rounded: --json <device>-prefix-...-w4a8_g128.json
    python bench/prefix.py --workload NAME          one of them, beside what FILE knows of the others

Reuse: a chat of 20 turns, each of which sends all that was said before, as text; and requests that share a system
prompt of some 230 tokens, or of some 1 500.  One request at a time, all of them with the engine's reuse on and then
with it off; the time to the first token is the median of the rounds, and each round begins with nothing in the cache.
Whether both answer the same is counted beforehand.  To another model the shipped tokenizer's ids are sent: random
weights write no text.

Pages: requests of sampled lengths in a cache with room for CONTIGUOUS sequences of max_length.  After each step the
engine's own counts say how many slots of its pages hold nothing.  Contiguous allocation would give each of the same
sequences max_length slots.
"""

import argparse
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does, before torch reads it

import torch

import llmkernels
from llmkernels import roofline, status
from llmkernels.bench import plot, results
from llmkernels.engine import LLM, SamplingParams, shipped_model
from llmkernels.engine.intake import Prompt
from llmkernels.models.tokenizer import read_tokenizer

ROUNDS, TURNS = 3, 20
ANSWER, SHORT = 24, 8  # tokens of an answer in a chat, and to a question behind a system prompt
CONTIGUOUS, REQUESTS = 8, 96  # sequences of max_length that the cache has room for; requests of sampled lengths
WORDS = (
    "ls cp mv rm cat grep sed awk sort uniq head tail find tar gzip chmod chown mount kill ps top du df ln touch mkdir"
)
COMMANDS = WORDS.split()
SYSTEM = "You answer questions about commands and system calls, in one sentence, from the manual alone. " + " ".join(
    f"The {name} command is described in section 1 of the manual." for name in COMMANDS[:16]
)

LONG = (
    SYSTEM
    + " "
    + " ".join(
        f"Of {name} you tell what it does to {other}, and what it prints when a file is missing."
        for name in COMMANDS
        for other in ("files", "links")
    )
)
WORKLOADS = ("chat", "shared_prompt", "long_prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few turns and requests; nothing is written unless asked")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="the directory of a checkpoint; default: the shipped one")
    parser.add_argument("--dtype", default="auto", help="of the model; default: what its checkpoint was saved in")
    parser.add_argument("--quantize", help="the scheme that its projections are rounded to")
    parser.add_argument("--quantize-head", help="that of the projection to the vocabulary")
    parser.add_argument("--workload", choices=WORKLOADS, help="only this one")
    parser.add_argument("--turns", type=int, help=f"of the chat, and requests with one prompt; default: {TURNS}")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = roofline.device_name("cpu")
    named = [options.model and options.model.name, options.quantize]
    if not options.quick and (place := results.place(device)):
        name = "-".join([f"{place.stem}-prefix", *filter(None, named)])
        options.json = options.json or place.with_name(f"{name}.json")
        options.plot = options.plot or (None if any(named) or options.workload else place.with_name(f"{name}.png"))
    rounds, turns, count = (1, 4, 16) if options.quick else (ROUNDS, TURNS, REQUESTS)
    rounded = {"quantize": options.quantize, "quantize_head": options.quantize_head}
    wanted = [options.workload] if options.workload else WORKLOADS
    report: dict[str, Any] = {}
    if options.workload and options.json and options.json.exists():
        known = json.loads(options.json.read_text())
        report = {name: known[name] for name in ("memory", *WORKLOADS) if name in known}
    with llmkernels.use(policy="silent"):
        asked = {"dtype": options.dtype, **rounded}
        found = measure(options.model, asked, wanted, options.rounds or rounds, options.turns or turns)
        if not any(named) and not options.workload:
            report["memory"] = memory(count)
    told = [Path(word).name if word == str(options.model) else word for word in sys.argv[1:]]  # no path of this machine
    command = shlex.join(["python", os.path.relpath(sys.argv[0], Path(__file__).parent.parent), *told])
    report |= {name: {"command": command, **figures} for name, figures in found.items()}
    report = {"device": device, "versions": status.versions(), "threads": options.threads} | report
    for name in wanted:
        total = report[name]["total"]
        print(
            f"{name}: {total['cached_share']:.1%} of {total['prompt_tokens']} tokens cached; time to first token "
            f"{total['off_ms']:.1f} -> {total['on_ms']:.1f} ms, {total['time_saved']:.1%} less; "
            f"{report[name]['different_answers']} answers differ"
        )
    if (kept := report.get("memory")) and not options.workload:
        print(
            f"memory: {kept['paged_waste']:.1%} of the slots unused in pages, {kept['contiguous_waste']:.1%} "
            f"contiguous; {kept['most_at_once']} sequences at once where contiguous has room for {CONTIGUOUS}"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        draw(report, options.plot)


def measure(
    path: Path | None, asked: dict[str, Any], workloads: Sequence[str], rounds: int, turns: int
) -> dict[str, Any]:
    """asked: the LLM's dtype and how its weights are rounded."""
    on, off = (LLM(path, tokenizer=path is None, device="cpu", prefix_reuse=kept, **asked) for kept in (True, False))
    words = read_tokenizer(shipped_model(), True)

    def sent(text: str) -> Prompt:
        return text if path is None else words.encode(text).ids

    questions = [f"user: What does the {COMMANDS[i]} command do?\nassistant:" for i in range(turns)]
    facts = {
        "model": path.name if path else shipped_model().name,
        "rounds": rounds,
        "turns": turns,
        **asked,
        "dtype": off.config.dtype if asked["dtype"] == "auto" else asked["dtype"],
    }
    found = {}
    for name in workloads:
        if name == "chat":
            prompts, answers = [sent(questions[0])], []
            for turn in range(turns):  # what was answered is part of what is sent next
                answers.append(write(off, prompts[turn], None, ANSWER)[0])
                if turn + 1 < turns:
                    answer = words.decode(answers[turn]) if path is None else answers[turn]
                    prompts.append(prompts[turn] + answer + sent(f"\n{questions[turn + 1]}"))
        else:
            system = {"shared_prompt": SYSTEM, "long_prompt": LONG}[name]
            prompts = [sent(f"system: {system}\n{question}") for question in questions]
        found[name] = facts | reuse(on, off, prompts, ANSWER if name == "chat" else SHORT, rounds)
    return found


def write(llm: LLM, prompt: Prompt, salt: str | None, most: int) -> tuple[list[int], float, int]:
    """The answer to a prompt, seconds to its first token, and how many tokens of the prompt were cached."""
    start = time.perf_counter()
    (output,) = llm.add(prompt, SamplingParams(max_tokens=most, ignore_eos=True), salt=salt)
    while not output.tokens:
        llm.step()
    first = time.perf_counter() - start
    while output.finish_reason is None:
        llm.step()
    return output.tokens, first, output.cached_tokens


def reuse(on: LLM, off: LLM, prompts: list[Prompt], answer: int, rounds: int) -> dict[str, Any]:
    """A row for each prompt, in the order in which they are sent, and their sum."""
    different = 0  # the warm-up as well: the chunks behind cached prefixes have sizes of their own
    for prompt in prompts:
        different += write(on, prompt, "warm-up", answer)[0] != write(off, prompt, None, answer)[0]
    runs = []
    for number in range(rounds):  # a salt of its own: a cold cache; one token is enough where nothing is kept
        kept = [write(on, prompt, f"{number}", answer) for prompt in prompts]
        runs.append([*zip(kept, [write(off, prompt, None, 1) for prompt in prompts], strict=True)])
    rows = []
    for prompt, pairs in zip(prompts, zip(*runs, strict=True), strict=True):
        cached = {with_reuse[2] for with_reuse, _ in pairs}
        assert len(cached) == 1, f"the rounds found different prefixes: {cached}"
        tokens = len(on.encode(prompt) if isinstance(prompt, str) else prompt)
        on_ms, off_ms = (1e3 * median(pair[side][1] for pair in pairs) for side in (0, 1))
        rows.append(row(tokens, cached.pop(), on_ms, off_ms))
    sums = [sum(line[name] for line in rows) for name in ("prompt_tokens", "cached_tokens", "on_ms", "off_ms")]
    return {"requests": rows, "total": row(*sums), "different_answers": different}


def row(tokens: int, cached: int, on_ms: float, off_ms: float) -> dict[str, Any]:
    """on_ms, off_ms: time to the first token.  time_saved: the share of it that reuse saves."""
    return {
        "prompt_tokens": tokens,
        "cached_tokens": cached,
        "cached_share": round(cached / tokens, 4),
        "on_ms": round(on_ms, 3),
        "off_ms": round(off_ms, 3),
        "time_saved": round(1 - on_ms / off_ms, 4),
    }


def memory(count: int) -> dict[str, Any]:
    """Slots that are reserved and hold nothing, summed over all steps of `count` requests."""
    size = 16
    length = LLM(device="cpu", kv_cache_pages=1).max_length
    pages = CONTIGUOUS * -(-length // size)
    llm = LLM(device="cpu", kv_cache_pages=pages, page_size=size, prefix_reuse=False, max_sequences=count)
    draw_length = random.Random(0).lognormvariate
    outputs, lengths = [], []
    for _ in range(count):  # log-normal, as the lengths of real chats nearly are; medians of 64 and 48 tokens
        prompt, answer = (int(min(max(draw_length(mu, 0.8), 4), length // 2 - 1)) for mu in (4.16, 3.87))
        lengths.append(prompt + answer)
        outputs += llm.add([5 + i % 200 for i in range(prompt)], SamplingParams(max_tokens=answer, ignore_eos=True))
    reserved = held = contiguous = steps = most = worst = 0
    while llm.step():
        stats = llm.stats()
        running = llm.scheduler.running
        if not running:
            continue
        # a prompt has pages for all of its tokens while its chunks run; who decodes has none yet for its last token
        tokens = [(len(sequence.tokens), sequence.computed) for sequence in running]
        now = sum(total if computed < total - 1 else computed for total, computed in tokens)
        unused = stats["pages_used"] * size - now
        steps, most = steps + 1, max(most, len(running))
        worst = max(worst, unused / len(running))
        reserved, held, contiguous = (
            reserved + stats["pages_used"] * size,
            held + now,
            contiguous + len(running) * length,
        )
    assert all(output.finish_reason == "length" for output in outputs)
    assert worst <= size, f"{worst} slots a sequence are unused, more than a page"
    return {
        "requests": count,
        "mean_length": round(sum(lengths) / count, 1),
        "longest": max(lengths),
        "max_length": length,
        "page_size": size,
        "pages": pages,
        "steps": steps,
        "paged_waste": round(1 - held / reserved, 4),
        "contiguous_waste": round(1 - held / contiguous, 4),
        "unused_slots_a_sequence": {"most": round(worst, 2), "bound": size},
        "most_at_once": most,
        "contiguous_at_once": CONTIGUOUS,
        "preemptions": llm.stats()["preemptions"],
    }


def draw(report: dict[str, Any], file: Path) -> None:
    """Time to the first token of each request, with and without reuse, and how much of the cache holds nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(plot.FONT):
        figure, panels = pyplot.subplots(
            1, 3, figsize=(12.5, 4.6), dpi=130, facecolor=plot.PAPER, width_ratios=(5, 5, 3)
        )
        figure.subplots_adjust(left=0.055, right=0.985, top=0.7, bottom=0.13, wspace=0.25)
        figure.text(
            0.055,
            0.91,
            f"{report['device']}, {report['threads']} thread{'s' * (report['threads'] > 1)}",
            size=17,
            weight="bold",
            color=plot.INK,
        )
        words = "Time to the first token of each request, one at a time; and slots of the cache that hold nothing."
        figure.text(0.055, 0.845, words, size=11, color=plot.FAINT)
        for panel, name, title in zip(panels, ("chat", "shared_prompt"), ("a chat", "one system prompt"), strict=False):
            rows, total = report[name]["requests"], report[name]["total"]
            turns = range(1, len(rows) + 1)
            for key, label, color in (("off_ms", "reuse off", plot.SLOWER), ("on_ms", "reuse on", plot.FASTER)):
                times = [line[key] for line in rows]
                panel.plot(turns, times, color=color, lw=2, marker="o", ms=5, mec=plot.PAPER, label=label, zorder=3)
            highest = max(line[key] for line in rows for key in ("on_ms", "off_ms"))
            panel.set_ylim(0, 1.3 * highest)  # room for the legend
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.set_xlabel("request", color=plot.INK)
            panel.set_ylabel("ms", color=plot.INK)
            words = f"{title}: {total['cached_share']:.0%} cached, {total['time_saved']:.0%} less time"
            panel.set_title(words, size=10.5, color=plot.INK, loc="left")
            panel.legend(frameon=False, labelcolor=plot.INK, loc="upper left", ncols=2)
        memory, panel = report["memory"], panels[2]
        shares = [100 * memory["contiguous_waste"], 100 * memory["paged_waste"]]
        bars = panel.bar(["contiguous", "pages"], shares, color=(plot.SLOWER, plot.FASTER), width=0.6, zorder=3)
        panel.bar_label(bars, fmt="%.1f %%", padding=3, color=plot.INK)
        panel.set_ylim(0, 100)
        panel.set_title("slots that hold nothing", size=10.5, color=plot.INK, loc="left")
        for panel in panels:
            panel.set_facecolor(plot.PAPER)
            panel.grid(True, axis="y", color=plot.GRID, lw=0.9, zorder=0)
            panel.tick_params(which="both", length=0, labelcolor=plot.FAINT)
            for side in panel.spines.values():
                side.set_visible(False)
        figure.savefig(file, facecolor=plot.PAPER)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
