"""Adapters: each row of a batch says what the model with its adapter's weights merged says."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkernels
from llmkernels import ledger
from llmkernels.engine import LLM, CheckpointError, SamplingParams, Speculation

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
}
PARTS = {
    "self_attn": {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)},
    "mlp": {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)},
}
ADAPTERS = {  # targets, rank, alpha, rank-stabilised
    "all": (("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 4, 8, False),
    "attention": (("q_proj", "v_proj"), 8, 4, False),
    "mlp": (("up_proj", "down_proj"), 1, 3, True),
}
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17]]


@pytest.fixture(autouse=True)
def quiet():
    with llmkernels.use(policy="silent"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, the adapters by name, and merged-<name>/, computed in float64."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(root / "base")
    for name, wishes in ADAPTERS.items():
        tensors = write(root / name, *wishes)
        merged = load_file(root / "base" / "model.safetensors")
        scale = wishes[2] / (wishes[1] ** 0.5 if wishes[3] else wishes[1])
        for key in [key for key in tensors if ".lora_A." in key]:
            a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            weight = key.removeprefix("base_model.model.").replace(".lora_A", "")
            merged[weight] = (merged[weight].double() + scale * (b @ a)).float()
        (root / f"merged-{name}").mkdir()
        save_file(merged, root / f"merged-{name}" / "model.safetensors")
        (root / f"merged-{name}" / "config.json").symlink_to(root / "base" / "config.json")
    return root


def write(path, targets, rank, alpha, stabilised, seed=0, **more):
    path.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed + rank)
    tensors = {}
    for layer in range(2):
        for block, parts in PARTS.items():
            for part, (rows, width) in parts.items():
                if part in targets:
                    at = f"base_model.model.model.layers.{layer}.{block}.{part}.lora_"
                    tensors[f"{at}A.weight"] = 0.2 * torch.randn(rank, width, generator=generator)
                    tensors[f"{at}B.weight"] = 0.2 * torch.randn(rows, rank, generator=generator)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": stabilised, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": [*targets]} | more))
    return tensors


def engine(folder, name="base", adapters=(), **more):
    llm = LLM(folder / name, tokenizer=False, **{"page_size": 4} | more)
    for adapter in adapters:
        llm.load_adapter(adapter, folder / adapter)
    return llm


def wish(**more):
    return SamplingParams(**{"max_tokens": 12, "logprobs": True} | more)


@pytest.fixture(scope="module")
def expected(folder):
    """Name or None -> the outputs of the merged model, alone."""
    with llmkernels.use(policy="silent"):
        names = {None: "base"} | {name: f"merged-{name}" for name in ADAPTERS}
        return {name: engine(folder, path).generate(PROMPTS, wish()) for name, path in names.items()}


def same(output, want):
    assert output.tokens == want.tokens
    assert output.logprobs == pytest.approx(want.logprobs, abs=2e-4)


def together(llm, wishes=None):
    """Every prompt under every adapter and none, in one batch: {name: outputs}."""
    names = [None, *llm.adapters]
    outputs = {name: [llm.add(prompt, wishes or wish(), adapter=name)[0] for prompt in PROMPTS] for name in names}
    while llm.step():
        pass
    llm.check()
    return outputs


@pytest.mark.parametrize(
    "more", [{}, {"max_batch_tokens": 13, "kv_cache_pages": 18}, {"speculation": Speculation(ngram=2)}]
)
def test_each_row_equals_the_merged_model(folder, expected, more):
    llm = engine(folder, adapters=ADAPTERS, **more)
    for _ in range(2):  # the second time with prefixes that are found again, each under its own adapter
        for name, outputs in together(llm).items():
            for output, want in zip(outputs, expected[name], strict=True):
                same(output, want)
    assert len({tuple(outputs[0].tokens) for outputs in expected.values()}) == 4


def test_modules_of_their_own_rank_and_alpha(folder, tmp_path):
    """rank_pattern and alpha_pattern: the end of a module's name, or all of it; the first that matches."""
    patterns = {
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 6, "layers.1.*k_proj": 2, "k_proj": 3},
        "alpha_pattern": {"self_attn.o_proj": 16, r"mlp\.up_proj": 1},
    }
    scales = {"0.self_attn.q_proj": (6, 8), "1.self_attn.k_proj": (2, 8), "0.self_attn.k_proj": (3, 8)}
    for layer in range(2):
        scales |= {f"{layer}.self_attn.o_proj": (4, 16), f"{layer}.mlp.up_proj": (4, 1)}
    tensors = write(tmp_path, *ADAPTERS["all"], **patterns)
    scaled, merged = {}, load_file(folder / "base" / "model.safetensors")
    for key in [key for key in tensors if ".lora_A." in key]:
        module = key.removeprefix("base_model.model.model.layers.").removesuffix(".lora_A.weight")
        rank, alpha = scales.get(module, (4, 8))
        other = key.replace("lora_A", "lora_B")
        a, b = torch.cat([tensors[key]] * 2)[:rank], torch.cat([tensors[other]] * 2, 1)[:, :rank]
        scaled |= {key: a.contiguous(), other: b.contiguous()}
        weight = key.removeprefix("base_model.model.").replace(".lora_A", "")
        merged[weight] = (merged[weight].double() + alpha / rank * (b.double() @ a.double())).float()
    save_file(scaled, tmp_path / "adapter_model.safetensors")
    (tmp_path / "merged").mkdir()
    save_file(merged, tmp_path / "merged" / "model.safetensors")
    (tmp_path / "merged" / "config.json").symlink_to(folder / "base" / "config.json")
    llm = engine(folder, adapters=["all"])  # of one rank, beside it
    llm.load_adapter("patterns", tmp_path)
    wanted = engine(tmp_path, "merged").generate(PROMPTS, wish())
    for output, want in zip(llm.generate(PROMPTS, wish(), adapter="patterns"), wanted, strict=True):
        same(output, want)


