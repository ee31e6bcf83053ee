"""Triton's products beyond the conformance cases, and its codes; tests/triton_products.py has the checks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.timeout(280)
def test_products_and_codes_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_products.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told
    assert not any(told.values()), {check: error for check, error in told.items() if error}
