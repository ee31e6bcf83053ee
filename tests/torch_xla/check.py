"""Run by `make test-torch-xla`, in an environment of its own: the ops for torch-xla tensors, PJRT_DEVICE=CPU."""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("PJRT_DEVICE", "CPU")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch_xla
from adapter_parity import tally

from llmkernels.integrations import torch_xla as ops
from llmkernels.registry import OPS


def there(x):
    return x.to("xla")


def back(x):
    return x.cpu()


def main():
    begin = time.perf_counter()
    passed, failed = tally(ops, there, back)
    seconds = time.perf_counter() - begin
    versions = f"torch {torch.__version__}, torch_xla {torch_xla.__version__}"
    print(f"{versions}: {passed} passed, {failed} failed of {len(OPS)} ops in {seconds:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