def test_what_transformers_says_of_the_merged_weights(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "merged-all")
    llm = engine(folder, adapters=["all"])
    output = llm.generate(PROMPTS[2], wish(), adapter="all")[0]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[2] + output.tokens])).logits[0, len(PROMPTS[2]) - 1 : -1]
    assert logits.argmax(-1).tolist() == output.tokens
    want = logits.log_softmax(-1).amax(-1).tolist()
    assert output.logprobs == pytest.approx(want, abs=1e-4)


def test_quantized_base_weights(folder):
    """What an adapter adds to rounded weights, it adds unrounded: to the logits of the first token of the base."""
    plain, rounded = (engine(folder, adapters=["attention"], quantize=scheme) for scheme in (None, "w8a16"))
    for llm in (plain, rounded):
        outputs = together(llm)
        assert outputs[None][0].tokens != outputs["attention"][0].tokens
    first = [llm.generate(PROMPTS[0], wish(max_tokens=1), adapter="attention")[0] for llm in (plain, rounded)]
    assert first[0].logprobs == pytest.approx(first[1].logprobs, abs=0.05)


def test_nobody_pays_for_adapters_that_nobody_uses(folder):
    llm = engine(folder, adapters=ADAPTERS)
    llm.generate(PROMPTS[0], wish(), adapter="all")
    calls = []
    for name in (None, "all"):
        ledger.reset()
        llm.generate(PROMPTS[1], wish(max_tokens=3), adapter=name)
        calls.append({op: sum(row["calls"] for row in rows.values()) for op, rows in ledger.read().items()})
    assert not calls[0].get("lora_gemm")
    assert not calls[0].get("rms_norm")
    assert calls[1]["lora_gemm"] == 3 * 2 * 7  # steps, layers, modules


def test_prefixes_are_not_shared_between_adapters(folder):
    llm = engine(folder, adapters=["all"])
    prompt = [*range(20)]
    assert [llm.generate(prompt, wish(), adapter=name)[0].cached_tokens for name in (None, "all", None, "all")] == [
        0,
        0,
        19,
        19,
    ]
    llm.unload_adapter("all")
    llm.load_adapter("all", folder / "attention")
    assert llm.generate(prompt, wish(), adapter="all")[0].cached_tokens == 0


