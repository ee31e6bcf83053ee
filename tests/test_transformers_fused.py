"""optimize(model) changes how a transformers model computes, not what, and restore(model) takes it back."""

import copy

import pytest
import torch
import transformers
from small_models import CONFIGS, small_model

import llmkernels
from llmkernels import ledger
from llmkernels.integrations import transformers as adapter

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor([0, 0]), torch.tensor([0, 1])), torch.tensor(0))
PER_LAYER = {"Llama": 2, "Qwen3": 2, "Mistral": 2, "Gemma2": 2, "GPT-OSS": 1}  # chains; GPT-OSS has experts


@pytest.fixture(scope="module", autouse=True)
def registered():
    adapter.register()


def logits(model):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits[MASK.bool()]


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_same_logits(family):
    model = small_model(family)
    before, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    report = adapter.optimize(model)
    assert len(report.changed) == PER_LAYER[family] * 2
    ledger.reset()
    assert error(logits(model), before) < 1e-5
    calls = sum(backend["calls"] for backend in ledger.read()["norm_linear_activation"].values())
    assert calls == PER_LAYER[family] * 2
    assert {name: t.tolist() for name, t in model.state_dict().items()} == {n: t.tolist() for n, t in state.items()}
    tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    adapter.restore(model)
    ledger.reset()
    assert torch.equal(logits(model), before)
    assert "norm_linear_activation" not in ledger.read()
    assert torch.equal(model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False), tokens)


def test_the_report_tells_what_and_why():
    text = str(adapter.optimize(small_model("Llama")))
    assert "replaced  model.layers.0.input_layernorm -> self_attn" in text
    assert "64 + 32 + 32 features" in text
    assert "96 + 96 features, activation 'swiglu'" in text
    assert "left      norm -> lm_head" in text
    text = repr(adapter.optimize(small_model("Gemma2")))
    assert "pre_feedforward_layernorm -> mlp" in text
    assert "GELUTanh stays outside: the operation has none such" in text
    assert "GptOssMLP has no gate_proj" in str(adapter.optimize(small_model("GPT-OSS")))


@pytest.mark.parametrize(("family", "dtype"), [("Llama", torch.bfloat16), ("Gemma2", torch.float16)])
def test_half_precision(family, dtype):
    """No further from float32 than the model is without it, plus roundoff."""
    exact, model = logits(small_model(family)), small_model(family).to(dtype)
    before = error(logits(model).float(), exact)
    adapter.optimize(model)
    assert error(logits(model).float(), exact) < 1.5 * before + torch.finfo(dtype).eps


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_other_blocks(change):
    model = small_model("Llama", **change)
    before, report = logits(model), adapter.optimize(model)
    assert error(logits(model), before) < 1e-5
    assert ("geglu" in str(report)) == ("hidden_act" in change)


def test_weights_are_shared_not_doubled():
    model = small_model("Llama")
    adapter.optimize(model)
    attention = model.model.layers[0].self_attn
    storages = {layer.weight.untyped_storage().data_ptr() for layer in (attention.q_proj, attention.k_proj)}
    assert len(storages) == 1
    with torch.no_grad():  # what is written into a layer's weight is seen
        before = logits(model)
        attention.v_proj.weight.zero_()
        assert error(logits(model), before) > 1e-3


def test_moved_copied_saved_and_loaded(tmp_path):
    model = small_model("Llama")
    before = logits(model)
    adapter.optimize(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    assert error(logits(other), before) < 1e-5  # a copy has its own weights
    assert error(logits(other.double().float()), before) < 1e-5  # new storage for every parameter
    other.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert error(logits(loaded), before) < 1e-5
    adapter.restore(other)
    assert error(logits(other), before) < 1e-5


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a16", "fp8_tensor", "w8a8", "mxfp4"])
def test_quantized_layers(tmp_path, scheme):
    small_model("Llama").save_pretrained(tmp_path)
    config = adapter.LlmkernelsConfig(scheme)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    before, size = logits(model), model.get_memory_footprint()
    assert len(adapter.optimize(model).changed) == 4
    assert error(logits(model), before) < (2e-2 if llmkernels.quant.scheme(scheme).activation else 1e-5)
    assert model.get_memory_footprint() == size
    adapter.restore(model)
    assert torch.equal(logits(model), before)


def test_with_our_attention_and_continuous_batching():
    model = small_model("Qwen3")
    tokens = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)[0, IDS.shape[1] :].tolist()
    adapter.optimize(model)
    model.set_attn_implementation("llmkernels")
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    batching = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    done = model.generate_batch(
        [IDS[0].tolist()], generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    assert [answer.generated_tokens for answer in done.values()] == [tokens]


def test_what_is_left_and_why():
    model = small_model("Llama")
    first, second = model.model.layers
    first.self_attn.k_proj.register_forward_hook(lambda *_: None)
    first.mlp.up_proj = torch.nn.Sequential(first.mlp.up_proj)
    second.input_layernorm = torch.nn.LayerNorm(64)
    before, report = logits(model), adapter.optimize(model)
    assert error(logits(model), before) < 1e-5
    text = str(report)
    assert len(report.changed) == 1
    assert "Linear has hooks" in text
    assert "up_proj is a Sequential, not a Linear" in text
    assert "LayerNorm is no RMSNorm" in text
    other = small_model("Llama")
    other.model.layers[0].__class__ = type("AnotherDecoderLayer", (type(first),), {})
    assert "AnotherDecoderLayer is no block that is known" in str(adapter.optimize(other))
    assert "Linear  it has no block that is known" in str(adapter.optimize(torch.nn.Linear(3, 3)))


def test_wrong_uses():
    model = small_model("Llama")
    with pytest.raises(ValueError, match="not optimized; there is nothing to restore"):
        adapter.restore(model)
    adapter.optimize(model)
    with pytest.raises(ValueError, match=r"optimized already; restore\(model\) first"):
        adapter.optimize(model)
    with pytest.raises(ValueError, match=r"requires a gradient.*torch\.no_grad\(\)"):
        model(IDS)
