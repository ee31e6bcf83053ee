"""llmkernels inside vLLM: attention, the KV write and RMSNorm from this registry.

    pip install llmkernels vllm
    LLMKERNELS_VLLM=1 vllm serve MODEL

vLLM finds `register` by the entry point in the group vllm.general_plugins and calls it in every one of its processes;
LLMKERNELS_VLLM, which child processes inherit, decides what it does:

    unset, 0    nothing
    1           vLLM's attention layers are answered by llmkernels.paged_attention and llmkernels.write_kv
    checked     the same, and page ids, lengths and slots are read and checked before each call: to find a bug

- On vLLM's CPU platform that is all (ran: vLLM 0.32 on CPU, `make test-vllm`).
- FP8 caches (--kv-cache-dtype fp8) run there too, to the contract's rounding; vLLM's own CPU kernel rounds otherwise, so
  greedy tokens differ from its.
- On CUDA choose the backend too: `--attention-backend CUSTOM`.  Unverified: it never ran there.
- RMSNorm is registered as provider "llmkernels" of vLLM's IR ops rms_norm and fused_add_rms_norm; vLLM's own option
  chooses it: `--ir-op-priority '{"rms_norm": ["llmkernels"], "fused_add_rms_norm": ["llmkernels"]}'`.
- Which of our backends answers is decided as everywhere: LLMKERNELS_BACKEND, LLMKERNELS_PAGED_ATTENTION, the order.
- What is not taken (encoder and cross attention, per-head quantized caches, other than causal masks with a window)
  raises NotImplementedError when the layer is made, or at its first call: unset LLMKERNELS_VLLM for such a model.
- What answered, in every worker process:

    llm = LLM(MODEL, worker_extension_cls="llmkernels.integrations.vllm.WorkerLedger")
    llm.collective_rpc("llmkernels_ledger")     # a ledger for each worker
"""

import os
from importlib import util
from typing import Any

from llmkernels import ledger

VARIABLE = "LLMKERNELS_VLLM"
MODES = ("", "0", "1", "checked")
PROVIDER = "llmkernels"
BACKEND = "llmkernels.integrations.vllm_attention.Backend"


def mode() -> str:
    """What LLMKERNELS_VLLM asks for; ValueError for what it cannot ask for."""
    asked = os.environ.get(VARIABLE, "")
    if asked not in MODES:
        raise ValueError(f"{VARIABLE} is {asked!r}; set it to 1, to checked, or not at all (0)")
    return "" if asked == "0" else asked


def register() -> None:
    """The entry point: tell vLLM where our attention and norms are.  May be called again and again."""
    if not mode():
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)  # the CPU platform asks for no other one
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if util.find_spec("vllm.ir"):
        from llmkernels.integrations import vllm_norms

        vllm_norms.register()


class WorkerLedger:
    """For vLLM's worker_extension_cls: methods of each worker, which `collective_rpc` calls by name."""

    def llmkernels_ledger(self) -> dict[str, Any]:
        """llmkernels.ledger.read() of this process."""
        return ledger.read()

    def llmkernels_forget(self) -> None:
        """llmkernels.ledger.reset() in this process."""
        ledger.reset()
