"""The compiled module; csrc/cpu/bind.cpp says what it holds."""

from typing import Any

def __getattr__(name: str) -> Any: ...
