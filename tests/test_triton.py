"""The Triton backend, in Triton's interpreter: in processes of its own, because Triton decides once how it runs."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkernels.discovery import absent

pytest.importorskip("triton")


def python(*args, **environment):
    done = subprocess.run(
        [sys.executable, *args], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_cpu_is_no_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    assert "torch sees no GPU" in absent("triton").reason


def test_every_kernel_first_waits_for_the_one_before():
    """Kernels are launched while the one before still runs; one that does not wait reads what is not written yet."""
    kernels, launched = {}, set()
    for file in (Path(__file__).parents[1] / "backends" / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.args.args and node.args.args[-1].arg == "CHAINED":
                kernels[node.name] = [ast.unparse(line) for line in node.body[:2]]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
                launched.add(ast.unparse(node.args[0]))
    del kernels["after_previous"]
    assert launched == set(kernels)
    assert all("after_previous(CHAINED)" in lines for lines in kernels.values()), kernels


SHARES = """
import sys
from llmkernels import testing
from llmkernels.backends.triton import paged_attention
from llmkernels.registry import get

contract, shares = get("paged_attention").contract, int(sys.argv[2])
case = next(case for case in contract.cases if case.name == sys.argv[1])
paged_attention._shares = lambda *any, **kind: shares
paged_attention._tiles = lambda *any, **kind: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
result = testing.check_run(contract, "float16", case, paged_attention, "triton")
assert result.verdict == "passed", result
"""


@pytest.mark.parametrize(
    ("case", "shares"),
    [("decode", 4), ("mixed", 3), ("mixed", 64), ("window", 3), ("sinks", 64), ("padding and sinks", 7)],
)
def test_any_number_of_programs_may_share_the_keys(case, shares):
    python("-c", SHARES, case, str(shares), TRITON_INTERPRET="1")


def test_a_table_of_measured_tiles(tmp_path, monkeypatch):
    from llmkernels.backends.triton import _tuned

    heuristic = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
    kind = {"dtype": "float16", "width": 4096}
    key = _tuned.key("some", "Some Chip", **kind)
    monkeypatch.setattr(_tuned, "_name", lambda index: "Some Chip")
    monkeypatch.setenv("LLMKERNELS_TUNED", str(tmp_path / "table.json"))

    def chosen(entry):
        (tmp_path / "table.json").write_text(entry if isinstance(entry, str) else json.dumps({key: entry}))
        _tuned.table.cache_clear(), _tuned._merged.cache_clear()
        return _tuned.choose("some", SimpleDevice, dict(heuristic), **kind)

    assert chosen({"BLOCK": 128}) == heuristic | {"BLOCK": 128}
    for broken in ("", "[1]", {"BLOCK": 48}, {"BLOCK": "128"}, {"WIDTH": 128}, {"num_stages": 9}, {"num_warps": 0}, 7):
        assert chosen(broken) == heuristic, broken
    assert chosen({}) == heuristic
    _tuned.table.cache_clear(), _tuned._merged.cache_clear()


class SimpleDevice:
    index = 0


def test_interpreted_by_the_environment_is_emulated(monkeypatch):
    """Neither a run on the CPU, nor worth a time."""
    from llmkernels import discovery
    from llmkernels.bench import candidates

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    discovery.forget_all()
    assert discovery.emulating("triton")
    assert "triton" not in candidates("rms_norm")
    monkeypatch.delenv("TRITON_INTERPRET")
    discovery.forget_all()
    assert not discovery.emulating("triton")
