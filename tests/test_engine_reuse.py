"""Prefix reuse and forks through the whole engine: the same texts as without, and fewer tokens computed."""

import pytest
import torch

import llmkernels
from llmkernels.engine import LLM, SamplingParams
from llmkernels.engine.cache import KVCache
from llmkernels.models.weights import Checkpoint

SYSTEM = "The read() system call attempts to read up to count bytes from file descriptor fd into the buffer. "
QUESTIONS = ["On success, the number of bytes read", "The buffer", "RETURN VALUE", "On success, the number of files"]


@pytest.fixture(autouse=True)
def quiet():
    with llmkernels.use(policy="silent"):
        yield


@pytest.fixture(scope="module")
def cold():
    with llmkernels.use(policy="silent"):
        return LLM(dtype="float32", prefix_reuse=False)


def llm(**more):
    return LLM(dtype="float32", **more)


def wish(**more):
    """Without the far tail, where a last bit decides among tokens that hardly ever come."""
    return SamplingParams(**{"max_tokens": 24, "temperature": 0.8, "top_p": 0.95, "seed": 3, "ignore_eos": True} | more)


def test_a_shared_beginning_is_computed_once_and_changes_no_text(cold):
    warm = llm(page_size=8)
    prompts = [SYSTEM + question for question in QUESTIONS]
    shared = len(warm.encode(SYSTEM)) // 8 * 8
    for turn in range(2):
        outputs = [warm.generate(prompt, wish())[0] for prompt in prompts]
        assert [o.tokens for o in outputs] == [o.tokens for o in cold.generate(prompts, wish())]
        if turn == 0:
            assert outputs[0].cached_tokens == 0
            assert all(o.cached_tokens >= shared - 8 for o in outputs[1:])
        else:
            assert all(o.cached_tokens >= (len(o.prompt_tokens) - 1) // 8 * 8 for o in outputs)


def test_a_chat_of_many_turns_computes_each_token_once(cold):
    warm, text = llm(page_size=4), SYSTEM
    for _ in range(6):
        output = warm.generate(text, wish(max_tokens=9))[0]
        assert output.tokens == cold.generate(text, wish(max_tokens=9))[0].tokens
        ids = [*output.prompt_tokens, *output.tokens, 7, 8]
        text = ids
    assert output.cached_tokens > len(output.prompt_tokens) - 4 - 3 - 4
    assert cold.generate(text, wish())[0].cached_tokens == 0


def test_reuse_while_pages_run_out(cold):
    """Evicted, preempted, found again: the texts stay."""
    tight = llm(page_size=4, kv_cache_pages=24, max_batch_tokens=24)
    prompts = [SYSTEM + question for question in QUESTIONS * 2]
    for _ in range(2):
        assert [o.tokens for o in tight.generate(prompts, wish())] == [o.tokens for o in cold.generate(prompts, wish())]
    assert tight._scheduler.preemptions
    assert tight._scheduler.pool.free == 24


def test_a_salt_shares_with_itself_only():
    warm = llm()
    warm.generate(SYSTEM, wish(), salt="a")
    assert warm.generate(SYSTEM, wish(), salt="b")[0].cached_tokens == 0
    assert warm.generate(SYSTEM, wish())[0].cached_tokens == 0
    assert warm.generate(SYSTEM, wish(), salt="a")[0].cached_tokens > 0


@pytest.mark.parametrize("reuse", [True, False])
def test_n_answers_are_those_of_n_requests(reuse, cold):
    engine = llm(prefix_reuse=reuse, page_size=4)
    outputs = engine.generate([SYSTEM, QUESTIONS[0]], wish(n=3))
    assert len(outputs) == 6
    assert outputs[0].tokens == cold.generate(SYSTEM, wish())[0].tokens  # n changes nothing about the first
    assert len({tuple(output.tokens) for output in outputs}) == 6
    for output in outputs:
        assert output.tokens == cold.generate(output.prompt_tokens, wish(seed=output.seed))[0].tokens
    assert [o.tokens for o in engine.generate([SYSTEM, QUESTIONS[0]], wish(n=3))] == [o.tokens for o in outputs]
    assert engine._scheduler.pool.free == engine._scheduler.pool.pages


def test_n_answers_stream_interleaved_and_close_together(cold):
    engine = llm()
    texts = {}
    for delta in engine.stream(SYSTEM, wish(n=3)):
        texts[delta.output.seed] = texts.get(delta.output.seed, "") + delta.text
    assert [*texts.values()] == [o.text for o in engine.generate(SYSTEM, wish(n=3))]
    stream = engine.stream(SYSTEM, wish(n=3))
    next(stream)
    stream.close()
    assert engine._scheduler.pool.free == engine._scheduler.pool.pages


def test_n_is_checked():
    with pytest.raises(ValueError, match="n is 0; give an integer from 1 to 128"):
        SamplingParams(n=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_pages_are_copied_all_layers_one_after_the_other(dtype):
    cache = KVCache(Checkpoint(llmkernels.engine.shipped_model()).config, 4, 2, dtype, torch.device("cpu"))
    for number, held in enumerate((cache.k, cache.v)):
        held.copy_(torch.arange(4).view(1, 4, 1, 1, 1) + 10 * number)
    cache.copy([(1, 2), (0, 1), (0, 3)])
    for number, held in enumerate((cache.k, cache.v)):
        expected = torch.tensor([0, 0, 1, 0]) + 10 * number
        assert torch.equal(held.float(), expected.view(1, 4, 1, 1, 1).expand(held.shape).float())


def test_a_step_that_was_interrupted_leaves_no_page_half_copied(cold, monkeypatch):
    warm = llm(page_size=8)
    tokens = warm.encode(SYSTEM)[:20]
    warm.generate([tokens], wish(max_tokens=1))
    prompts = [[*tokens, 5], [*tokens[:18], 6, 7]]  # both go on within the third page
    outputs = [warm.add(prompt, wish())[0] for prompt in prompts]
    monkeypatch.setattr(KVCache, "copy", lambda self, pairs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        warm.step()
    monkeypatch.undo()
    while warm.step():
        pass
    assert [o.tokens for o in outputs] == [o.tokens for o in cold.generate(prompts, wish())]
    warm.check()
