"""32 clients at once for a while: no page is lost and no answer is another than it would be alone.  See soak.py."""

import asyncio
import json
import time

import pytest
import soak
from live_server import served

import llmkernels
from llmkernels.engine import LLM, SamplingParams
from llmkernels.server.app import create_app


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_under_load_nothing_is_lost_and_nothing_changes(seconds):
    with llmkernels.use(policy="silent"):
        llm = LLM(dtype="float32", page_size=4, kv_cache_pages=96, max_sequences=12, max_batch_tokens=64)
        alone = LLM(dtype="float32", prefix_reuse=False)
    with served(create_app(llm, "manual")) as url:
        finished, done = asyncio.run(soak.load(url, seconds))
        until = time.monotonic() + 10
        while llm.stats()["running"] or llm.stats()["waiting"]:
            assert time.monotonic() < until, "somebody who left still runs"
            time.sleep(0.01)
    llm.check()
    stats = llm.stats()
    assert stats["pages_used"] == 0
    assert stats["pages_idle"] + stats["pages_empty"] == 96
    assert stats["preemptions"] > 0
    assert stats["prefix_found_tokens"] > 0
    assert min(done[how] for how in ("whole", "stream", "leave", "leave at once", "wrong", "forked")) > 0
    assert len(finished) > 20
    print(f"{sum(map(len, finished.values()))} answers to {len(finished)} requests; {dict(done)}; {stats}")
    sample = list(finished.items()) if seconds > 60 else list(finished.items())[::4]  # alone takes its time
    for request, answers in sample:
        told = json.loads(request)
        wishes = {name: value for name, value in told.items() if name not in ("prompt", "cache_salt")}
        plain = alone.generate(told["prompt"], SamplingParams(**wishes))
        expected = {number: (output.text, output.finish_reason) for number, output in enumerate(plain)}
        assert all(answer == expected for answer in answers), request
