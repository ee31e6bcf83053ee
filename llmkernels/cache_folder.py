"""Where measurements and verdicts are kept: LLMKERNELS_CACHE, or llmkernels/ in the user's cache folder."""

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any


def folder() -> Path:
    """The cache folder, created private.  ValueError if somebody else could have put something into it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("LLMKERNELS_CACHE") or home / "llmkernels")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise ValueError(
            "the cache folder belongs to, or can be written by, somebody else; set LLMKERNELS_CACHE to a private one"
        )
    return path


def load(name: str) -> dict[str, Any]:
    """The JSON object kept under `name`; empty where there is none, or where it is damaged."""
    try:
        value = json.loads((folder() / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def store(name: str, value: dict[str, Any]) -> None:
    """Keep `value` under `name`.  Written aside and renamed, so that a reader never sees half of it."""
    handle, aside = tempfile.mkstemp(dir=folder(), prefix=name)
    with os.fdopen(handle, "w") as file:
        json.dump(value, file, indent=1)
    os.replace(aside, folder() / f"{name}.json")
