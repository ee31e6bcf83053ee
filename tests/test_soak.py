"""32 clients at once for a while: no page is lost and no answer is another than it would be alone.  See soak.py."""

import asyncio
import json
import time

import httpx
import pytest
import soak
from live_server import served

import llmkernels
from llmkernels.engine import LLM
from llmkernels.engine.speculative import Speculation
from llmkernels.server.app import create_app
from llmkernels.server.remote import Process

SMALL = {"dtype": "float32", "page_size": 4, "kv_cache_pages": 96, "max_sequences": 12, "max_batch_tokens": 64}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_under_load_nothing_is_lost_and_nothing_changes(seconds, tmp_path):
    """The long one has its engine in a process of its own, as users have it, and guesses ahead."""
    soak.write_adapters(tmp_path)
    adapters = [(name, str(tmp_path / name)) for name in soak.ADAPTERS]
    with llmkernels.use(policy="silent"):
        alone = LLM(dtype="float32", prefix_reuse=False)
        source = Process(SMALL | {"speculation": Speculation(ngram=3)}, adapters) if seconds > 60 else LLM(**SMALL)
        for name, path in adapters:
            for llm in (alone, source) if isinstance(source, LLM) else (alone,):
                llm.load_adapter(name, path)
    with served(create_app(source, "manual", adapter_folder=tmp_path)) as url:
        finished, done = asyncio.run(soak.load(url, seconds))
        until = time.monotonic() + 10
        while (stats := httpx.get(f"{url}/status").json())["running"] or stats["waiting"]:
            assert time.monotonic() < until, "somebody who left still runs"
            time.sleep(0.01)
    assert stats["problem"] is None
    assert stats["pages_used"] == 0
    assert stats["pages_idle"] + stats["pages_empty"] == stats["pages"] == 96
    assert stats["preemptions"] > 0
    assert stats["prefix_found_tokens"] > 0
    assert min(done[how] for how in ("whole", "stream", "leave", "leave at once", "wrong", "loaded", "unloaded")) > 0
    assert min(done[what] for what in ("n", "model", "structured_outputs", "use_beam_search")) > 0
    assert len(finished) > 20
    for bulky in ("cells", "tree", "requests"):
        del stats[bulky]
    print(f"{sum(map(len, finished.values()))} answers to {len(finished)} requests; {dict(done)}; {stats}")
    print("now each of them alone, which takes minutes")
    sample = list(finished.items()) if seconds > 60 else list(finished.items())[::4]  # alone takes its time
    for request, answers in sample:
        expected = soak.alone(alone, json.loads(request))
        assert all(answer == expected for answer in answers), (request, expected, answers)
