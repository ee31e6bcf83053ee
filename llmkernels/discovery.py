"""Which backends there are, and why one of them may be out of the question.

A backend is a package; the file <backend>/<op>.py is its answer to that op.  The path is the registration: there is no
list to edit and no decorator to forget.  Nothing is imported before it is asked for.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module, util
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

REFERENCE = "reference"
CODES = {
    "ABSENT": "the machine lacks what the backend needs",
    "NOT_BUILT": "the backend has no such kernel, or it was not compiled",
    "ARCH": "this chip is not one the kernel is for",
    "DTYPE": "an array's dtype",
    "SHAPE": "a size",
    "LAYOUT": "strides or alignment",
    "OPTION": "an option of the call",
    "DEVICE": "where an array lives, or whose array it is",
    "TRAIT": "the implementation does not declare a trait the caller requires",
    "PARITY": "the kernel gave a wrong answer in its first-use check",
}


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not take a call: a code of CODES, the reason, and the nearest change it would take."""

    code: str
    reason: str
    fix: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise TypeError(f"refusal code {self.code!r} is not one of {', '.join(CODES)}")

    def __str__(self) -> str:
        return f"[{self.code}] {self.reason}; {self.fix}"


class Unsupported(NotImplementedError):
    """The call keeps the contract, and no backend that was asked takes it.  The message says why, one by one.

    `refusals` maps each backend to its list of Refusal.
    """

    def __init__(self, message: str, refusals: dict[str, list[Refusal]]):
        super().__init__(message)
        self.refusals = refusals


@functools.cache
def backends() -> dict[str, str]:
    """Backend -> package, in the order asked: installed plug-ins first, then llmkernels.backends.ORDER."""
    house = {name: f"llmkernels.backends.{name}" for name in import_module("llmkernels.backends").ORDER}
    plugins = {point.name: point.value for point in entry_points(group="llmkernels.backends")}
    for name in plugins:
        if name in house or name == REFERENCE:
            raise ValueError(
                f"the plug-in {plugins[name]} calls itself {name!r}, which is taken; rename its entry point"
            )
    return plugins | house


def check_name(name: str, asked_by: str) -> None:
    """ValueError unless `name` is a backend; `asked_by` says where the name came from."""
    if name != REFERENCE and name not in backends():
        raise ValueError(f"{asked_by} asks for {name!r}; the backends are {', '.join([*backends(), REFERENCE])}")


def package(backend: str) -> ModuleType:
    return import_module(backends()[backend])


def cache_axes(backend: str | None) -> tuple[int, ...]:
    """In which order the backend likes the axes of a KV cache in memory, outermost first.

    A backend states it by CACHE_AXES, a permutation of [pages page_size kv_heads dim]; the default is their own order.
    """
    own = (0, 1, 2, 3)
    return getattr(package(backend), "CACHE_AXES", own) if backend in backends() else own


@functools.cache
def absent(backend: str) -> Refusal | None:
    """Why this machine cannot use `backend` at all; None when it can."""
    if backend == REFERENCE:
        return None
    try:
        why = package(backend).absent()
    except (ImportError, OSError) as error:  # OSError: a shared library that it loads is missing
        return Refusal("ABSENT", f"{backends()[backend]} cannot be imported: {error}", "install what it needs")
    return why and Refusal(*why)


@functools.cache
def implementation(backend: str, op: str) -> ModuleType | None:
    """The module <backend>/<op>.py, or None where there is no such file."""
    return import_module(f"{backends()[backend]}.{op}") if has(backend, op) else None


def has(backend: str, op: str) -> bool:
    """Whether there is a file <backend>/<op>.py.  It is not imported: an emulation may have to be chosen before."""
    return util.find_spec(f"{backends()[backend]}.{op}") is not None


def refusals(backend: str, op: str, family: str, call: dict[str, Any], require: dict[str, Any]) -> list[Refusal]:
    """Every reason `backend` has not to take this call; empty means it takes it.

    A bug inside an implementation's `refuse` propagates: it is an error, never a refusal.
    """
    if why := absent(backend):
        return [why]
    if not (module := implementation(backend, op)):
        return [Refusal("NOT_BUILT", f"{backend} has no {op}.py", "use another backend for this op")]
    arrays = package(backend).ARRAYS
    if family not in arrays:
        return [Refusal("DEVICE", f"takes {' or '.join(arrays)} arrays, not {family}", f"convert to {arrays[0]}")]
    if elsewhere := _elsewhere(call, getattr(package(backend), "DEVICES", ())):
        return [elsewhere]
    return [*missing_traits(backend, getattr(module, "TRAITS", {}), require)] + [
        Refusal(*reason) for reason in module.refuse(**call)
    ]


def _elsewhere(call: dict[str, Any], devices: tuple[str, ...]) -> Refusal | None:
    """Why a backend that lists the kinds of DEVICES it computes on cannot reach the arrays of this call."""
    for name, value in call.items():
        device = getattr(getattr(value, "values", value) if hasattr(value, "scheme") else value, "device", None)
        kind = getattr(device, "type", None)  # torch's; others live where their library puts them
        if devices and kind and kind not in devices:
            where = " or ".join(devices)
            return Refusal("DEVICE", f"{name} is on {device}; computes on {where}", f"move the arrays to {where}")
    return None


def missing_traits(backend: str, traits: dict[str, Any], require: dict[str, Any]) -> Iterator[Refusal]:
    for trait, want in require.items():
        have = traits.get(trait)
        if have is None or (have > want if trait == "workspace_bytes" else have != want):
            yield Refusal("TRAIT", f"{backend} declares {trait}={have}; {want} is required", "require less")


def emulating(backend: str) -> bool:
    """Whether what the backend does now is an emulation, chosen here or by the environment: no evidence of a device."""
    asked = backend != REFERENCE and getattr(package(backend), "emulating", None)
    return bool(asked and asked())


@contextmanager
def emulated(backend: str) -> Iterator[str]:
    """Run `backend` through the emulation it offers, on CPU arrays.  Yields what that emulation is.

    A backend offers one by EMULATION, a sentence, and emulation(), a context manager; ValueError where it has none.
    """
    what: str | None = getattr(package(backend), "EMULATION", None)
    if not what:
        raise ValueError(f"{backend} offers no emulation; leave --emulated out to run it as it is")
    with ExitStack() as stack:
        stack.enter_context(package(backend).emulation())
        forget_all()
        stack.callback(forget_all)
        yield what


FORGET: list[Callable[[], None]] = [absent.cache_clear, implementation.cache_clear, backends.cache_clear]


def forget_all() -> None:
    """Drop everything remembered about backends and calls; the next call finds out again."""
    for forget in FORGET:
        forget()
