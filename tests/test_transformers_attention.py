"""transformers with attn_implementation="llmkernels" says what it says with its own eager attention."""

import pytest
import torch
import transformers
from small_models import CONFIGS, SIZES, small_model
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmkernels import ledger
from llmkernels.integrations import transformers as adapter
from llmkernels.integrations.transformers import attention, masks, paged

NEW = 10
TOLERANCE = 1e-5  # of the largest logit, in float32
PADDING = {"no": [0, 0, 0], "left": [0, 4, 8], "right": [0, 2, 4]}  # tokens of padding in each row


@pytest.fixture(scope="module", autouse=True)
def registered():
    adapter.register()
    adapter.register()  # changes nothing


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    return small_model(request.param)


def batch(padding="no", length=11):
    ids = torch.randint(3, SIZES["vocab_size"], (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDING[padding]):
        mask[row, slice(count) if padding == "left" else slice(length - count, length)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, implementation, inputs, **options):
    """(tokens, logits) of greedy generation."""
    model.set_attn_implementation(implementation)
    options |= {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "cache_implementation", None)
        out = model.generate(**inputs, **options)
    return out.sequences, torch.stack(out.logits)


def forward(model, implementation, **inputs):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).logits


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(model, padding, cache):
    inputs = batch(padding)
    tokens, logits = generate(model, "eager", inputs, cache_implementation=cache)
    ledger.reset()
    own_tokens, own_logits = generate(model, "llmkernels", inputs, cache_implementation=cache)
    assert own_tokens.tolist() == tokens.tolist()
    assert error(own_logits, logits) < TOLERANCE
    answered = sum(backend["calls"] for backend in ledger.read()["paged_attention"].values())
    assert answered == NEW * model.config.num_hidden_layers


def test_chunked_prefill_and_beams():
    model = small_model("Mistral")
    for options in ({"prefill_chunk_size": 4}, {"num_beams": 3}):
        tokens, logits = generate(model, "eager", batch("left"), **options)
        own_tokens, own_logits = generate(model, "llmkernels", batch("left"), **options)
        assert own_tokens.tolist() == tokens.tolist()
        assert error(own_logits, logits) < TOLERANCE


MLA = {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OTHERS = {
    "Gemma3Text": {"sliding_window": 5, "query_pre_attn_scalar": 16},
    "DeepseekV3": {"num_key_value_heads": 4, **MLA, **EXPERTS},  # keys wider than values
    "Llama4Text": {"attention_chunk_size": 6, "num_local_experts": 2, "intermediate_size_mlp": 96},  # a mask of chunks
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "Mixtral": {"num_local_experts": 2},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family):
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if family != "DeepseekV3" or key != "head_dim"}
    config = getattr(transformers, f"{family}Config")(**sizes | OTHERS[family])
    other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.ndim == 2 and any(
                part in name for part in ("q_proj", "k_proj", "q_b_proj", "kv_b_", "c_attn")
            ):
                parameter.mul_(12)
    tokens, logits = generate(other, "eager", batch("left"))
    own_tokens, own_logits = generate(other, "llmkernels", batch("left"))
    assert own_tokens.tolist() == tokens.tolist()
    assert error(own_logits, logits) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Off by no more than transformers' own attention is, plus roundoff."""
    exact = forward(small_model("Llama"), "eager", **batch("left"))
    model, seen = small_model("Llama").to(dtype), batch("left")["attention_mask"].bool()
    own, eager = forward(model, "llmkernels", **batch("left")), forward(model, "eager", **batch("left"))
    assert error(own[seen], exact[seen]) < 2 * error(eager[seen], exact[seen]) + torch.finfo(dtype).eps


