"""llama.cpp on the checkpoints that the engine reads: converted with gguf, quantized and run through llama-cpp-python.

Its C functions are called as they are; the Python classes around them would add their own time.
"""

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors import safe_open

FILE_TYPES = {
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_0_head4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
HEADS = {"q4_0_head4": llama_cpp.GGML_TYPE_Q4_0}  # where the head is not kept at 6 bits
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@llama_cpp.llama_log_callback
def _silent(*message: object) -> None:
    """It would tell of every tensor."""


llama_cpp.llama_log_set(_silent, None)


def convert(checkpoint: Path, target: Path) -> None:
    """Write a Llama checkpoint as GGUF in float32, without its tokenizer: token ids in, token ids out."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:

        def tensor(name: str) -> np.ndarray:
            return tensors.get_tensor(name).float().numpy()

        writer.add_tensor("token_embd.weight", tensor("model.embed_tokens.weight"))
        writer.add_tensor("output_norm.weight", tensor("model.norm.weight"))
        if not config["tie_word_embeddings"]:
            writer.add_tensor("output.weight", tensor("lm_head.weight"))
        for layer in range(config["num_hidden_layers"]):
            for name, theirs in NAMES.items():
                weight = tensor(f"model.layers.{layer}.{name}.weight")
                if theirs in ("attn_q", "attn_k"):
                    weight = _interleaved(weight, heads if theirs == "attn_q" else kv_heads)
                writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows so that rotary pairs are neighbours, as ggml turns them; in the checkpoint they are half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """Let llama.cpp round a float32 GGUF to one of FILE_TYPES; of 4 bits it keeps the head at 6, but in HEADS."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind], threads
    if kind in HEADS:
        params.output_tensor_type = params.token_embedding_type = HEADS[kind]
    if status := llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize returned {status}")


class Model:
    """A GGUF file in memory and one sequence.

    context: tokens of the sequence at most.  chunk: tokens a forward pass at most.
    """

    def __init__(self, file: Path, threads: int, context: int, chunk: int):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, chunk, chunk
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.sampler = llama_cpp.llama_sampler_init_greedy()

    def generate(self, prompt: list[int]) -> Iterator[int]:
        """Greedy tokens, without an end; the first one comes after the whole prompt has run."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        pending = prompt
        while True:
            tokens = (ctypes.c_int32 * len(pending))(*pending)
            if status := llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(pending))):
                raise RuntimeError(f"llama_decode returned {status}")
            pending = [llama_cpp.llama_sampler_sample(self.sampler, self.context, -1)]
            yield pending[0]

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)
