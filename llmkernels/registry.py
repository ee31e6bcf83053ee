"""Which implementation answers which call.

    user -> the public function of an op -> backends/<name>/<op>.py: run -> kernel

The public function is written by llmkernels/dispatch.py: it remembers, for each kind of call, what `Op.choose` below
decided.  An op's contract is llmkernels/ops/<op>.py; a backend is a folder (llmkernels/discovery.py).
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llmkernels import dispatch, ledger
from llmkernels.arrays import family, is_array, refuse_gradients, refuse_unwritable, through_torch, to_torch
from llmkernels.contract import Case, Contract
from llmkernels.discovery import (
    FORGET,
    REFERENCE,
    Refusal,
    Unsupported,
    backends,
    check_name,
    implementation,
    missing_traits,
    package,
    refusals,
)
from llmkernels.settings import Settings, current
from llmkernels.shapes import Shapes, dtype_name

OPS: dict[str, "Op"] = {}
REFERENCE_TRAITS = {"deterministic": True, "accumulate": "float32"}


def op(
    shapes: str,
    *,
    dtypes: Mapping[str, Iterable[str]],
    cases: Iterable[Case],
    inputs: Callable,
    cost: Callable,
    **rules: Any,
) -> Callable[[Callable], Callable]:
    """Make a reference function an op, and the public function that dispatches it.

    shapes: every array, in the language of llmkernels/shapes.py.
    dtypes: dtype variable -> the dtypes it may be bound to; T is the one that parity tests go through.
    cases: the calls that tests and benchmarks make, hostile ones included.
    inputs: (rng, **case.args) -> argument name -> float32 or integer NumPy array, View, or option.
    cost: (call, sizes) -> Cost, what such a call needs at least.
    check: (call, sizes) -> None, ValueError for what the shape string cannot say.
    check_values: call -> None, the same for rules on values; skipped where reading them would be slow.
    derive: (call, sizes) -> more sizes, for outputs whose dimensions are computed.
    returns: call -> names of the outputs returned, where options decide.
    judge: (call, results) -> complaints, for ops whose answer is a choice, not a number.
    """

    def declare(reference: Callable) -> Callable:
        variables = {name: tuple(names) for name, names in dtypes.items()}
        contract = Contract(reference, Shapes(shapes, variables), tuple(cases), inputs, cost, **rules)
        entry = OPS[contract.name] = Op(contract)
        return entry.function

    return declare


@dataclass(frozen=True)
class Candidate:
    """One backend's answer to one call: verdict is 'chosen', 'takes' or 'refuses'.

    notes: what a backend that takes the call says about it, by notes(op, call), if it has such a function.
    """

    backend: str
    verdict: str
    reasons: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Which backend answers a call, and what each of them said."""

    op: str
    call: dict[str, str]
    candidates: tuple[Candidate, ...]
    chosen: str | None

    def __str__(self) -> str:
        lines = [f"{self.op}({', '.join(f'{k}: {v}' for k, v in self.call.items())})"]
        for c in self.candidates:
            lines.append(f"  {c.backend:10} {c.verdict}")
            lines += [f"  {'':10}   {line}" for line in (*c.reasons, *c.notes)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Choice:
    """What `Op.choose` decided for a kind of call."""

    backend: str
    run: Callable
    why: str


class Op:
    """One operation: its contract, and the way to everyone who implements it."""

    def __init__(self, contract: Contract):
        self.contract, self.name = contract, contract.name
        self.function = dispatch.function_for(self)
        self._warned: set[str] = set()

    def choose(self, call: Mapping[str, Any], backend: str | None = None) -> Choice:
        """The implementation that answers `call`, after the contract has been checked.

        Raises:
            ValueError: the call breaks the contract, or names a backend that is none.
            Unsupported: nobody who was asked takes it.
        """
        return self.pick(call, self._validate(call), backend)

    def pick(self, call: Mapping[str, Any], owner: str, backend: str | None = None) -> Choice:
        """`choose` for a call that is known to keep the contract and whose arrays are `owner`'s."""
        settings = current()
        asked, why = self._asked(backend, settings)
        refused: dict[str, list[Refusal]] = {}
        for name in [asked] if asked else backends():
            if name == REFERENCE:
                break
            if not (reasons := self._refusals(name, owner, call, settings)):
                return Choice(name, implementation(name, self.name).run, why)  # type: ignore[union-attr]
            refused[name] = reasons
        if asked not in (None, REFERENCE):
            raise Unsupported(self._story(call, refused), refused)
        if missing := [*missing_traits(REFERENCE, REFERENCE_TRAITS, dict(settings.require))]:
            raise Unsupported(self._story(call, refused | {REFERENCE: missing}), refused | {REFERENCE: missing})
        if asked is None:
            self._fall_back(call, refused, settings)
            why = "no backend took it"
        return Choice(REFERENCE, through_torch(self.contract.reference, owner), why)

    def explain(self, *args: Any, backend: str | None = None, **options: Any) -> Explanation:
        """Every backend with its verdict on this call, without running it.  The contract is still enforced."""
        call, settings = self.contract.bind(*args, **options), current()
        asked, _ = self._asked(backend, settings)
        owner, chosen, candidates = self._validate(call), None, []
        for name in [*backends(), REFERENCE]:
            if name == REFERENCE:
                reasons = [*missing_traits(REFERENCE, REFERENCE_TRAITS, dict(settings.require))]
            else:
                reasons = self._refusals(name, owner, call, settings)
            answers = not reasons and chosen is None and asked in (None, name)
            chosen = name if answers else chosen
            verdict = "refuses" if reasons else "chosen" if answers else "takes"
            tell = None if reasons or name == REFERENCE else getattr(package(name), "notes", None)
            candidates.append(Candidate(name, verdict, tuple(reasons), tuple(tell(self.name, call)) if tell else ()))
        return Explanation(self.name, {k: describe(v) for k, v in call.items()}, tuple(candidates), chosen)

    def bind(self, *args: Any, backend: str | None = None, **options: Any) -> Callable:
        """The implementation that answers this call, with the call's options bound to it, for hot loops.

        Call it with the arrays, again and again, while shapes, dtypes and layouts stay the same: it neither checks nor
        counts again.  Arrays that are passed by name are passed by name there too.
        """
        call = self.contract.bind(*args, **options)
        choice = self.choose(call, backend)
        ledger.tally(self.name, choice.backend, "bound").calls += 1
        named = [p.name for p in self.contract.signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        return functools.partial(choice.run, **{name: call[name] for name in named if not is_array(call[name])})

    def _asked(self, backend: str | None, settings: Settings) -> tuple[str | None, str]:
        """The backend somebody named, and who did."""
        _check_environment(settings)
        for name, who in (
            (backend, "backend="),
            (settings.per_op.get(self.name), f"LLMKERNELS_{self.name.upper()}"),
            (settings.backend, "use() or LLMKERNELS_BACKEND"),
        ):
            if name:
                check_name(name, f"{self.name}: {who}")
                return name, who
        return None, "first in order"

    def _validate(self, call: Mapping[str, Any]) -> str:
        owner = family(self.name, call)
        if owner == "jax" and (written := self.contract.written(call)):
            raise ValueError(
                f"{self.name}: writes {' and '.join(written)} in place, and jax arrays are immutable; "
                f"use llmkernels.jax_api.{self.name}, which returns them"
            )
        self.contract.validate(call)
        if owner == "torch":
            refuse_gradients(self.name, call)
        if owner in ("torch", "numpy"):
            refuse_unwritable(self.name, {name: call[name] for name in self.contract.written(call)})
        if check := self.checks(call, current()):
            check({name: to_torch(value) for name, value in call.items()})
        return owner

    def checks(self, call: Mapping[str, Any], settings: Settings) -> Callable | None:
        """The contract's check of values where it is due: on CPU arrays unless switched off, elsewhere if asked for."""
        on_cpu = all(_on_cpu(value) for value in call.values() if is_array(value))
        return self.contract.check_values if settings.checked or (settings.checked is None and on_cpu) else None

    def _refusals(self, name: str, owner: str, call: Mapping[str, Any], settings: Settings) -> list[Refusal]:
        reasons = refusals(name, self.name, owner, dict(call), dict(settings.require))
        if not reasons and settings.verify and getattr(package(name), "NATIVE", False):
            reasons = import_module("llmkernels.selfcheck").verdict(self, name, call)
        return reasons

    def _fall_back(self, call: Mapping[str, Any], refused: dict[str, list[Refusal]], settings: Settings) -> None:
        if settings.policy == "silent":
            return
        story = self._story(call, refused)
        if settings.policy == "strict":
            raise Unsupported(story, refused)
        kind = "\n".join(str(reason) for reasons in refused.values() for reason in reasons)
        if kind not in self._warned:  # once a kind of call
            self._warned.add(kind)
            warnings.warn(f"{story}\n  so the slow reference answers", stacklevel=6)

    def _story(self, call: Mapping[str, Any], refused: dict[str, list[Refusal]]) -> str:
        lines = [f"{self.name}: no backend took this call"]
        lines += [f"  {name:14} {describe(value)}" for name, value in call.items() if value is not None]
        lines += [f"  {name:14} refused: {why}" for name, reasons in refused.items() for why in reasons]
        return "\n".join(lines)


def get(name: str) -> Op:
    """The op called `name`; ValueError lists them all where there is none."""
    import_module("llmkernels.ops")
    if name not in OPS:
        raise ValueError(f"{name!r} is not an op; the ops are {', '.join(sorted(OPS))}")
    return OPS[name]


def explain(op: str | Callable, *args: Any, **options: Any) -> Explanation:
    """Every backend's verdict on the call op(*args, **options): explain(llmkernels.rms_norm, x, weight)."""
    return get(op if isinstance(op, str) else op.__name__).explain(*args, **options)


def bind(op: str | Callable, *args: Any, **options: Any) -> Callable:
    """The implementation that answers op(*args, **options), its options bound: call it with arrays of the same kind."""
    return get(op if isinstance(op, str) else op.__name__).bind(*args, **options)


def describe(value: Any) -> str:
    """An argument in a line: 'bfloat16 (7, 64) on cpu', or its repr."""
    if not is_array(value):
        return repr(value)
    kind = f"{value.scheme} weight" if hasattr(value, "scheme") else dtype_name(value)
    text = f"{kind} {tuple(value.shape)} on {getattr(value, 'device', 'cpu')}"
    if hasattr(value, "is_contiguous") and not value.is_contiguous():
        text += f" strides {tuple(value.stride())}"
    return text


@functools.cache
def _check_environment(settings: Settings) -> None:
    for name in settings.per_op:
        if name not in OPS:
            raise ValueError(
                f"LLMKERNELS_{name.upper()} is set, but {name!r} is not an op; the ops are {', '.join(sorted(OPS))}"
            )


def _on_cpu(value: Any) -> bool:
    # what jax.jit traces has no device, and no values to read
    return str(getattr(value, "device", "")).lower().startswith(("cpu", "tfrt_cpu"))


def _forget() -> None:
    for entry in OPS.values():
        entry._warned.clear()
        entry.function.forget()  # type: ignore[attr-defined]


FORGET.append(_forget)
