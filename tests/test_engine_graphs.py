"""Recorded decode steps: the same bits as plain ones, counted, and never where something else was asked for."""

import pytest
import torch
from small_models import small_model

import llmkernels
from llmkernels import discovery, ledger
from llmkernels.engine import LLM, SamplingParams
from llmkernels.engine.forward import Forward
from llmkernels.engine.graphs import DecodeGraphs
from llmkernels.engine.inputs import MOST_ON_A_GPU, MOST_TOKENS, filled, rounded
from llmkernels.engine.layout import LEAST_PAGES, Layout, table_width
from llmkernels.models.model import Delta, Model

PROMPTS = [[10 + 7 * i % 4000 for i in range(n)] for n in (16, 13, 3, 30, 1)]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True)
KINDS = {
    "bfloat16": {},
    "float32": {"dtype": "float32"},
    "w4a8": {"quantize": "w4a8_g128", "quantize_head": "w8a16"},
    "w4a16, int8 cache": {"quantize": "w4a16_g32", "kv_cache_dtype": "int8"},
}

pytestmark = pytest.mark.skipif(discovery.absent("cpu") is not None, reason="the cpu backend is not built")


def engine(graphs=True, **options):
    options = {"max_length": 512, "max_sequences": 8, "kv_cache_bytes": 2**24, "page_size": 4} | options
    return LLM(tokenizer=False, device="cpu", graphs=graphs, **options)


