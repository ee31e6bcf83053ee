"""docs/engines.md: its Python blocks run, in order, in one namespace; the places it names are there."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "engines.md"
TEXT = PAGE.read_text()


def test_its_python_runs():
    blocks = list(re.finditer(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 9
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        line = TEXT.count("\n", 0, block.start()) + 1  # so that a traceback points into the page
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)


def test_what_it_names_is_there():
    for place in re.findall(r"`((?:llmkernels|examples|tests|bench|docs)/[\w./-]+)`", TEXT):
        assert (ROOT / place).exists(), place
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
