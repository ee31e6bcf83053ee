"""How a step is kept and made again: native calls through a backend's recording(), or a CUDA graph."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkernels import discovery
from llmkernels.engine.layout import round_up

Results = tuple[torch.Tensor, ...]
Replay = Callable[[int, int], None]  # for so many tokens and sequences


def refusal(answered: set[tuple[str, str]], device: str) -> str:
    """Why a step that these implementations, (backend, op), answered cannot be recorded; '' where it can."""
    if device == "cpu":
        names = {backend for backend, _ in answered}
        lacking = sorted(name for name in names if not hasattr(_package(name), "recording"))
        if lacking or len(names) != 1:
            return f"answered by {', '.join(lacking or sorted(names))}, which keep no calls together"
        return ""
    for backend, op in sorted(answered):
        module = discovery.implementation(backend, op) if backend != discovery.REFERENCE else None
        if not getattr(module, "TRAITS", {}).get("graph_safe"):
            return f"{backend}'s {op} does not declare graph_safe"
    return ""


def _package(backend: str) -> Any:
    return None if backend == discovery.REFERENCE else discovery.package(backend)


def resized(array: torch.Tensor, rows: int) -> torch.Tensor:
    """The same memory as an array of so many rows."""
    return array if array.shape[0] == rows else array.as_strided((rows, *array.shape[1:]), array.stride())


def record(
    run: Callable[[], Results], backend: str, memory: list[torch.Tensor], tokens: int, sequences: int
) -> tuple[Replay | None, Results, str]:
    """Run a step whose calls `backend` keeps: its replay, its results, and why it cannot be replayed."""
    with ExitStack() as stack:
        watch = stack.enter_context(Watch(memory, tokens))
        recording = stack.enter_context(_package(backend).recording(tokens, sequences))
        results = run()
    if watch.computed:
        return None, results, f"torch computes between the kernels: {', '.join(sorted(watch.computed))}"

    def replay(tokens: int, sequences: int, _held: list[torch.Tensor] = watch.made) -> None:  # kernels write into these
        recording.replay(tokens, sequences)

    return replay, results, ""


def capture(run: Callable[[], Results], memory: Any) -> tuple[Replay, Results]:
    """The same with a CUDA graph, which keeps its arrays itself.  Capturing runs nothing: the graph does, once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        results = run()
    graph.replay()
    return lambda tokens, sequences: graph.replay(), results


class Watch(TorchDispatchMode):
    """Notes what torch does inside: `made`, the memory of the arrays it makes, and `computed`, what else it runs.

    memory: the i-th array made lies in memory[i], which grows where it is too small: one replay at a time runs, and
    each begins anew, so all of them can share it.  There is room for as many tokens as `tokens` fill up to.
    """

    def __init__(self, memory: list[torch.Tensor], tokens: int) -> None:
        super().__init__()
        self._memory, self._tokens = memory, tokens
        self.made: list[torch.Tensor] = []
        self.computed: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format and result.is_contiguous():
            return self._shared(result)
        if not function.is_view:
            self.computed.add(str(function))
        return result

    def _shared(self, array: torch.Tensor) -> torch.Tensor:
        index, needed = len(self.made), -(-array.nbytes // self._tokens) * round_up(self._tokens)
        if index == len(self._memory) or self._memory[index].nbytes < needed:
            self._memory[index : index + 1] = [torch.empty(round_up(needed), dtype=torch.uint8)]
        self.made.append(self._memory[index])
        return self._memory[index][: array.nbytes].view(array.dtype).view(array.shape)
