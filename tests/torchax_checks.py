"""The ops for torchax tensors; tests/test_torchax.py runs these in a process of their own."""

import pytest
import torch
import torchax
from adapter_parity import cases, complaints

import llmkernels
from llmkernels.integrations import torchax as ops


def there(x):
    with torchax.default_env():
        return x.to("jax")


def back(x):
    return torch.from_dlpack(x.jax()).clone()


@pytest.mark.parametrize(
    ("op", "dtype", "case"), [pytest.param(*c, id=f"{c[0].name}: {c[2]}, {c[1]}") for c in cases()]
)
def test_parity(op, dtype, case):
    assert not complaints(getattr(ops, op.name), op, dtype, case, there, back)


def test_inside_torchax_jit():
    x, weight = there(torch.randn(3, 8)), there(torch.ones(8))
    jitted = torchax.interop.jax_jit(lambda x, w: ops.rms_norm(x, w))
    torch.testing.assert_close(back(jitted(x, weight)), back(ops.rms_norm(x, weight)))


def test_a_written_view_is_written():
    k, slots, cache = there(torch.ones(1, 1, 8)), there(torch.tensor([5])), there(torch.zeros(2, 3, 4, 1, 8))
    with torchax.default_env():
        view = cache[1]
    ops.write_kv(k, None, view, None, slots)
    assert float(back(cache).sum()) == float(back(cache)[1, 1, 1].sum()) == 8


def test_wrong_tensors():
    plain = torch.ones(3, 8)
    with pytest.raises(ValueError, match="rms_norm: an argument is of type Tensor; pass torchax tensors, made with"):
        ops.rms_norm(plain, plain[0])
    x, weight = there(plain), there(plain[0])
    with pytest.raises(llmkernels.Unsupported, match=r"x is on jax:0; computes on cpu"):
        llmkernels.rms_norm(x, weight, backend="xla")
