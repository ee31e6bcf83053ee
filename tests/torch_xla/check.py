"""Run by `make test-torch-xla`, in an environment of its own: the ops for torch-xla tensors, PJRT_DEVICE=CPU."""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("PJRT_DEVICE", "CPU")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch_xla
from adapter_parity import cases, complaints

import llmkernels
from llmkernels.integrations import torch_xla as ops
from llmkernels.registry import OPS


def there(x):
    return x.to("xla")


def back(x):
    return x.cpu()


def main():
    begin, passed, failed = time.perf_counter(), 0, 0
    for op, dtype, case in cases():
        wrong = complaints(getattr(ops, op.name), op, dtype, case, there, back)
        passed, failed = passed + (not wrong), failed + bool(wrong)
        for text in wrong:
            print(f"{op.name}, {dtype}, {case}: {text}")
    told = llmkernels.ledger.read()
    assert set(told) == set(OPS), f"not every op ran: {sorted(set(OPS) - set(told))}"
    assert all(set(backends) == {"xla"} for backends in told.values()), told
    seconds = time.perf_counter() - begin
    versions = f"torch {torch.__version__}, torch_xla {torch_xla.__version__}"
    print(f"{versions}: {passed} passed, {failed} failed of {len(OPS)} ops in {seconds:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
