"""The engine computes what transformers computes: logits within 1e-4 in float32, whatever the batch and the chunks."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import llmkernels
from llmkernels import ledger
from llmkernels.engine import LLM, SamplingParams, shipped_model
from llmkernels.engine.cache import KVCache
from llmkernels.engine.pages import PagePool
from llmkernels.engine.runner import Runner
from llmkernels.engine.scheduler import Scheduler
from llmkernels.engine.sequence import Sequence
from llmkernels.models.weights import Checkpoint, load

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama, rope llama3, biases": ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama, rope linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2, one layer's window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rms_norm_eps": 1e-5}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    """The reference may answer here: these tests are about the engine."""
    with llmkernels.use(policy="silent"):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> (transformers' model, directory of its checkpoint), made when first asked for."""
    made = {}

    def model(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("model"))
        return made[name]

    return model


def make(name, path):
    """A random model with attention so sharp that a wrong mask or angle shows, and no norm or bias left at 1 or 0."""
    family, options = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**SMALL | options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for tensor, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
            if "q_proj" in tensor or "k_proj" in tensor or "q_norm" in tensor:
                weight.mul_(12 if weight.ndim == 2 else 3)
    model.save_pretrained(path)
    return model, path


class Rig:
    """Scheduler, cache and model without the LLM around them; keeps the logits of every sampled position."""

    def __init__(self, path, max_batch_tokens=64, pages=64, page_size=4):
        checkpoint = Checkpoint(path)
        model = load(checkpoint, "float32", CPU, 64)
        cache = KVCache(checkpoint.config, pages, page_size, torch.float32, CPU)
        for held in (cache.k, cache.v):
            held.fill_(torch.nan)  # what nobody wrote must not matter
        self.runner = Runner(model, cache)
        self.scheduler = Scheduler(PagePool(pages), page_size, max_batch_tokens, min(8, max_batch_tokens))

    def run(self, prompts, arrivals=None, answer=6):
        """[(tokens, logits at each position from the prompt's last to the last but one)], prompts arriving at steps."""
        sequences = [Sequence(list(p), len(p), len(p) + answer, payload=[]) for p in prompts]
        queue = sorted(zip(arrivals or [0] * len(prompts), range(len(prompts)), strict=True))
        step = 0
        while queue or self.scheduler.waiting or self.scheduler.running:
            while queue and queue[0][0] <= step:
                self.scheduler.add(sequences[queue.pop(0)[1]])
            if chunks := self.scheduler.schedule():
                logits = self.runner.logits(chunks)
                for row, chunk in zip(logits, [c for c in chunks if c.samples], strict=True):
                    chunk.sequence.payload.append(row)
                self.scheduler.advance(chunks, logits.argmax(-1).tolist())
            step += 1
        return [(s.tokens, torch.stack(s.payload)) for s in sequences]