def test_unloaded_while_in_use(folder, expected):
    """Its requests finish, with its weights; new ones are refused; its place is given to nobody before that."""
    llm = engine(folder, adapters=["all", "attention"])
    outputs = llm.add(PROMPTS[0], wish(), adapter="all") + llm.add(PROMPTS[1], wish(), adapter="attention")
    llm.step()
    llm.unload_adapter("all")
    with pytest.raises(ValueError, match="adapter 'all' is being unloaded; load it again to use it"):
        llm.add(PROMPTS[0], wish(), adapter="all")
    llm.load_adapter("mlp", folder / "mlp")
    outputs += llm.add(PROMPTS[2], wish(), adapter="mlp")
    while llm.step():
        pass
    same(outputs[0], expected["all"][0])
    same(outputs[1], expected["attention"][1])
    same(outputs[2], expected["mlp"][2])
    with pytest.raises(ValueError, match="there is no adapter 'all'; loaded are: attention, mlp"):
        llm.add(PROMPTS[0], wish(), adapter="all")
    llm.load_adapter("again", folder / "all")  # in the place that is free now, of another rank before
    same(llm.generate(PROMPTS[0], wish(), adapter="again")[0], expected["all"][0])
    for name in llm.adapters:
        llm.unload_adapter(name)
    same(llm.generate(PROMPTS[0], wish())[0], expected[None][0])


def test_a_request_that_never_ran_holds_no_adapter(folder):
    llm = engine(folder, adapters=["all"], kv_cache_pages=3)
    with pytest.raises(ValueError, match="the cache has 3"):
        llm.generate(PROMPTS[0], wish(max_tokens=60), adapter="all")
    aborted = llm.add(PROMPTS[0], wish(max_tokens=4), adapter="all")[0]
    llm.unload_adapter("all")
    llm.abort(aborted)
    llm.step()
    with pytest.raises(ValueError, match="there is no adapter 'all'; loaded are: none"):
        llm.generate(PROMPTS[0], wish(), adapter="all")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 2}}, r"lora_A of 0.self_attn.q_proj is of shape .* needs \(2, 64\)"),
        ({"rank_pattern": {"(a+)+b": 2}}, r"rank_pattern is .*; names of modules with up to 3 of"),
        ({"alpha_pattern": {"[": 2}}, "alpha_pattern holds no regular expression"),
        ({"alpha_pattern": {"q_proj": "2"}}, "lora_alpha is '2'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"r": 0}, "r is 0; it must be an integer from 1 to 512"),
        ({"r": 3}, r"lora_A of 0.self_attn.q_proj is of shape \(4, 64\); this model needs \(3, 64\)"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ],
)
def test_configs_that_are_refused(folder, tmp_path, changes, words):
    write(tmp_path, *ADAPTERS["all"], **changes)
    llm = engine(folder)
    with pytest.raises(CheckpointError, match=words):
        llm.load_adapter("x", tmp_path)
    assert not llm.adapters


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (("lora_A", "lora_magnitude_vector"), "lora_magnitude_vector.weight is not supported"),
        (("layers.0", "layers.7"), "it changes 7.mlp.down_proj, .* which this model does not have"),
        (("lora_B", None), "lora_B of 0.self_attn.q_proj is missing"),
        (("", None), "holds nothing"),
    ],
)
def test_tensors_that_are_refused(folder, tmp_path, rename, words):
    tensors = write(tmp_path, *ADAPTERS["all"])
    old, new = rename
    tensors = {key.replace(old, new) if new else key: t for key, t in tensors.items() if new or old not in key}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        engine(folder).load_adapter("x", tmp_path)


def test_names_and_files(folder, tmp_path):
    llm = engine(folder, adapters=["all"])
    with pytest.raises(ValueError, match="adapter 'all' is loaded already"):
        llm.load_adapter("all", folder / "all")
    with pytest.raises(ValueError, match="name is ''"):
        llm.load_adapter("", folder / "all")
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        llm.load_adapter("x", tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text((folder / "all" / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        llm.load_adapter("x", tmp_path)
    with pytest.raises(ValueError, match="there is no adapter 'y'; loaded are: all"):
        llm.generate(PROMPTS[0], adapter="y")
