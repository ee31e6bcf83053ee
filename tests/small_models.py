"""Small random models of transformers in which every feature of attention matters."""

import torch
import transformers

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(**SIZES),
    "Qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "Mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "Gemma2": lambda: transformers.Gemma2Config(
        **SIZES, sliding_window=5, query_pre_attn_scalar=16, attn_logit_softcapping=5.0
    ),
    "GPT-OSS": lambda: transformers.GptOssConfig(
        **SIZES,
        sliding_window=5,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    ),
}


def small_model(family: str, attention: str = "eager", **more) -> transformers.PreTrainedModel:
    """Projections of queries and keys are twelve times as large as they start: else scores are so small that a
    missing window, soft cap or sink changes nothing that could be measured."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.update(more)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(12)
            elif name.endswith("sinks"):
                parameter.normal_()
            elif "bias" in name or (family == "GPT-OSS" and "norm" not in name):
                parameter.normal_(std=0.05)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model