def expected(model, tokens, count):
    """transformers' logits, in one pass over the whole text, at the positions that `count` tokens were sampled from."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -count - 1 : -1]


def check(model, results):
    for tokens, logits in results:
        torch.testing.assert_close(logits, expected(model, tokens, len(logits)), atol=1e-4, rtol=0)


def prompts_of(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(SMALL["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_in_a_mixed_batch(models, name):
    model, path = models(name)
    check(model, Rig(path).run(prompts_of([1, 30, 9, 17]), arrivals=[0, 0, 2, 3]))


@pytest.mark.parametrize("name", ["llama, rope llama3, biases", "mistral", "qwen2", "qwen3"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_chunks_in_any_order_of_arrival(models, name, data):
    model, path = models(name)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    rig = Rig(
        path,
        max_batch_tokens=data.draw(st.integers(1, 24)),
        page_size=data.draw(st.sampled_from([1, 3, 4, 16])),
        pages=data.draw(st.integers(48, 96)),  # with one slot a page a long request may preempt others
    )
    check(model, rig.run(prompts_of(lengths), [data.draw(st.integers(0, 9)) for _ in lengths], answer=4))


@pytest.mark.parametrize("budget", [6, 7, 8, 9])
def test_a_window_shorter_than_the_prompt_at_every_boundary(models, budget):
    model, path = models("mistral")
    check(model, Rig(path, max_batch_tokens=budget).run(prompts_of([33]), answer=2))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("mistral", "sliding_window", 8),
        ("qwen2, one layer's window", "max_window_layers", 2),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 9000.0}),
        ("llama, rope llama3, biases", "rope_parameters", LLAMA3 | {"original_max_position_embeddings": 31}),
        ("qwen3", "rms_norm_eps", 1e-3),
    ],
)
def test_a_wrong_number_would_be_seen(models, tmp_path, name, key, value):
    """The comparison above is worth something: off by one is far outside its bound."""
    model, path = models(name)
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    edit(tmp_path, {key: value}, without=["layer_types"])
    ((tokens, logits),) = Rig(tmp_path).run(prompts_of([30]), answer=1)
    assert (logits - expected(model, tokens, 1)).abs().max() > 1e-3


def edit(path, changes, without=()):
    file = path / "config.json"
    raw = {k: v for k, v in json.loads(file.read_text()).items() if k not in without}
    file.unlink()
    file.write_text(json.dumps(raw | changes))


def test_older_configs_mean_the_same(models, tmp_path):
    model, _ = models("llama, rope llama3, biases")
    model.save_pretrained(tmp_path)
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    edit(
        tmp_path,
        {"rope_theta": 100.0, "rope_scaling": scaling, "torch_dtype": "float32"},
        ["rope_parameters", "head_dim", "dtype"],
    )
    check(model, Rig(tmp_path).run(prompts_of([20])))


def test_a_window_that_nobody_asked_for(models, tmp_path):
    model, _ = models("qwen2")
    model.save_pretrained(tmp_path)
    edit(tmp_path, {"sliding_window": 5, "max_window_layers": 0}, without=["use_sliding_window", "layer_types"])
    check(model, Rig(tmp_path).run(prompts_of([20])))


def test_shards_are_read_through_the_index(models, tmp_path):
    model, _ = models("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 2
    check(model, Rig(tmp_path).run(prompts_of([20])))


def test_the_shipped_checkpoint_says_what_transformers_says():
    model = transformers.LlamaForCausalLM.from_pretrained(
        shipped_model(), dtype=torch.float32, attn_implementation="eager"
    )
    llm = LLM(dtype="float32", max_batch_tokens=16)
    outputs = llm.generate(
        ["The read() system call", "import", "A package must not depend on"],
        SamplingParams(max_tokens=24, logprobs=True),
    )
    for output in outputs:
        prompt = torch.tensor([output.prompt_tokens])
        want = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=2)[0, prompt.shape[1] :].tolist()
        assert output.tokens == want
        assert output.text == llm.tokenizer.decode(want)
        logprobs = expected(model, output.prompt_tokens + want, 24).log_softmax(-1)
        assert output.logprobs == pytest.approx([logprobs[i, token].item() for i, token in enumerate(want)], abs=1e-4)


def test_the_draft_reads_the_same_vocabulary():
    draft = LLM(shipped_model("manual-5m-draft"), tokenizer=shipped_model() / "tokenizer.json")
    assert draft.config.vocab == LLM().config.vocab == draft.tokenizer.get_vocab_size()
    assert draft.generate("The", SamplingParams(max_tokens=3))[0].tokens


@pytest.mark.parametrize(("name", "norms"), [("llama", 0), ("qwen3", 2)])
def test_the_ledger_shows_every_hot_op(models, name, norms):
    llm = LLM(models(name)[1], tokenizer=False)
    ledger.reset()
    llm.generate([[1, 2, 3], [4]], SamplingParams(max_tokens=5, temperature=0.8, seed=1))
    calls = {op: sum(row["calls"] for row in backends.values()) for op, backends in ledger.read().items()}
    steps, layers = 5, SMALL["num_hidden_layers"]
    want = {
        "norm_linear_activation": steps * (4 * layers + 1),
        "paged_attention": steps * layers,
        "write_kv": steps * layers,
        "rotary_embedding": steps * layers,
        "rms_norm": steps * layers * norms,
        "sample": steps,
    }
    assert {op: calls.get(op, 0) for op in want} == want


MOVES = {
    *(
        "index",
        "index_select",
        "embedding",
        "view",
        "slice",
        "split_with_sizes",
        "split",
        "_to_copy",
        "lift_fresh",
        "detach",
        "alias",
    ),
    *("select", "reshape", "unsqueeze", "_unsafe_view", "_local_scalar_dense", "clone", "unbind"),
}


class Seen(TorchDispatchMode):
    """Counts torch operations while `inside` is 0: those that no llmkernels op made."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.inside:
            self.outside[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8"}])
def test_outside_of_the_ops_the_engine_only_moves_data(models, monkeypatch, options):
    llm, seen = LLM(models("qwen3")[1], tokenizer=False, **options), Seen()

    def watched(op):
        def call(*args, **kwargs):
            seen.inside += 1
            try:
                return op(*args, **kwargs)
            finally:
                seen.inside -= 1

        return call

    for name in ("norm_linear_activation", "paged_attention", "write_kv", "rotary_embedding", "rms_norm", "sample"):
        monkeypatch.setattr(llmkernels, name, watched(getattr(llmkernels, name)))
    with seen:
        llm.generate([[1, 2, 3], [4]], SamplingParams(max_tokens=3))
    assert set(seen.outside) <= MOVES


def test_the_metadata_pass_every_check(models):
    """The engine switches the checks of values off, because they would find nothing."""
    llm = LLM(models("mistral")[1], tokenizer=False, max_batch_tokens=5, page_size=3, kv_cache_pages=16)
    prompts, wish = prompts_of([1, 14, 22, 5]), SamplingParams(max_tokens=12)
    unchecked = [output.tokens for output in llm.generate(prompts, wish)]
    with llmkernels.use(checked=True):
        assert [output.tokens for output in llm.generate(prompts, wish)] == unchecked
    assert llm._scheduler.preemptions


@pytest.mark.parametrize(("dtype", "limit"), [(torch.int8, 127), (torch.float8_e4m3fn, 448)])
def test_scales_of_a_quantized_cache_just_fit(dtype, limit):
    config = Checkpoint(shipped_model()).config
    sample, cache = (KVCache(config, 3, 4, kind, CPU) for kind in (torch.float32, dtype))
    sample.k.normal_(generator=torch.Generator().manual_seed(1))
    sample.v.copy_(sample.k).mul_(3)
    for held in (sample.k, sample.v):
        held[:, 2:] = 99  # a page that is not part of the sample
    cache.scales_from(sample, 2)
    for layer in range(config.layers):
        largest = sample.k[layer, :2].abs().amax((0, 1, 3))
        torch.testing.assert_close(cache.k_scale[layer] * limit, largest)
        torch.testing.assert_close(cache.v_scale[layer] * limit, 3 * largest)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"kv_cache_dtype": "int8"}, 0.03),
        ({"kv_cache_dtype": "float8_e4m3fn"}, 0.06),
        ({"quantize": "w8a16"}, 0.03),
        ({"quantize": "w4a16_g128"}, 0.3),
        ({"quantize_head": "w8a16"}, 0.03),
    ],
)
def test_quantized_weights_and_caches_stay_near(options, bound):
    """Of the logits' own spread, on the shipped checkpoint."""
    logits = []
    for wishes in ({}, options):
        llm = LLM(dtype="float32", **wishes)
        sequence = Sequence(llm.encode("The read() system call reads from a file descriptor into"), 1, 100)
        llm._scheduler.add(sequence)
        logits.append(llm._runner.logits(llm._scheduler.schedule())[0])
    error = (logits[1] - logits[0]).std() / logits[0].std()
    assert 0 < error < bound
