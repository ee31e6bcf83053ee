"""Quantized linear layers in transformers: rounded at load, saved and loaded, and checkpoints of other tools, which the
engine loads alike."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stored_layers import FORMATS, INPUT_SCALE, checkpoint, layer
from transformers.quantizers import auto

import llmkernels
from llmkernels import ledger
from llmkernels.engine.cache import KVCache
from llmkernels.engine.runner import Runner
from llmkernels.engine.sequence import Chunk, Sequence
from llmkernels.integrations import transformers as adapter
from llmkernels.models.files import CheckpointError
from llmkernels.models.weights import Checkpoint, load
from llmkernels.quant import SCHEMES, formats, quantize, scheme
from llmkernels.quant.activation import seen_through

IDS = torch.tensor([[5, 17, 99, 3, 64, 8, 23]])
ROUNDED = [name for name in SCHEMES if scheme(name).dynamic and not scheme(name).act_order]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "attention_bias": True,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Known to transformers here, and its own classes back again afterwards."""
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        for method in formats.READERS:
            monkeypatch.setitem(mapping, method, mapping[method])
    adapter.register(checkpoints=list(formats.READERS))


def model(**more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | more)
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    model().save_pretrained(folder)
    return folder


def from_pretrained(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options)


def logits(made):
    with torch.no_grad():
        return made(IDS).logits[0]


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_at_load_saved_and_loaded(dense, tmp_path, name):
    made = from_pretrained(dense, quantization_config=adapter.LlmkernelsConfig(name))
    layers = {path: module for path, module in made.named_modules() if isinstance(module, adapter.QuantizedLinear)}
    assert len(layers) == 7
    assert type(made.lm_head) is torch.nn.Linear
    down = model().model.layers[0].mlp.down_proj
    want = quantize(down.weight, name).dequantize()
    assert torch.equal(made.model.layers[0].mlp.down_proj.quantized.dequantize(), want)
    ledger.reset()
    first = logits(made)
    assert sum(backend["calls"] for backend in ledger.read()["quantized_gemm"].values()) == 7
    with llmkernels.use("reference"):
        assert error(first, logits(made)) < (2e-2 if scheme(name).activation else 1e-5)
    made.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(logits(again), first)
    assert again.config.quantization_config.scheme == name
    assert again.get_memory_footprint() == made.get_memory_footprint()


def test_what_is_skipped_and_what_has_another_scheme(dense, tmp_path):
    config = adapter.LlmkernelsConfig(
        "w4a16_g128", skip=("lm_head", "*.mlp.*"), schemes={"model.layers.0.self_attn.o_proj": "w8a16"}
    )
    made = from_pretrained(dense, quantization_config=config)
    attention = made.model.layers[0].self_attn
    assert type(made.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert [str(attention.q_proj.scheme), str(attention.o_proj.scheme)] == ["w4a16_g128", "w8a16"]
    made.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(made))


