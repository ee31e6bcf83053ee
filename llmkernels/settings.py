"""What a caller asked for, beside the call itself: which backend, how strict, what to verify.

Strongest first: the `backend=` argument, `with use(...)`, the environment, the backend order.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

POLICIES = ("strict", "warn", "silent")
TRAITS = {
    "deterministic": "the same call gives the same bits",
    "batch_invariant": "a row's bits do not depend on the other rows of the batch",
    "graph_safe": "can be captured in a CUDA graph: no synchronisation, no allocation outside torch's allocator",
    "workspace_bytes": "the most scratch memory a call takes, in bytes, beside its outputs",
    "accumulate": "the dtype that sums are kept in",
}


@dataclass(frozen=True, eq=False)  # compared by identity: a memo key
class Settings:
    """One frozen set of wishes.  `use` makes a new one from the current one.

    backend: the one backend to ask; None asks all in order.
    policy: what happens when only the reference takes a call: 'strict' raises Unsupported, 'warn' warns once a kind
        of call, 'silent' says nothing.
    verify: native kernels answer a tiny conformance case before their first use on a device.
    checked: read the values of index arrays (page ids, lengths) before a kernel does.  None means: where that costs no
        device synchronisation, that is on CPU arrays.
    require: traits the implementation must declare, each with the value it must have (workspace_bytes: at most).
    """

    backend: str | None = None
    policy: str = "warn"
    verify: bool = True
    checked: bool | None = None
    require: Mapping[str, Any] = field(default_factory=dict)
    per_op: Mapping[str, str] = field(default_factory=dict)
    recorder: Any = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; use one of {', '.join(POLICIES)}")
        if unknown := set(self.require) - set(TRAITS):
            raise ValueError(f"require names {', '.join(sorted(unknown))}; the traits are {', '.join(TRAITS)}")


ASKED: ContextVar[Settings | None] = ContextVar("llmkernels_settings", default=None)


@contextmanager
def use(backend: str | None = None, **wishes: Any) -> Iterator[Settings]:
    """Change the settings inside a `with` block, for this thread or task only: use('vendor', policy='strict')."""
    before = current()
    change = (before, backend, *wishes.items())
    try:
        wanted = _CHANGED.get(change)
    except TypeError:  # require= as a list or a mapping
        wanted = _changed(backend, wishes)
    else:
        if wanted is None:
            wanted = _changed(backend, wishes)
            if wanted.recorder is before.recorder is None:  # or each recorder would be kept for ever
                _CHANGED[change] = wanted
    token = ASKED.set(wanted)
    try:
        yield wanted
    finally:
        ASKED.reset(token)


def _changed(backend: str | None, wishes: dict[str, Any]) -> Settings:
    """The current settings with these wishes; ValueError where there is no such wish."""
    known = {f.name for f in fields(Settings)} - {"per_op"}
    if unknown := set(wishes) - known:
        raise ValueError(f"use() knows {', '.join(sorted(known))}; not {', '.join(sorted(unknown))}")
    if isinstance(require := wishes.get("require"), (str, list, tuple, set)):
        wishes["require"] = dict.fromkeys([require] if isinstance(require, str) else require, True)
    if backend is not None:
        wishes = wishes | {"backend": backend, "per_op": {}}
    return _same(replace(current(), **wishes))


_CHANGED: dict[tuple, Settings] = {}  # settings, and what use() was given -> settings
_KNOWN: dict[tuple, Settings] = {}


def _same(wanted: Settings) -> Settings:
    """One object for equal settings, so that a block entered again finds what its calls were answered with before."""
    if wanted.recorder is not None:
        return wanted
    key = (
        wanted.backend,
        wanted.policy,
        wanted.verify,
        wanted.checked,
        *wanted.require.items(),
        *wanted.per_op.items(),
    )
    return _KNOWN.setdefault(key, wanted)


def current() -> Settings:
    return ASKED.get() or environment()


@cache
def environment() -> Settings:
    """The settings of the environment, read once: LLMKERNELS_BACKEND, LLMKERNELS_<OP>, LLMKERNELS_POLICY,
    LLMKERNELS_VERIFY (0 switches the self-check off)."""
    prefix = "LLMKERNELS_"
    reserved = {"API_KEY", "BACKEND", "POLICY", "VERIFY", "BUILD", "ARCHS", "CACHE", "DATA", "CPU_ISA", "TUNED", "VLLM"}
    per_op = {k.removeprefix(prefix).lower(): v for k, v in os.environ.items() if k.startswith(prefix) and v}
    per_op = {k: v for k, v in per_op.items() if k.upper() not in reserved}
    return Settings(
        backend=os.environ.get("LLMKERNELS_BACKEND") or None,
        policy=os.environ.get("LLMKERNELS_POLICY", "warn"),
        verify=os.environ.get("LLMKERNELS_VERIFY", "1") != "0",
        per_op=per_op,
    )
