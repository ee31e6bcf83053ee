"""Each mistake planted in a Triton kernel fails conformance in the interpreter; tests/triton_faults.py lists them."""

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import triton_faults

pytestmark = pytest.mark.skipif(not util.find_spec("triton"), reason="triton is not installed")


@pytest.fixture(scope="module")
def told():
    script = Path(triton_faults.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "plant the fault elsewhere" not in done.stderr, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", triton_faults.FAULTS)
def test_a_planted_fault_fails_conformance(name, told):
    assert told[name], f"{name}: no case of {triton_faults.FAULTS[name].op} noticed"


def test_every_kernel_file_has_a_fault():
    """A kernel is a function that Triton compiles and somebody launches."""
    folder = triton_faults.ROOT / "backends" / "triton"
    with_kernels = {
        file.stem for file in folder.glob("*.py") if "launch(" in file.read_text() and "@triton.jit" in file.read_text()
    }
    assert with_kernels <= {fault.file for fault in triton_faults.FAULTS.values()} | {"_launch"}
