"""llmkernels inside SGLang: an attention backend of its plug-in framework.

    pip install llmkernels sglang
    sglang serve MODEL --attention-backend llmkernels --disable-cuda-graph

Ran by hand, on a CPU only, in SGLang 0.5.23: radix cache, chunked prefill and decode; greedy tokens of 8 prompts equal
to its torch_native backend's, every layer of every step counted.  (With pages of 16 tokens it ran under the name of
torch_native, since SGLang takes Triton helpers for names it does not know.)  SGLang has no wheel for CPUs: stand-ins
took the place of torchvision and of sgl_kernel's CPU functions, and no test repeats it.  tests/test_sglang.py runs the
backend against fakes of what it touches there.  Unverified on CUDA.

SGLang finds `register` by the entry point in the group sglang.srt.plugins and calls it in each of its processes.  That
only adds a choice; `--attention-backend` makes it.  Not taken, with an error that says so: CUDA graphs, hybrid
sliding-window pools, cross and encoder attention, speculative verification, pools that quantize to less than 8 bits.
"""

NAME = "llmkernels"


def register() -> None:
    """The entry point: offer the backend.  May be called again and again."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    def create(runner: object) -> object:
        from llmkernels.integrations.sglang_attention import Backend

        return Backend(runner)

    register_attention_backend(NAME)(create)
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
