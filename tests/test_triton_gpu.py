"""CUDA graphs and torch.compile on a GPU.  tests/triton_gpu.py has the checks, and makes them without pytest."""

import pytest
import triton_gpu

from llmkernels.discovery import absent

NO_GPU = absent("triton")


@pytest.mark.skipif(NO_GPU is not None, reason=f"CUDA graphs need a GPU: {NO_GPU}")
@pytest.mark.parametrize("name", triton_gpu.CHECKS)
def test_on_a_gpu(name):
    triton_gpu.CHECKS[name]()
