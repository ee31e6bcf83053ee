"""The first-use self-check: an implementation answers a few conformance cases before it answers a caller.

Kernels that return garbage on a chip nobody tried are a real class of bug.  The verdict is kept by the hash of the
backend's files, the device and the versions, so that it costs something once, not once a process.
"""

import functools
import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkernels import cache_folder
from llmkernels.arrays import is_array
from llmkernels.discovery import FORGET, Refusal, package
from llmkernels.shapes import dtype_name

NAME = "selfcheck"


def verdict(op: Any, backend: str, call: Mapping[str, Any]) -> list[Refusal]:
    """Empty if `backend` answered a few of the op's cases rightly on this device; else a PARITY refusal."""
    array = next(value for value in call.values() if is_array(value))
    device = str(getattr(array, "device", "cpu"))
    return _verdict(op, backend, dtype_name(array), "cpu" if device.lower().startswith(("cpu", "tfrt_cpu")) else device)


@functools.cache
def _verdict(op: Any, backend: str, dtype: str, device: str) -> list[Refusal]:
    key = " ".join([op.name, backend, dtype, _chip(device), variant(backend), _versions(), fingerprint(backend)])
    known = cache_folder.load(NAME)
    if key not in known:
        known = cache_folder.load(NAME) | {key: _check(op, backend, dtype, device)}
        cache_folder.store(NAME, known)
    if not known[key]:
        return []
    fix = f"use another backend and report it; `llmkernels conformance --backend {backend} --op {op.name}` shows more"
    return [Refusal("PARITY", f"gave a wrong answer in its first-use check: {known[key]}", fix)]


def _check(op: Any, backend: str, dtype: str, device: str) -> str:
    """The complaint about the first, the middle or the last ordinary case; '' when those it takes are right."""
    from llmkernels import testing  # the kit imports torch and every op; needed on first use only

    cases = [case for case in op.contract.cases if not case.hostile]
    for case in (cases[0], cases[len(cases) // 2], cases[-1]):
        result = testing.check(op.contract, dtype, case, backend, device)
        if result.verdict == "failed":
            return "; ".join(result.reasons)
    return ""


@functools.cache
def fingerprint(backend: str) -> str:
    """A hash of every file of the backend's package, native modules included."""
    digest = hashlib.sha256()
    for file in sorted(Path(package(backend).__file__ or ".").parent.rglob("*")):
        if file.suffix in (".py", ".so", ".pyd"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def variant(backend: str) -> str:
    """Which of its kernels a backend uses on this processor, where it says so by isa()."""
    return str(getattr(package(backend), "isa", lambda: "any")())


def _versions() -> str:
    import torch

    from llmkernels import __version__

    return f"llmkernels-{__version__} torch-{torch.__version__} python-{platform.python_version()}"


def _chip(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device).replace(" ", "-")
    return f"{device}-{platform.machine()}"


FORGET += [_verdict.cache_clear, fingerprint.cache_clear]