def texts(llm, params=GREEDY):
    return [(output.tokens, output.logprobs) for output in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def llm():
    return engine()


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_give_the_bits_of_plain_ones(kind):
    recorded, plain = engine(**KINDS[kind]), engine(False, **KINDS[kind])
    for held in (recorded._runner.target.cache, plain._runner.target.cache):
        for pages in (held.k, held.v):
            pages.view(torch.uint8).fill_(0xFF)  # NaN where the dtype has one: rows that fill up must not read them
    lengths = [SamplingParams(max_tokens=n, ignore_eos=True, logprobs=True) for n in (40, 9, 25, 17, 40)]
    assert texts(recorded, lengths) == texts(plain, lengths)  # batches of 5 to 2, tables that widen
    stats = recorded.stats()
    assert stats["decode_replayed_steps"] > stats["decode_plain_steps"]
    assert not recorded._runner.target.graphs.refused


def test_a_compiled_model_writes_the_same(tmp_path):
    """Prompts in chunks, mixed with decoding, and steps of one token, with nothing recorded."""
    small_model("Qwen3").save_pretrained(tmp_path)
    kind = {"dtype": "float32", "quantize": "w4a16_g32", "kv_cache_dtype": "int8"}
    prompts, lengths = [p[:9] for p in PROMPTS], [SamplingParams(max_tokens=n, logprobs=True) for n in (3, 9, 5, 1, 7)]

    def write(**more):
        llm = engine(False, model_path=tmp_path, max_length=64, max_batch_tokens=16, **kind, **more)
        return [(o.tokens, o.logprobs) for o in llm.generate([[t % 128 for t in p] for p in prompts], lengths)]

    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert write(compile=True) == write()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def test_rows_that_fill_a_step_up_write_nothing(llm):
    """17 sequences run in a step for 18: pages that nobody uses keep their bytes."""
    many = engine(max_sequences=20)
    cache = many._runner.target.cache
    for _ in range(2):
        cache.k.fill_(7.0)
        many.generate([[5, 6]] * 17, SamplingParams(max_tokens=9, ignore_eos=True))
    assert many.stats()["decode_replayed_steps"] > 0
    used = (cache.k != 7.0).flatten(2).any(2).any(0).sum()
    assert used <= 17 * 3  # of 10 tokens, 4 a page


def test_the_ledger_counts_what_was_replayed(llm):
    counts = []
    for one in (llm, engine(False)):
        ledger.reset()
        texts(one)
        counts.append(ledger.read())
    assert counts[0] == counts[1]


def test_other_settings_are_asked_anew(llm):
    """A recording of one backend never answers for another one that the caller names."""
    texts(llm)
    ledger.reset()
    with llmkernels.use("reference"):
        texts(llm, SamplingParams(max_tokens=4, ignore_eos=True))
    assert {backend for row in ledger.read().values() for backend in row} == {"reference"}
    assert llm._runner.target.graphs.refused["answered by reference, which keep no calls together"] > 0


def test_a_caller_who_wants_calls_checked_or_noted_gets_plain_steps(llm, tmp_path):
    texts(llm)
    for wish in (lambda: llmkernels.use(checked=True), lambda: ledger.record(tmp_path / "calls")):
        before = llm.stats()["decode_replayed_steps"]
        with wish():
            texts(llm)
        assert llm.stats()["decode_replayed_steps"] == before
    assert "paged_attention" in (tmp_path / "calls").read_text()


def test_what_torch_computes_in_between_keeps_a_step_plain(monkeypatch):
    logits = Model.logits
    monkeypatch.setattr(Model, "logits", lambda *args: logits(*args) * 2)
    doubled, plain = engine(), engine(False)
    assert texts(doubled) == texts(plain)
    assert doubled.stats()["decode_replayed_steps"] == 0
    assert doubled._runner.target.graphs.refused["torch computes between the kernels: aten.mul.Tensor"] > 0


def test_steps_are_forgotten_with_the_choices_they_rest_on(llm):
    texts(llm)
    assert llm._runner.target.graphs._steps
    discovery.forget_all()
    assert not llm._runner.target.graphs._steps
    texts(llm)


@pytest.mark.parametrize("counts", [(MOST_TOKENS + 1,), (17,) * 8])
def test_steps_of_many_tokens_run_as_any_other(llm, counts):
    assert llm._runner.target.graphs.logits(layout(counts)) is None


def layout(counts, pages=1):
    """Sequences with so many tokens each, in so many pages of their own."""
    found = Layout(most=max(counts), pages=pages)
    for number, count in enumerate(counts):
        found.tokens += [10 + number + 7 * i for i in range(count)]
        found.positions += range(count)
        found.slots += range(4 * pages * number, 4 * pages * number + count)
        found.starts.append(len(found.tokens))
        found.lengths.append(count)
    found.rows = [*range(len(found.tokens))][::-1]
    return found


@pytest.mark.parametrize("counts", [(3,), (4, 1, 3), (1, 2) * 8])
@pytest.mark.parametrize("adapted", [False, True])
def test_steps_of_several_tokens_are_replayed(counts, adapted):
    """As when guesses are verified: sequences with different numbers of tokens, the last row asked for first."""
    target, found = engine(max_sequences=16, dtype="float32")._runner.target, layout(counts)
    plain = Forward(target.model, target.cache, target.table, graphs=0)
    target.table.array[: len(counts), 0] = torch.arange(len(counts))
    if adapted:
        found.adapters = [i % 3 - 1 for i in range(len(found.tokens))]
        for layer in target.model.layers:
            rows, generator = layer.qkv.weight.shape[0], torch.Generator().manual_seed(1)
            a, b = (
                torch.randn(2, *size, generator=generator) / 9 for size in ((4, target.model.config.hidden), (64, 4))
            )
            layer.qkv.deltas["v"] = Delta(rows - 64, rows, a, b, torch.ones(2))
    want = plain.logits(found)
    for _ in range(4):
        assert torch.equal(target.logits(found), want)
    assert target.graphs.replayed == 2


def test_one_recording_serves_as_many_tokens_as_fill_up_to_the_same_power_of_two():
    """Recorded with 20 tokens of one sequence, replayed with more, with fewer and with other sequences."""
    target = engine(max_sequences=16)._runner.target
    plain = Forward(target.model, target.cache, target.table, graphs=0)
    target.table.array[:16, :8] = torch.arange(128).view(16, 8)
    for counts in ((20,), (20,), (32,), (17,), (5, 20, 1), (2, 1) * 8, (20,)):
        found = layout(counts, pages=8)
        found.rows = found.rows[: 1 + len(counts) // 2]
        want = plain.logits(found).clone()
        assert torch.equal(target.logits(found), want), counts
    assert (target.graphs.replayed, target.graphs.plain) == (3, 4)  # the head is another one for 2 rows and for 9


@pytest.mark.parametrize("counts", [(1,) * 17, (3,), (4, 1, 3), (20, 1), (30, 1, 32, 3), (9,) * 8])
def test_what_fills_a_step_up_changes_nothing(counts):
    """As it must for CUDA graphs, whose size is fixed."""
    target = engine(max_sequences=16)._runner.target
    target.cache.k.zero_()
    plain = Forward(target.model, target.cache, target.table, graphs=0)
    target.table.array[: len(counts), :8] = torch.arange(8 * len(counts)).view(-1, 8)
    found = layout(counts, pages=8)
    more = filled(found)
    assert {len(values) for values in (more.tokens, more.positions, more.slots)} == {more.starts[-1]}
    if len(more.tokens) <= MOST_TOKENS:
        assert more.rows == [*range(more.starts[-1])]
    else:
        assert more.rows == found.rows
        assert len(more.tokens) <= len(found.tokens) * 9 / 8
    assert len(more.lengths) == len(more.starts) - 1
    assert more.most >= max(b - a for a, b in zip(more.starts, more.starts[1:], strict=False))
    want, kept = plain.logits(found).clone(), target.cache.k.clone()
    logits = plain.logits(more)
    logits = logits if more.rows == found.rows else logits[found.rows]
    torch.testing.assert_close(logits, want, rtol=0.02, atol=0.05)
    assert torch.equal(target.cache.k, kept)


def kept_whole(run, memory):
    """As `capture`, for a device that has no graphs: the same arrays each time, filled by running again."""
    results = run()

    def replay(tokens, sequences):
        for there, now in zip(results, run(), strict=True):
            there.copy_(now)

    return replay, results


@pytest.mark.parametrize("most", [MOST_TOKENS, MOST_ON_A_GPU])
def test_steps_of_a_fixed_size_give_what_plain_ones_do(most, monkeypatch):
    """Those of CUDA graphs: chunks of prompts alone and beside others, of whose rows only some have logits."""
    monkeypatch.setattr("llmkernels.engine.graphs.capture", kept_whole)
    target = engine(max_sequences=16, dtype="float32", graphs=most)._runner.target
    target.graphs._fixed = True
    plain = Forward(target.model, target.cache, target.table, graphs=0)
    target.table.array[:16, :32] = torch.arange(512).view(16, 32)
    for counts in ((100,), (97,), (104,), (70, 1, 1, 20), (72, 1, 1, 20), (90, 1, 1, 1), (3, 1), (3, 1), (3, 1)):
        for chosen in (slice(None, 2), slice(0)):
            found = layout(counts, pages=32)
            found.rows = found.rows[chosen]
            want = plain.logits(found).clone()
            logits = target.logits(found)
            assert logits.shape == want.shape
            torch.testing.assert_close(logits, want)
    counted = target.graphs.replayed, target.graphs.plain
    assert counted == ((4, 2) if most == MOST_TOKENS else (11, 7))  # the first two of each kind, and of the head


def test_few_sizes_occur():
    assert [rounded(n) for n in (1, 7, 16, 17, 32, 33, 64)] == [1, 7, 16, 18, 32, 36, 64]
    assert all(n <= rounded(n) <= n * 9 / 8 for n in range(1, 1000))
    assert [table_width(n) for n in (1, LEAST_PAGES, LEAST_PAGES + 1)] == [LEAST_PAGES, LEAST_PAGES, 2 * LEAST_PAGES]


def test_the_native_module_keeps_calls_of_its_thread_only_while_open():
    from llmkernels.backends import cpu

    x, gain = torch.randn(3, 64), torch.ones(64)
    llmkernels.rms_norm(x, gain, backend="cpu")  # checks the kernel the first time
    with cpu.recording() as recording:
        first = llmkernels.rms_norm(x, gain, backend="cpu")
        with pytest.raises(RuntimeError, match="open on this thread already"), cpu.recording():
            pass
    llmkernels.rms_norm(x, gain, backend="cpu")
    assert len(recording) == 1
    before = first.clone()
    x.mul_(2).add_(1)
    recording.replay()
    assert not torch.equal(first, before)
    assert torch.equal(first, llmkernels.rms_norm(x, gain, backend="cpu"))


def test_a_wrong_index_in_a_replay_raises(llm):
    from llmkernels.backends import cpu

    positions = torch.zeros(1, dtype=torch.int64)
    q, table = torch.ones(1, 2, 4), torch.ones(3, 2)
    llmkernels.rotary_embedding(q, q, table, table, positions, backend="cpu")
    with cpu.recording() as recording:
        kept = llmkernels.rotary_embedding(q, q, table, table, positions, backend="cpu")
    positions[0] = 3
    with pytest.raises(IndexError, match="rotary_embedding"):
        recording.replay()
    assert kept is not None


def test_a_replay_makes_calls_of_other_sizes():
    from llmkernels.backends import cpu

    x, gain = torch.randn(8, 64), torch.ones(64)
    whole = llmkernels.rms_norm(x, gain, backend="cpu")
    with cpu.recording(tokens=3) as recording:
        kept = llmkernels.rms_norm(x[:3], gain, backend="cpu")
    assert torch.equal(kept, whole[:3])
    kept.zero_()
    recording.replay(tokens=2)
    assert torch.equal(kept, torch.cat([whole[:2], torch.zeros(1, 64)]))
    with pytest.raises(RuntimeError, match="no multiple"), cpu.recording(tokens=3):
        llmkernels.rms_norm(x[:4], gain, backend="cpu")
    for wrong in ({"tokens": 0}, {"sequences": 0}):
        with pytest.raises(ValueError, match="at least one"):
            cpu.recording(**wrong)
    with pytest.raises(ValueError, match="no less than 0"):
        recording.replay(tokens=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["triton"])
def test_on_a_gpu_a_cuda_graph_gives_the_bits_of_plain_steps(backend):
    with llmkernels.use(backend):
        recorded, plain = (
            LLM(tokenizer=False, device="cuda", graphs=graphs, max_length=512, dtype="bfloat16")
            for graphs in (True, False)
        )
        assert texts(recorded) == texts(plain)
    assert recorded.stats()["decode_replayed_steps"] > 0, recorded._runner.target.graphs.refused


def test_graphs_can_be_left_out():
    assert isinstance(engine()._runner.target.graphs, DecodeGraphs)
    assert engine(False)._runner.target.graphs is None