def test_a_quantized_layer_keeps_its_dtypes(dense):
    made = from_pretrained(dense, quantization_config=adapter.LlmkernelsConfig("fp8_block"))
    before = logits(made)
    made = copy.deepcopy(made).to(torch.bfloat16)
    linear = made.model.layers[0].self_attn.q_proj
    assert (linear.values.dtype, linear.scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert linear.bias.dtype == made.lm_head.weight.dtype == torch.bfloat16
    assert error(logits(made).float(), before) < 0.05
    assert "256, 256, fp8_block, bias=True" in repr(linear)


def test_dequantize(dense):
    made = from_pretrained(dense, quantization_config=adapter.LlmkernelsConfig("w8a16"))
    before = logits(made)
    plain = made.dequantize()
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert error(logits(plain), before) < 1e-5


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Format -> (the dense model that its checkpoint stands for, activations rounded as it says; the folder)."""
    made = {}

    def of(name):
        if name not in made:
            meant, kind = model(), scheme(FORMATS[name][0])
            folder = checkpoint(tmp_path_factory.mktemp("stored"), name, meant)
            scale = None if kind.dynamic else torch.tensor([INPUT_SCALE])
            for path, linear in meant.named_modules():
                if isinstance(linear, torch.nn.Linear) and path != "lm_head":
                    linear.register_forward_pre_hook(lambda _, args: seen_through(args[0], kind, scale))
            made[name] = meant, folder
        return made[name]

    return of


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_of_other_tools(stored, tmp_path, name):
    meant, folder = stored(name)
    made = from_pretrained(folder)
    kind = scheme(FORMATS[name][0])
    assert made.config.quantization_config.scheme == str(kind)
    assert error(logits(made), logits(meant)) < (2e-2 if kind.activation else 1e-5)
    made.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(made))


@pytest.mark.parametrize("name", FORMATS)
def test_the_engine_loads_them_too(stored, name):
    _, folder = stored(name)
    opened = Checkpoint(folder)
    engine = load(opened, "float32", torch.device("cpu"), 64)
    assert str(engine.layers[0].o.weight.scheme) == FORMATS[name][0]
    assert engine.layers[0].gate_up.weight.shape == (768, 256)
    cache = KVCache(opened.config, 2, 4, torch.float32, torch.device("cpu"))
    tokens = IDS[0].tolist()
    sequence = Sequence(tokens, len(tokens), len(tokens) + 1, pages=[0, 1])
    got = Runner(engine, cache).logits([Chunk(sequence, 0, len(tokens), True)])
    assert error(got[0], logits(from_pretrained(folder))[-1]) < (0.02 if scheme(FORMATS[name][0]).activation else 1e-4)


def test_what_the_engine_refuses(stored, tmp_path):
    _, folder = stored("GPTQ")
    with pytest.raises(CheckpointError, match=r"is quantized already; leave quantize='w8a16' out"):
        load(Checkpoint(folder), "float32", torch.device("cpu"), 64, quantize="w8a16")
    narrow = model(num_key_value_heads=2)  # k has 64 rows, so a block of 128 would reach into v
    folder = checkpoint(tmp_path, "DeepSeek FP8", narrow)
    with pytest.raises(
        CheckpointError, match=r"self_attn\.: its projections cannot be one product: .*256, 64, 64 rows"
    ):
        load(Checkpoint(folder), "float32", torch.device("cpu"), 64)


def test_wrong_uses(dense, stored, tmp_path):
    for call, message in (
        (lambda: adapter.LlmkernelsConfig("w5a16"), r"scheme 'w5a16' is unknown; use a name such as w4a16"),
        (lambda: adapter.LlmkernelsConfig("w8a8", group=3), r"LlmkernelsConfig has no group; it takes scheme, skip"),
        (lambda: adapter.register(checkpoints="exl2"), r"checkpoints names 'exl2'; the readable ones are gptq"),
        (
            lambda: from_pretrained(dense, quantization_config=adapter.LlmkernelsConfig("w4a16_g128_actorder")),
            r"w4a16_g128_actorder needs calibration data, .*without act-order",
        ),
        (
            lambda: from_pretrained(dense, quantization_config=adapter.LlmkernelsConfig("w8a16", skip="*")),
            r"no layer is quantized: .*8 linear layers.*leave some out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    _, folder = stored("GPTQ")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (folder / "config.json").read_text().replace('"group_size": 32', '"group_size": 64')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"q_proj\.qzeros has shape \(8, 32\); .* ask for \(4, 32\)"):
        from_pretrained(tmp_path)


def test_experts_are_not_left_out_silently(tmp_path):
    """transformers holds experts in one tensor; quantized ones would be ignored, and random weights used instead."""
    config = {key: value for key, value in SIZES.items() if key != "attention_bias"}
    torch.manual_seed(0)
    made = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config, num_local_experts=2))
    folder = checkpoint(tmp_path, "GPTQ", made)
    file = folder / "model.safetensors"
    expert, _ = layer("GPTQ", 384, 256)
    name = "model.layers.0.block_sparse_moe.experts.0.w1"
    save_file(load_file(file) | {f"{name}.{part}": tensor for part, tensor in expert.items()}, file)
    with pytest.raises(ValueError, match=rf"1 quantized layers that are no linear layers of Mixtral.*{name}"):
        from_pretrained(folder)
