"""A Llama in bare JAX that decodes through llmkernels.jax_api inside jax.jit.

python examples/jax_decoder.py "The read() system call"
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from safetensors.flax import load_file
from tokenizers import Tokenizer

import llmkernels
from llmkernels import jax_api as ops
from llmkernels.engine import shipped_model

CONFIG = json.loads((shipped_model() / "config.json").read_text())
LAYERS, HEADS, KV_HEADS = (CONFIG[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads"))
DIM, PAGE = CONFIG["head_dim"], 16
norm_linear = functools.partial(ops.norm_linear_activation, eps=CONFIG["rms_norm_eps"])


def load(context):
    """The weights in float32; q, k, v in one matrix, gate and up in another; an empty cache; the angles."""
    tensors = load_file(shipped_model() / "model.safetensors")

    def get(*names):
        return jnp.concatenate([tensors[f"model.{name}.weight"] for name in names]).astype(jnp.float32)

    layers = [
        {
            "norms": [get(f"layers.{i}.{name}_layernorm") for name in ("input", "post_attention")],
            "qkv": get(*(f"layers.{i}.self_attn.{name}_proj" for name in "qkv")),
            "out": get(f"layers.{i}.self_attn.o_proj"),
            "gate_up": get(*(f"layers.{i}.mlp.{name}_proj" for name in ("gate", "up"))),
            "down": get(f"layers.{i}.mlp.down_proj"),
        }
        for i in range(LAYERS)
    ]
    caches = [jnp.zeros((LAYERS, -(-context // PAGE), PAGE, KV_HEADS, DIM)) for _ in "kv"]
    frequency = CONFIG["rope_parameters"]["rope_theta"] ** -(jnp.arange(0, DIM, 2) / DIM)
    angles = jnp.arange(context)[:, None] * frequency
    weights = {"embed": get("embed_tokens"), "norm": get("norm"), "layers": layers}
    return weights, caches, (jnp.cos(angles), jnp.sin(angles))


@functools.partial(jax.jit, donate_argnames="caches")
def step(weights, caches, angles, tokens, start):
    """tokens [new] at positions start, start + 1, ... -> the most likely next one, and the caches with them."""
    new, (keys, values) = len(tokens), caches
    positions = start + jnp.arange(new)
    table, seq_lens = jnp.arange(keys.shape[1], dtype=jnp.int32)[None], (start + new)[None].astype(jnp.int32)
    x = weights["embed"][tokens]
    for i, layer in enumerate(weights["layers"]):
        qkv = norm_linear(x, layer["qkv"], norm_weight=layer["norms"][0]).reshape(new, -1, DIM)
        q, k, v = jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=1)
        q, k = ops.rotary_embedding(q, k, *angles, positions)
        k_cache, v_cache = ops.write_kv(k, v, keys[i], values[i], positions)  # page p holds positions 16 p and on
        keys, values = keys.at[i].set(k_cache), values.at[i].set(v_cache)
        a = ops.paged_attention(q, k_cache, v_cache, table, seq_lens, jnp.array([0, new], jnp.int32))
        x = x + norm_linear(a.reshape(new, -1), layer["out"], norm="none")
        h = norm_linear(x, layer["gate_up"], norm_weight=layer["norms"][1], activation="swiglu")
        x = x + norm_linear(h, layer["down"], norm="none")
    logits = norm_linear(x[-1:], weights["embed"], norm_weight=weights["norm"])
    return logits.argmax(-1), (keys, values)


def generate(prompt, count):
    tokenizer = Tokenizer.from_file(str(shipped_model() / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    weights, caches, angles = load(len(ids) + count)
    given, written, answer = jnp.array(ids), 0, []
    while len(answer) < count and answer[-1:] != [CONFIG["eos_token_id"]]:
        token, caches = step(weights, caches, angles, given, jnp.array(written))
        written, given = written + len(given), token
        answer.append(int(token[0]))
    return tokenizer.decode(answer)


if __name__ == "__main__":
    with llmkernels.use(policy="silent"):  # where no backend takes jax arrays, the reference answers on the host
        print(generate(sys.argv[1] if len(sys.argv) > 1 else "The read() system call", 32))
