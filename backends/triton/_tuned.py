"""Measured choices of tiles, where somebody measured; else the heuristic.

A kernel's heuristic is a dict of its tile sizes, num_warps and num_stages.  `choose` replaces it by the entry that a
table has for this device, this Triton and this kind of call.  Nothing is measured here: `llmkernels tune` does that.

    {"NVIDIA H200 | triton 3.6.0 | silu_and_mul | dtype=bfloat16 width=4096": {"BLOCK": 2048, "num_warps": 8}, ...}

The key is made by `key`, from the device's name, Triton's version, the kernel, and the names and values that its op
passes: dtypes, head sizes, and buckets of lengths (powers of two).  A table is one JSON object: two merge by union, a
copy of the file pins it.  Read are, the later ones over the earlier: every backends/triton/tuned/*.json, then
triton-tuned.json in the cache folder, or instead of it the file that LLMKERNELS_TUNED names.  A damaged file is named
in one warning and adds nothing; nor does an entry that its kernel cannot take: the heuristic chooses.
"""

import functools
import json
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import triton

from ._launch import INTERPRETED

NAME = "triton-tuned.json"
_asked = None


def choose(kernel, device, heuristic, **kind):
    """`heuristic`, or what the tables have for this kernel on this device and kind of call, if it is sound."""
    if _asked:
        return _asked(key(kernel, _name(device.index), **kind), heuristic)
    if INTERPRETED or not table():
        return heuristic
    return _merged(key(kernel, _name(device.index), **kind), tuple(heuristic.items()))


@contextmanager
def answered_by(function):
    """Inside, `choose` returns function(key, heuristic): how `llmkernels tune` sees and changes what kernels choose."""
    global _asked
    before, _asked = _asked, function
    try:
        yield
    finally:
        _asked = before


def key(kernel, device, **kind):
    """What an entry is found by; kind is given in the order in which the op passes it."""
    words = " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in kind.items())
    return f"{device} | triton {triton.__version__} | {kernel} | {words}"


def sound(entry, heuristic):
    """Whether an entry names parameters of the kernel only, and powers of two (num_stages: 1 to 8)."""
    return (
        isinstance(entry, dict)
        and set(entry) <= set(heuristic)
        and all(type(value) is type(heuristic[name]) for name, value in entry.items())
        and all(isinstance(value, bool) or _possible(name, value) for name, value in entry.items())
    )


def _possible(name, value):
    return 1 <= value <= 8 if name == "num_stages" else value > 0 and value & (value - 1) == 0


@functools.cache
def table():
    """Every entry of every table."""
    entries: dict[str, dict] = {}
    for file in (*sorted((Path(__file__).parent / "tuned").glob("*.json")), file_of_user()):
        try:
            found = json.loads(file.read_text())
        except FileNotFoundError:
            continue
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            warnings.warn(f"{file} is no table of tuned tiles, and is not used: {error}", stacklevel=2)
            continue
        if isinstance(found, dict):
            entries |= found
        else:
            warnings.warn(f"{file} is no table of tuned tiles, and is not used: it holds no JSON object", stacklevel=2)
    return entries


def file_of_user():
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkernels"
    folder = Path(os.environ.get("LLMKERNELS_CACHE") or home)
    return Path(os.environ.get("LLMKERNELS_TUNED") or folder / NAME)


@functools.lru_cache(4096)
def _merged(key, heuristic):
    heuristic, entry = dict(heuristic), table().get(key)
    return heuristic | entry if entry is not None and sound(entry, heuristic) else heuristic


@functools.cache
def _name(index):
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(index)
