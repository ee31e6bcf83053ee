"""The ops for torchax tensors, in a process of their own: torchax changes what torch knows of devices for good."""

import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).parent / "torchax_checks.py"


def test_torchax():
    told = subprocess.run([sys.executable, "-m", "pytest", "-q", str(CHECKS)], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
