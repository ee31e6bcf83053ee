"""What a step costs: counted, not timed."""

import gc
import random
import sys

import pytest
import torch

import llmkernels
from llmkernels.engine import LLM, BeamParams, SamplingParams
from llmkernels.engine.layout import Layout
from llmkernels.engine.pages import PagePool
from llmkernels.engine.prefix import PrefixCache
from llmkernels.engine.scheduler import Scheduler
from llmkernels.engine.sequence import Sequence
from llmkernels.engine.tables import BlockTable


def decoding(sequences, prompt, page_size=4):
    """A scheduler whose sequences all decode, and their table."""
    pool = PagePool(sequences * (prompt // page_size + 20))
    scheduler = Scheduler(pool, page_size, sequences * prompt, sequences, PrefixCache(pool, page_size))
    for number in range(sequences):
        scheduler.add(Sequence([number] * prompt, prompt, prompt + 60))
    table = BlockTable()
    step(scheduler, table)
    return scheduler, table


def step(scheduler, table, token=0):
    chunks = scheduler.schedule()
    table.update(chunks)
    layout = Layout.of(chunks, scheduler.page_size)
    batch = layout.batch(layout.arrays(table.array, torch.device("cpu")), scheduler.page_size)
    scheduler.advance(chunks, [token] * sum(chunk.samples for chunk in chunks))
    return chunks, batch


@pytest.mark.parametrize("prompt", [8, 800])
def test_a_step_writes_what_is_new_however_long_the_prompts(prompt):
    scheduler, table = decoding(10, prompt)
    before = table.written
    for _ in range(8):  # two pages each
        step(scheduler, table)
    assert table.written - before == 10 * 2


def lines(work):
    """How many lines of Python a call runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    gc.disable()  # what it finds of other tests' runs Python as well
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def test_a_step_runs_as_many_lines_however_long_the_prompts():
    counts = []
    for prompt in (8, 800):
        scheduler, table = decoding(10, prompt)
        counts.append([lines(lambda s=scheduler, t=table: step(s, t)) for _ in range(8)])
    assert counts[0] == counts[1]


def test_rows_follow_their_sequences():
    """Sequences come, leave, lose their pages and get them back; the table says what each has."""
    choose = random.Random(4)
    pool = PagePool(40)
    scheduler = Scheduler(pool, 2, 24, 6, PrefixCache(pool, 2), guesses=3)
    table, alive, preempted = BlockTable(), [], 0
    for _ in range(300):
        if choose.random() < 0.4:
            prompt = [choose.randrange(2) for _ in range(choose.randint(1, 14))]
            alive.append(Sequence(prompt, len(prompt), len(prompt) + choose.randint(1, 12)))
            alive[-1].forks = [Sequence([*prompt], len(prompt), alive[-1].limit)] if choose.random() < 0.3 else []
            scheduler.add(alive[-1])
        if alive and choose.random() < 0.1:
            scheduler.end(choose.choice(alive))
        chunks = scheduler.schedule()
        if not chunks:
            continue
        table.update(chunks)
        assert sorted(chunk.sequence.row for chunk in chunks) == [*range(len(chunks))]
        for chunk in chunks:
            pages = chunk.sequence.pages
            assert table.array[chunk.sequence.row, : len(pages)].tolist() == pages
        scheduler.advance(chunks, [choose.randrange(2) for chunk in chunks if chunk.samples])
        preempted = scheduler.preemptions
    assert preempted


@pytest.mark.parametrize("graphs", [True, False])
def test_texts_when_rows_and_chunks_are_in_another_order(graphs):
    """The first to come leaves first, so the last row moves into its place."""
    with llmkernels.use(policy="silent"):
        llm = LLM(dtype="float32", graphs=graphs, max_sequences=4)
        prompts = ["The read() system call", "import os", "DESCRIPTION\n", "A package", "The ls command lists"]
        wishes = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (5, 30, 12, 20, 25)]
        together = [output.tokens for output in llm.generate(prompts, wishes)]
        alone = [llm.generate(*request)[0].tokens for request in zip(prompts, wishes, strict=True)]
    assert together == alone


def test_beams_beside_as_many_others_as_may_run():
    with llmkernels.use(policy="silent"):
        busy, idle = (LLM(dtype="float32", max_sequences=3, max_length=64) for _ in range(2))
        for _ in range(2):
            busy.add([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True))
        busy.step()
        beams, alone = (llm.beam_search([8, 9], BeamParams(width=3, max_tokens=6)) for llm in (busy, idle))
        while busy.step():
            pass
    assert [beam.tokens for beam in beams] == [beam.tokens for beam in alone]
    busy.check()
