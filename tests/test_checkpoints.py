"""Checkpoints as LLM reads them: what is said of configs, headers and files that cannot be."""

import json
import math
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkernels
from llmkernels.engine import LLM, CheckpointError, SamplingParams, shipped_model


@pytest.fixture(autouse=True)
def quiet():
    with llmkernels.use(policy="silent"):
        yield


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
        ({"architectures": True}, "architectures is True; it must be a list of names"),
        ({"hidden_size": -1}, "hidden_size is -1; it must be a positive integer"),
        ({"num_hidden_layers": 2**31 - 1}, "a positive integer, at most 10000"),
        ({"vocab_size": 2**31}, "a positive integer, at most 2147483647"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a positive number"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; it must be true or false"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 0.5},
            "sliding_window is 0.5; .* or null for none",
        ),
        ({"rope_parameters": ["linear", 2]}, "it must be an object"),
        ({"rope_parameters": {"rope_theta": math.nan}}, "default needs rope_theta, a positive number; it is nan"),
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


def test_a_context_that_the_cache_cannot_hold(tmp_path):
    """Tables of angles for 2^31 positions would not fit into memory either; positions beyond the cache need none."""
    llm = LLM(
        replaced(tmp_path, "config.json", config(max_position_embeddings=2**31 - 1)), kv_cache_pages=8, page_size=16
    )
    plain = LLM(kv_cache_pages=8, page_size=16)
    greedy = SamplingParams(max_tokens=4, temperature=0)
    assert llm.generate([1, 2, 3], greedy)[0].tokens == plain.generate([1, 2, 3], greedy)[0].tokens


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
