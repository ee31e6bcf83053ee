"""A worker extension for the check: how often the model really ran, told by torch and not by us."""

from typing import Any

import torch

from llmkernels.integrations.vllm import WorkerLedger


class Steps(WorkerLedger):
    def watch(self) -> int:
        """Start counting; how many layers of attention the model has."""
        self.tokens: list[int] = []
        self.model_runner.get_model().register_forward_pre_hook(self._note, with_kwargs=True)  # type: ignore[attr-defined]
        self.llmkernels_forget()
        context = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        return sum("attn" in name for name in context)

    def seen(self) -> dict[str, Any]:
        """The tokens of each forward pass, and the ledger, since `watch`; torch's threads."""
        return {"tokens": self.tokens, "ledger": self.llmkernels_ledger(), "threads": torch.get_num_threads()}

    def _note(self, module: Any, args: tuple, options: dict[str, Any]) -> None:
        ids = options.get("input_ids", args[0] if args else None)
        self.tokens.append(ids.shape[0])
