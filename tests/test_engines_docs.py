"""docs/engines.md and docs/xla.md: their Python blocks run, in order, in one namespace; what they name is there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = {ROOT / "docs" / "engines.md": 9, ROOT / "docs" / "xla.md": 2}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_python_runs(page):
    text = page.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) >= PAGES[page]
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1  # so that a traceback points into the page
        exec(compile("\n" * line + block[1], str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_it_names_is_there(page):
    text = page.read_text()
    for place in re.findall(r"`((?:llmkernels|examples|tests|bench|docs)/[\w./-]+)`", text):
        assert (ROOT / place).exists(), place
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
