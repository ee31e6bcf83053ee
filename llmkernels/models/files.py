"""Files of a checkpoint or an adapter, read without trust: what is wrong with one is said in one line."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says what is wrong with it, and what to do."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; a checkpoint needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}; it must be a JSON object")
    return value


def open_tensors(file: Path) -> Any:
    """A safetensors file whose header is sound, or CheckpointError."""
    try:
        tensors = safe_open(file, framework="pt")  # checks that sizes, offsets and the file's length agree
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; the index names it: download the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}; download it again") from None
    names = [name for name, _ in json.loads(header, object_pairs_hook=list)]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{file} is not a whole safetensors file: a name is there twice; download it again")
    return tensors
