"""LLM as its user sees it: seeds, streams, limits, and what is said when something is wrong."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkernels
from llmkernels.engine import LLM, CheckpointError, SamplingParams, shipped_model
from llmkernels.engine.sampling import uniform
from llmkernels.models.tokenizer import Detokenizer

PROMPTS = ["The read() system call", "A package", "import os", "DESCRIPTION\n", "The following example shows how to"]


@pytest.fixture(autouse=True)
def quiet():
    with llmkernels.use(policy="silent"):
        yield


@pytest.fixture(scope="module")
def llm():
    with llmkernels.use(policy="silent"):
        return LLM(dtype="float32")


def sampled(seed=1, **more):
    return SamplingParams(
        **{"max_tokens": 20, "temperature": 0.9, "top_p": 0.95, "seed": seed, "ignore_eos": True} | more
    )


def test_a_seed_gives_its_text_whatever_the_batch(llm):
    together = llm.generate(PROMPTS, [sampled(seed) for seed in range(len(PROMPTS))])
    for seed, (prompt, output) in enumerate(zip(PROMPTS, together, strict=True)):
        assert llm.generate(prompt, sampled(seed))[0].tokens == output.tokens
    other = llm.generate(PROMPTS[0], sampled(99))[0]
    assert other.tokens != together[0].tokens
    drawn = llm.generate(PROMPTS[0], sampled(None))[0]
    assert llm.generate(PROMPTS[0], sampled(drawn.seed))[0].tokens == drawn.tokens


def test_preemption_changes_no_text(llm):
    tight = LLM(dtype="float32", kv_cache_pages=8, page_size=4, max_batch_tokens=8)
    wish = sampled(max_tokens=18)
    assert [o.text for o in tight.generate(PROMPTS, wish)] == [o.text for o in llm.generate(PROMPTS, wish)]
    assert tight._scheduler.preemptions
    assert tight._scheduler.pool.free == 8


def test_every_wish_reaches_the_sample_op(llm, monkeypatch):
    """Row by row, with a new number for each token; what no row asks for is left out."""
    calls, sample = [], llmkernels.sample

    def noted(logits, numbers, **options):
        calls.append({"uniform": numbers} | options)
        return sample(logits, numbers, **options)

    monkeypatch.setattr(llmkernels, "sample", noted)
    wishes = [sampled(5, top_k=9), sampled(6, top_p=0.5, temperature=0.3), SamplingParams(seed=7, ignore_eos=True)]
    outputs = llm.generate([[5], [6], [7]], wishes)
    llm.generate([8], SamplingParams(max_tokens=1))
    first = {name: values.tolist() for name, values in calls[0].items()}
    assert first["temperature"] == pytest.approx([0.9, 0.3, 0])
    assert first["top_p"] == pytest.approx([0.95, 0.5, 1])
    assert first["top_k"] == [9, 0, 0]
    assert "min_p" not in first
    assert set(calls[-1]) == {"uniform", "temperature"}
    for row, output in enumerate(outputs[:2]):
        numbers = [call["uniform"][row].item() for call in calls[: len(output.tokens)]]
        assert numbers == [uniform(output.seed, counter) for counter in range(len(output.tokens))]


def test_uniform_numbers_are_uniform_and_repeatable():
    numbers = torch.tensor([uniform(seed, counter) for seed in range(100) for counter in range(100)])
    assert uniform(5, 7) == uniform(5, 7)
    assert len(numbers.unique()) > 9980  # 24 bits: about 3 of 10,000 coincide
    counts = numbers.histc(20, 0, 1)
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-square with 19 degrees of freedom: 0.07 %
    assert abs(torch.corrcoef(numbers.view(100, 100)[:, :2].T)[0, 1]) < 0.4


def test_a_stream_joined_is_the_text(llm):
    wish = sampled(max_tokens=60)
    deltas = [*llm.stream(PROMPTS[0], wish)]
    assert "".join(d.text for d in deltas) == llm.generate(PROMPTS[0], wish)[0].text == deltas[-1].output.text
    assert deltas[-1].output.finish_reason == "length"
    assert len(deltas) > 30


def test_streams_advance_together(llm):
    wishes = [sampled(seed, max_tokens=12) for seed in range(3)]
    streams = [llm.stream(prompt, wish) for prompt, wish in zip(PROMPTS, wishes, strict=False)]
    texts = ["", "", ""]
    open_ = set(range(3))
    while open_:
        for i in [*open_]:
            delta = next(streams[i], None)
            texts[i] += delta.text if delta else ""
            open_ -= set() if delta else {i}
    assert texts == [o.text for o in llm.generate(PROMPTS[:3], wishes)]


def test_a_closed_stream_frees_its_pages(llm):
    stream = llm.stream(PROMPTS[0], sampled())
    delta = next(stream)
    assert llm._scheduler.pool.free < llm._scheduler.pool.pages
    stream.close()
    assert delta.output.finish_reason == "abort"
    assert llm._scheduler.pool.free == llm._scheduler.pool.pages


def test_nothing_stays_behind_when_a_step_fails(llm, monkeypatch):
    monkeypatch.setattr(llm._runner, "run", lambda chunks: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPTS, sampled())
    assert llm._scheduler.pool.free == llm._scheduler.pool.pages
    assert not llm.step()


@pytest.mark.parametrize("text", ["naïve café, façade", "日本語のテキスト 🎉🎉 done", "a\tb\n\n  c", "x \ufffd y"])
def test_pieces_are_whole_characters(llm, text):
    ids = llm.encode(text)[1:]
    for split in range(0, len(ids) + 1, 3):  # also with the prompt ending in the middle of a character
        detokenizer = Detokenizer(llm.tokenizer, ids[:split])
        pieces = [detokenizer.push(token) for token in ids[split:]]
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
        start = llm.tokenizer.decode(ids[:split]).rstrip("\ufffd")
        assert start + "".join(pieces) == text


def test_stop_tokens_and_limits(llm):
    free = llm.generate(PROMPTS[0], sampled())[0]
    assert (free.finish_reason, len(free.tokens)) == ("length", 20)
    stop = free.tokens[8]
    stopped = llm.generate(PROMPTS[0], sampled(stop_token_ids=[stop]))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.text == llm.tokenizer.decode(stopped.tokens[:-1])
    short = LLM(dtype="float32", max_length=16)
    full = short.generate(PROMPTS[0], sampled())[0]
    assert len(full.prompt_tokens) + len(full.tokens) == 16
    assert full.finish_reason == "length"


def test_eos_ends_a_text_unless_ignored(llm, monkeypatch):
    free = llm.generate(PROMPTS[0], sampled())[0]
    monkeypatch.setattr(llm._intake, "stop", frozenset([free.tokens[5]]))
    assert llm.generate(PROMPTS[0], sampled(ignore_eos=False))[0].finish_reason == "stop"
    assert llm.generate(PROMPTS[0], sampled())[0].tokens == free.tokens


def test_logprobs_are_of_the_models_own_distribution(llm):
    output = llm.generate(PROMPTS[0], sampled(logprobs=True, max_tokens=6))[0]
    again = llm.generate(
        output.prompt_tokens + output.tokens[:-1], sampled(logprobs=True, max_tokens=1, temperature=0.0)
    )[0]
    assert len(output.logprobs) == 6
    assert all(p <= 0 for p in output.logprobs)
    assert again.logprobs[0] >= output.logprobs[-1] - 1e-5  # the greedy token is the likeliest
    assert llm.generate(PROMPTS[0], sampled())[0].logprobs == []


def test_defaults_come_from_the_checkpoint(llm):
    assert llm.default_params == SamplingParams(temperature=0.7, top_p=0.95)
    assert llm._intake.stop == {1}


def copy(path, without=()):
    for file in shipped_model().iterdir():
        if file.name not in without:
            (path / file.name).symlink_to(file)
    return path


def replaced(path, name, content):
    """The shipped checkpoint with one file replaced."""
    copy(path, without=[name])
    (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def config(**changes):
    return json.loads((shipped_model() / "config.json").read_text()) | changes


def weights():
    return (shipped_model() / "model.safetensors").read_bytes()


def with_header(change):
    """The shipped weights under a changed header."""
    data = weights()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(change(header)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def tensor_set(name, **fields):
    return lambda header: header | {name: header[name] | fields}


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "is GPT2LMHeadModel, which is not supported; .*Llama.*Mistral.*Qwen3"),
        ({"architectures": ["X"], "auto_map": {"AutoModelForCausalLM": "evil.X"}}, "is X, which is not supported"),
        ({"architectures": None}, "model_type 'llama' without architectures"),
        ({"hidden_size": -1}, "hidden_size is -1; it must be a positive integer"),
        ({"num_hidden_layers": "six"}, "num_hidden_layers is 'six'"),
        ({"hidden_size": 128}, "shape .* config.json asks for"),
        ({"num_hidden_layers": 7}, "has no tensor model.layers.6"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'; the supported ones are default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear needs factor"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["x"]},
            "for each of 6 layers",
        ),
        ({"dtype": "int4"}, "dtype is 'int4'; use one of auto, float32"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
        ({"quantization_config": {"quant_method": "exl2"}}, "quant_method is 'exl2'; the readable ones are gptq, awq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 3}}, "AWQ with bits=3"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "has no tensor .*qweight"),
    ],
)
def test_a_config_that_cannot_be(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        LLM(replaced(tmp_path, "config.json", config(**changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", lambda: b"{", "config.json is not readable JSON"),
        ("config.json", lambda: [], "must be a JSON object"),
        ("generation_config.json", lambda: {"eos_token_id": ["</s>"]}, "eos_token_id is"),
        ("tokenizer.json", lambda: {"version": "1.0"}, "lacks model"),
        ("tokenizer.json", lambda: b'{"version": ', "tokenizer.json is not readable JSON"),
        ("model.safetensors", lambda: weights()[:-1000], "not a whole"),
        ("model.safetensors", lambda: weights()[:100], "not a whole"),
        ("model.safetensors", lambda: b"", "not a whole"),
        ("model.safetensors", lambda: with_header(tensor_set(NORM, data_offsets=[0, 512])), "not a whole"),
        ("model.safetensors", lambda: with_header(tensor_set(NORM, data_offsets=[2**62, 2**62 + 512])), "not a whole"),
        ("model.safetensors", lambda: with_header(tensor_set(NORM, shape=[-256])), "not a whole"),
        ("model.safetensors", lambda: with_header(tensor_set(NORM, shape=[2**63, 2**63])), "not a whole"),
        ("model.safetensors", lambda: with_header(tensor_set(NORM, dtype="X")), "not a whole"),
        ("model.safetensors", lambda: with_header(lambda h: {k: v for k, v in h.items() if k != NORM}), "not a whole"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, content, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        LLM(replaced(tmp_path, name, content()))
    assert "\n" not in str(caught.value)


def test_duplicate_keys_in_a_header(tmp_path):
    data = weights()
    (size,) = struct.unpack("<Q", data[:8])
    text = (
        data[8 : 8 + size]
        .rstrip()
        .replace(b"{", b'{"model.norm.weight":{"dtype":"BF16","shape":[256],"data_offsets":[0,512]},', 1)
    )
    with pytest.raises(CheckpointError, match="not a whole safetensors"):
        LLM(replaced(tmp_path, "model.safetensors", struct.pack("<Q", len(text)) + text + data[8 + size :]))


def test_files_that_are_missing(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        LLM(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        LLM(tmp_path)
    copy(tmp_path, without=["model.safetensors", "tokenizer.json"])
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no index"):
        LLM(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        LLM(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for names, words in (
        ({"a": "../a.safetensors"}, "must give a file beside it"),
        ({"a": "a.safetensors"}, "is missing"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(CheckpointError, match=words):
            LLM(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(shipped_model() / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing; .*tokenizer=False"):
        LLM(tmp_path)
    assert LLM(tmp_path, tokenizer=False).generate([5, 6], SamplingParams(max_tokens=2))[0].text == ""


def test_a_tensor_of_another_shape(tmp_path):
    tensors = load_file(shipped_model() / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(768, 255, dtype=torch.bfloat16)
    copy(tmp_path, without=["model.safetensors"])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight has shape \(768, 255\); .* \(768, 256\)"
    ):
        LLM(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        ([[]], "prompt is empty"),
        ([[4096]], "4096 is not a token id; this model's are 0 to 4095"),
        ([[-1]], "-1 is not a token id"),
        ([[True]], "True is not a token id"),
        ([[1.5]], "1.5 is not a token id"),
        ([[5] * 2048], "the prompt has 2048 tokens; at most 2047"),
        ([None], "the prompt is None; give a text"),
        ([PROMPTS[0], []], "prompt is empty"),
    ],
)
def test_a_bad_prompt_runs_nothing(llm, prompt, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(prompt)
    assert not llm.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": 2}, "min_p is 2"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1"),
    ],
)
def test_bad_wishes(options, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; use one of auto, float32, bfloat16, float16"),
        (
            {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
            "kv_cache_dtype is 'bfloat16'; use one of auto, float32, int8",
        ),
        ({"device": "warp"}, "device is 'warp'"),
        ({"quantize": "w5a16"}, "w5a16"),
        ({"quantize_head": "w5a16"}, "w5a16"),
        ({"page_size": 0}, "page_size is 0"),
        ({"kv_cache_bytes": 100}, "kv_cache_bytes is 100; a page of 16 tokens takes 49152"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"max_length": "long"}, "max_length is 'long'; give an integer"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json is missing"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        LLM(**options)


def test_a_request_larger_than_the_cache():
    llm = LLM(kv_cache_pages=4)
    with pytest.raises(ValueError, match="5 pages of 16; the cache has 4"):
        llm.generate([PROMPTS[1], [5] * 60], SamplingParams(max_tokens=10))
    assert not llm.step()


def test_lists_of_prompts(llm):
    assert llm.generate([]) == []
    with pytest.raises(ValueError, match="params has 1 entries for 2 prompts"):
        llm.generate(PROMPTS[:2], [SamplingParams()])
    mixed = llm.generate([PROMPTS[0], llm.encode(PROMPTS[0])], SamplingParams(max_tokens=5))
    assert mixed[0].tokens == mixed[1].tokens
    with pytest.raises(ValueError, match="tokenizer=False"):
        LLM(tokenizer=False).generate("text")
