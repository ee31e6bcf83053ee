"""llmkernels inside SGLang: an attention backend of its plug-in framework.

    pip install llmkernels sglang
    sglang serve MODEL --attention-backend llmkernels --disable-cuda-graph

UNVERIFIED: it never ran inside SGLang.  Written to SGLang 0.5.23 (sglang/srt/plugins/__init__.py,
layers/attention/base_attn_backend.py and torch_native_backend.py); tests/test_sglang.py runs it against fakes of what
it touches there.

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
