"""What the README says is so: its example runs, its table is what the records say, its files exist."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from llmkernels import status
from llmkernels.registry import OPS, get

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {}
    exec(example, names)
    torch.testing.assert_close(names["run"](names["x"], names["weight"]), names["y"])
    assert "chosen" in capsys.readouterr().out


def test_the_status_table_is_what_the_records_say():
    table = re.search(r"<!-- status -->\n(.*?)<!-- end of status -->", README, re.DOTALL)[1].strip()
    assert table == status.markdown(status.rows(status.records())).strip(), "run: make readme"


def test_every_op_is_named_and_every_command_exists():
    get("rms_norm")  # declares them all
    for op in OPS:
        assert f"`{op}`" in README, op
    help_text = subprocess.run(
        [sys.executable, "-m", "llmkernels", "--help"], capture_output=True, text=True, check=True
    )
    for command in re.findall(r"^llmkernels (\w+)", README, re.MULTILINE):
        assert command in help_text.stdout, command
    for target in re.findall(r"^make (\w[\w-]*)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_every_place_it_names_is_there():
    layout = re.search(r"## Where is what\n\n```\n(.*?)```", README, re.DOTALL)[1]
    for place in re.findall(r"^(\S+)", layout, re.MULTILINE):
        if "<" not in place:
            assert (ROOT / place).exists(), place
