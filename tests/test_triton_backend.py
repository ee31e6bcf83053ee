"""The Triton kernels in the interpreter: every case of every contract, and under torch.compile.

In processes of their own, because Triton decides when it is imported whether it interprets.
"""

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAST_TAKEN = 0.95  # of the cases that a contract allows
pytestmark = pytest.mark.skipif(not util.find_spec("triton"), reason="triton is not installed")


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(1200)
def test_conformance_emulated():
    """Two processes; bfloat16 is computed in float32 and rounded once, as the interpreter cannot do it."""
    done = python(
        "-m", "llmkernels", "conformance", "--backend", "triton", "--emulated", "--jobs", "2", "--json",
    )  # fmt: skip
    report = json.loads(done.stdout)
    failed = [(c["op"], c["dtype"], c["case"], c["reasons"]) for c in report["cases"] if c["verdict"] == "failed"]
    assert not failed
    assert done.returncode == 0, done.stderr
    assert report["passed"] >= LEAST_TAKEN * len(report["cases"]), report["refused"]


TORCH_OPS = """
import torch
from llmkernels.inputs import inputs
from llmkernels.memory import bits
from llmkernels.registry import OPS, get
from llmkernels.settings import use

get("rms_norm")
torch.set_num_threads(1)


def everything(op, function, case):
    call = inputs(op.contract, case, "float32")
    found = function(**call)
    found = list(found) if isinstance(found, (tuple, list)) else [] if found is None else [found]
    return found + [call[p.name] for p in op.contract.shapes.inputs.values() if p.mutated and call[p.name] is not None]


for op in OPS.values():
    case = next(case for case in op.contract.cases if not case.hostile)
    with use("triton", policy="strict"), torch.no_grad():
        eager = everything(op, op.function, case)
        run = torch.compile(op.function, fullgraph=True, backend="aot_eager")
        compiled = everything(op, run, case)
    assert len(eager) == len(compiled), op.name
    for a, b in zip(eager, compiled):
        assert torch.equal(bits(a.contiguous()), bits(b.contiguous())), op.name
    print(op.name)
"""


def test_every_op_compiles_into_one_graph():
    """The public function becomes torch.ops.llmkernels.<op>, which launches the kernels: the same bits as eager."""
    from llmkernels.registry import OPS, get

    get("rms_norm")
    done = python("-c", TORCH_OPS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == set(OPS)
