"""The conformance kit catches what it is there to catch.  That it accuses nobody else, tests/test_parity.py shows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import FAULTS

from llmkernels import comparison, testing
from llmkernels.memory import Fence, poisoned_allocations
from llmkernels.registry import OPS


def verdicts(op, run):
    """The failed results of `run` over all cases of `op`, those that must raise left out."""
    contract, module = OPS[op].contract, SimpleNamespace(run=run, TRAITS={"deterministic": True})
    for dtype in contract.dtypes:
        for case in contract.cases:
            if not case.raises:
                yield testing.check_run(contract, dtype, case, module, "planted")


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name):
    op, run = FAULTS[name]
    caught = next((result for result in verdicts(op, run) if result.verdict == "failed"), None)
    assert caught, f"{name}: {run.__doc__} No case of {op} noticed"
    assert caught.reasons


def test_the_list_is_long_enough():
    assert len(FAULTS) >= 12
    assert {op for op, _ in FAULTS.values()} == set(OPS)


def test_tolerance_is_roundoff():
    """bfloat16 may be off by a rounding or two, not by a percent."""
    want = torch.linspace(1, 2, 64, dtype=torch.float64)[None]
    near = want.bfloat16()
    said, error, tolerance = comparison.compare("y", near, want, near)
    assert not said
    assert error <= 2.0**-8 < tolerance < 2.0**-6
    assert comparison.compare("y", (want * 1.02).bfloat16(), want, near)[0]


def test_a_small_row_does_not_hide_behind_a_large_one():
    want = torch.tensor([[1000.0, 2000.0], [1e-3, 2e-3]], dtype=torch.float64)
    got = want.float()
    got[1, 0] = 0
    assert "at (1, 0)" in comparison.compare("y", got, want, want.float())[0][0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_special_values_must_agree(bad):
    want = torch.ones(2, 2, dtype=torch.float64)
    got = want.float()
    got[1, 1] = bad
    assert comparison.compare("y", got, want, want.float())[0]
    want[1, 1] = -torch.inf
    assert bool(comparison.compare("y", got, want, want.float())[0]) == (bad != -torch.inf)


def test_fresh_memory_is_poisoned_and_fenced():
    fence = Fence()
    with poisoned_allocations(fence):
        fresh = torch.empty(3, 5), torch.empty_like(torch.zeros(2, dtype=torch.int32)), torch.zeros(1).new_empty((2, 2))
    assert fresh[0].isnan().all()
    assert (fresh[1] == np.iinfo(np.int32).max).all()
    assert fresh[2].isnan().all()
    assert not fence.trespasses()
    fresh[0].as_strided((16,), (1,))[15] = 0.0
    assert fence.trespasses() == ["wrote after the memory of an output"]
    assert torch.empty is not fence.empty


def test_same_case_same_values_on_every_backend():
    contract = OPS["paged_attention"].contract
    case = contract.cases[0]
    a, b = (testing.inputs(contract, case, "float32") for _ in range(2))
    wide = testing.inputs(contract, case, "bfloat16", wide=True)
    assert torch.equal(a["q"], b["q"])
    assert torch.equal(wide["q"], a["q"].bfloat16().double())
    assert wide["q"].dtype == torch.float64
