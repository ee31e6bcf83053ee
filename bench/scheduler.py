"""What a step costs beside the model: choosing who runs, the arrays for it, and taking its tokens back.

    python bench/scheduler.py --json FILE

Every row is a batch of sequences that decode, behind prompts of one length, at one moment: the median of the steps.
No model runs; each sequence goes on with token 0.  schedule and advance are the scheduler's own; arrays is what turns
its plain data into the tensors of a forward pass.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch

from llmkernels import roofline, status
from llmkernels.engine.layout import Layout
from llmkernels.engine.pages import PagePool
from llmkernels.engine.prefix import PrefixCache
from llmkernels.engine.scheduler import Scheduler
from llmkernels.engine.sequence import Sequence
from llmkernels.engine.tables import BlockTable

PAGE = 16
STEPS = 200


def measure(sequences: int, prompt: int) -> dict[str, float]:
    """Microseconds a step."""
    pages = sequences * -(-(prompt + STEPS + 60) // PAGE)
    pool = PagePool(pages)
    scheduler = Scheduler(pool, PAGE, sequences * prompt, sequences, PrefixCache(pool, PAGE))
    table = BlockTable()
    for number in range(sequences):
        tokens = [number] + [number + i for i in range(1, prompt)]
        scheduler.add(Sequence(tokens, prompt, prompt + STEPS + 50))
    times: dict[str, list[float]] = {"schedule": [], "arrays": [], "advance": []}
    chunks = scheduler.schedule()  # all prompts at once
    table.update(chunks)
    scheduler.advance(chunks, [0] * sequences)
    while len(times["schedule"]) < STEPS:
        start = time.perf_counter()
        chunks = scheduler.schedule()
        planned = time.perf_counter()
        table.update(chunks)
        layout = Layout.of(chunks, PAGE)
        layout.batch(layout.arrays(table.array, torch.device("cpu")), PAGE)
        ready = time.perf_counter()
        scheduler.advance(chunks, [0] * sum(chunk.samples for chunk in chunks))
        end = time.perf_counter()
        for name, seconds in zip(times, (planned - start, ready - planned, end - ready), strict=True):
            times[name].append(seconds)
    row = {name: round(1e6 * statistics.median(seconds), 1) for name, seconds in times.items()}
    return {"sequences": sequences, "prompt": prompt, **row, "scheduler": round(row["schedule"] + row["advance"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = []
    for sequences, prompt in ((1, 128), (32, 128), (1000, 16), (1000, 128), (1000, 1024), (1000, 4096)):
        gc.freeze()  # what earlier rows left is not collected again and again in this one

        rows.append(measure(sequences, prompt))
        print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        content = {
            "device": roofline.device_name(),
            "versions": status.versions(),
            "unit": "microseconds a step, median",
            "rows": rows,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
