"""Models: how their files are read (config, weights, tokenizer, adapters), and what they are made of (model.py).

Beside these files lie the checkpoints that come with the package.
"""

from pathlib import Path


def shipped_model(name: str = "manual-5m") -> Path:
    """The directory of a checkpoint that comes with the package: 'manual-5m', or 'manual-5m-draft' (no tokenizer)."""
    return Path(__file__).parent / name