@pytest.mark.parametrize("options", [{"max_batch_tokens": 64}, {"max_batch_tokens": 8, "page_size": 4}], ids=str)
def test_continuous_batching(model, options):
    """generate_batch says what generate says, for prompts longer and shorter than a chunk, a page and the window."""
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, SIZES["vocab_size"], (n,), generator=draw).tolist() for n in (3, 11, 7, 40, 1)]
    alone = [generate(model, "llmkernels", {"input_ids": torch.tensor([prompt])})[0][0].tolist() for prompt in prompts]
    ledger.reset()
    done = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, **options),
        progress_bar=False,
    )
    together = [
        prompt + done[key].generated_tokens for prompt, key in zip(prompts, sorted(done, key=order), strict=True)
    ]
    assert together == alone
    assert model.config._attn_implementation == "llmkernels"
    assert "paged_attention" in ledger.read()
    if getattr(model.config, "sliding_window", None) is None:
        assert "write_kv" in ledger.read()


def order(request):
    return int(request.rpartition("_")[2])


def test_paged_layers_are_read_in_place(monkeypatch):
    """Full attention never gathers the cache: transformers' update, which would, is not called."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    monkeypatch.setattr(PagedAttentionCache, "update", None)
    test_continuous_batching(small_model("Llama"), {"max_batch_tokens": 64})


def test_masks_of_the_caller():
    """A finished mask, boolean or of 0 and the smallest number, is kept to, whatever it says."""
    model, inputs = small_model("Llama"), batch()
    length = inputs["input_ids"].shape[1]
    prefix = torch.ones(length, length, dtype=torch.bool).tril()
    prefix[:5, :5] = True
    prefix[7, 2:5] = False
    prefix = prefix.expand(3, 1, -1, -1)
    added = torch.where(prefix, 0.0, torch.finfo(torch.float32).min)
    want = forward(model, "eager", input_ids=inputs["input_ids"], attention_mask=added)
    for mask in (prefix, added, added[:1]):
        got = forward(model, "llmkernels", input_ids=inputs["input_ids"], attention_mask=mask)
        assert error(got, want) < TOLERANCE


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_packed_sequences(family):
    model = small_model(family)
    ids = batch(length=14)["input_ids"]
    positions = torch.tensor([[*range(9), *range(5)]]).expand(3, -1)
    want = forward(model, "eager", input_ids=ids, position_ids=positions, use_cache=False)
    got = forward(model, "llmkernels", input_ids=ids, position_ids=positions, use_cache=False)
    assert error(got, want) < TOLERANCE


def test_padding_between_tokens():
    """A second turn, padded on the left again, leaves padding inside the cache."""
    model, first, second = small_model("Qwen3"), batch("left"), batch("left", length=9)
    seen, logits = torch.cat([first["attention_mask"], second["attention_mask"]], 1), {}
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    for implementation in ("eager", "llmkernels"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            cache = model(**first, position_ids=positions[:, :11], use_cache=True).past_key_values
            logits[implementation] = model(
                second["input_ids"], attention_mask=seen, position_ids=positions[:, 11:], past_key_values=cache
            ).logits[second["attention_mask"].bool()]
    assert error(logits["llmkernels"], logits["eager"]) < TOLERANCE


def test_an_encoder():
    """Attention that looks both ways, padding included."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    model, inputs = transformers.BertModel(config, add_pooling_layer=False).eval(), batch("left")
    states = {}
    for implementation in ("eager", "llmkernels"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            states[implementation] = model(**inputs).last_hidden_state
    assert error(states["llmkernels"], states["eager"]) < TOLERANCE


def drop(name):
    def broken(*args, **options):
        options.pop(name, None)
        return attention.attention(*args, **options)

    return broken


def without_padding(*args, attention_mask=None, **options):
    return masks.mask(*args, **options)


def without_window(*args, mask_function, **options):
    return masks.mask(*args, **options)


@pytest.mark.parametrize(
    ("family", "broken", "mask"),
    [
        ("Gemma2", drop("softcap"), masks.mask),
        ("GPT-OSS", drop("s_aux"), masks.mask),
        ("Llama", attention.attention, without_padding),
        ("Mistral", attention.attention, without_window),
        ("Gemma2", attention.attention, without_window),
        ("GPT-OSS", attention.attention, without_window),
    ],
)
def test_these_tests_see_faults(monkeypatch, family, broken, mask):
    """What is compared above would show each feature if it were left out."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "llmkernels", broken)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "llmkernels", mask)
    model = small_model(family)
    tokens, logits = generate(model, "eager", batch("left"))
    own_tokens, own_logits = generate(model, "llmkernels", batch("left"))
    assert error(own_logits, logits) > 1000 * TOLERANCE
    assert own_tokens.tolist() != tokens.tolist()


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_paged_tests_see_faults(monkeypatch, family):
    """A window or a page in the wrong place changes what continuous batching says."""
    if family == "Llama":
        right = paged._ragged
        monkeypatch.setattr(paged, "_ragged", lambda *args: right(*args).flip(1))
    else:
        right = paged.attention
        monkeypatch.setattr(paged, "attention", lambda *args: right(*args[:6], -1, args[7]))
    with pytest.raises(AssertionError):
        test_continuous_batching(small_model(family), {"max_batch_tokens": 8, "page_size": 4})


def test_caches_are_not_copied():
    k, v = torch.randn(2, 3, 2, 7, 16).unbind(0)
    pages, _, apart = attention._single_slots(k, v)
    assert pages.data_ptr() == k.data_ptr()
    torch.testing.assert_close(pages[1 * apart + 4, 0], k[1, :, 4])
    by_token = v.transpose(1, 2).contiguous().transpose(1, 2)  # another layout: then, and only then, copies
    pages, values, apart = attention._single_slots(k, by_token)
    torch.testing.assert_close((pages[2 * apart + 6, 0], values[2 * apart + 6, 0]), (k[2, :, 6], v[2, :, 6]))


@pytest.mark.slow
def test_compiled_decode():
    """generate compiles a step around the kernels, with a static cache."""
    options = transformers.CompileConfig(backend="eager", mode=None, dynamic=True)
    options._compile_all_devices = True
    tokens, _ = generate(model := small_model("Gemma2"), "eager", batch("left"))
    own, _ = generate(model, "llmkernels", batch("left"), cache_implementation="static", compile_config=options)
    assert own.tolist() == tokens.tolist()


def test_wrong_uses():
    model, inputs = small_model("Llama", "llmkernels", attention_dropout=0.1), batch()
    with pytest.raises(ValueError, match=r"must be differentiated.*torch\.no_grad\(\)"):
        model(**inputs)
    with torch.no_grad(), pytest.raises(ValueError, match=r"dropout of attention is 0\.1.*model\.eval\(\)"):
        model.train()(**inputs)
    model.eval()
    for mask, message in (
        (torch.randn(3, 1, 11, 11), r"attention_mask adds .* to a score .*eager"),
        (
            torch.ones(3, 4, 11, 11, dtype=torch.bool),
            r"attention_mask has shape \(3, 4, 11, 11\).*the same for all heads",
        ),
        (torch.ones(3, 1, 11, 7, dtype=torch.bool), r"attention_mask has shape .*\[3 or 1, 1, 11, 11\]"),
        (torch.ones(3, 1, 11, 11, dtype=torch.int64), r"finished mask of int64.*bool .*or float"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(model, "llmkernels", input_ids=inputs["input_ids"], attention_mask=mask)
    with pytest.raises(ValueError, match=r"output_attentions.*eager"):
        forward(model, "llmkernels", **inputs, output_attentions=True)
    with pytest.raises(ValueError, match=r"float64"):
        forward(model.double(), "llmkernels", **inputs)


def test_a_mask_of_another_layer():
    """Reading keys that are not there would be worse than an error."""
    query, key = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 7, 16)
    for mask in (masks.mask(2, 1, 9, 8), masks.mask(2, 2, 7, 5)):
        with pytest.raises(ValueError, match=r"made for \d queries and \d keys, but this layer has 2 and 7"):
            attention.attention(None, query, key, key, mask)


def test_a_learned_bias_is_refused():
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    assert "llmkernels" in ALL_ATTENTION_FUNCTIONS.valid_keys()
    model.set_attn_implementation("llmkernels")
    with torch.no_grad(), pytest.raises(ValueError, match=r"position_bias.*sdpa"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), decoder_input_ids=torch.zeros(1, 1, dtype=torch.long))
