"""What other libraries make of the same call, so that a time has something to be compared with.

A peer is `prepare(call) -> run`, or None where it cannot answer: prepare may repack and plan, run takes no argument, is
timed, and returns what the contract says.  Its answer is checked like a backend's, with some slack for other roundings.
Peers that need a package come into play where that package is importable.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from importlib import import_module, util
from typing import Any

from llmkernels.registry import describe

Call = Mapping[str, Any]
Prepare = Callable[[Call], Callable[[], Any] | None]

MODULES = ("small_ops", "attention", "gemm", "gpu", "flashinfer", "onnxruntime", "ggml")
PEERS: dict[str, dict[str, Prepare]] = {}
OWN_ROUNDING: set[str] = set()  # names of peers that round x to int8 in groups of their own
SLOW = ("torch.compile", "torch.compile, frozen")  # seconds of preparation for every shape: left out of quick runs


def peers(op: str, quick: bool = False) -> Iterator[tuple[str, Prepare]]:
    """The peers of `op` that are installed here."""
    for module in MODULES:
        import_module(f"{__name__}.{module}")
    for name, prepare in PEERS.get(op, {}).items():
        if not (quick and name in SLOW):
            yield name, prepare


@lru_cache(maxsize=1)
def _compiled(function: Callable, kind: tuple[str, ...]) -> Callable:
    """`function`, compiled for this kind of call only: torch stops compiling a function that it met in many kinds."""
    import torch

    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def compiled_frozen(function: Callable, held: Call, given: Call) -> Callable[[], Any]:
    """`function` of both, compiled with the tensors in `held` as constants, which the compiler may pack anew."""
    import torch

    class Frozen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in held.items():
                self.register_buffer(name, value)

        def forward(self, given: Call) -> Any:
            return function(**given, **{name: getattr(self, name) for name in held})

    run = torch.no_grad()(partial(torch.compile(Frozen(), dynamic=False), given))
    with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=64):
        run()  # compiles here, under these settings
    return run


def peer(op: str, name: str, needs: str | None = None, own_rounding: bool = False) -> Callable[[Prepare], Prepare]:
    """Register the decorated `prepare` as a peer of `op`, if the package it needs is there.

    own_rounding: it rounds activations, but in other groups than the contract says: another answer, as good.
    """

    def register(prepare: Prepare) -> Prepare:
        if own_rounding:
            OWN_ROUNDING.add(name)
        if needs is None or util.find_spec(needs):
            PEERS.setdefault(op, {})[name] = prepare
        return prepare

    return register


def eager(op: str, *, compiled: bool = True, takes: Callable[[Call], bool] = lambda call: True) -> Callable:
    """Register the decorated function, written in plain torch, as the peer `torch`, and compiled as `torch.compile`.

    It has the parameters of the contract, in any order.
    """

    def register(function: Callable) -> Callable:
        def prepare(call: Call) -> Callable[[], Any] | None:
            return partial(function, **call) if takes(call) else None

        def prepare_compiled(call: Call) -> Callable[[], Any] | None:
            kind = tuple(describe(value) for value in call.values())
            return partial(_compiled(function, kind), **call) if takes(call) else None

        peer(op, "torch")(prepare)
        if compiled:
            peer(op, "torch.compile")(prepare_compiled)
        return function

    return register
