"""Every op x backend x dtype x case agrees with the float64 oracle, or refuses in words."""

import pytest

from llmkernels import testing
from llmkernels.discovery import REFERENCE, absent, backends, implementation
from llmkernels.registry import OPS

COMPILED = "xla"  # each case is a program of its own, a tenth of a second to compile


def calls():
    """Every op x dtype x case x backend.  Where each is compiled, a case in one dtype, and in the others if slow."""
    for entry in OPS.values():
        contract = entry.contract
        for place, dtype in enumerate(contract.dtypes):
            for number, case in enumerate(contract.cases):
                for backend in [*backends(), REFERENCE]:
                    slow = backend == COMPILED and (number + place) % len(contract.dtypes) and not case.raises
                    name = f"{contract.name}-{dtype}-{case}-{backend}"
                    marks = [pytest.mark.slow] if slow else []
                    yield pytest.param(contract, dtype, case, backend, id=name, marks=marks)


@pytest.mark.parametrize(("contract", "dtype", "case", "backend"), calls())
def test_parity(contract, dtype, case, backend):
    if why := absent(backend):
        pytest.skip(str(why))
    result = testing.check(contract, dtype, case, backend)
    assert result.verdict != "failed", str(result)
    if backend == REFERENCE:
        assert result.verdict == "passed"
    for reason in result.reasons:
        assert reason


@pytest.mark.parametrize("backend", backends())
def test_a_backend_takes_something(backend):
    """A file that refuses every case would pass test_parity; here it fails."""
    if why := absent(backend):
        pytest.skip(str(why))
    for name, op in OPS.items():
        if implementation(backend, name):
            verdicts = (
                testing.check(op.contract, d, c, backend).verdict
                for d in op.contract.dtypes
                for c in op.contract.cases
                if not c.raises
            )
            assert "passed" in verdicts, f"{backend}/{name}.py refuses every case"


def test_every_op_has_an_easy_a_hostile_and_a_forbidden_case():
    for name, op in OPS.items():
        cases = op.contract.cases
        assert any(not c.hostile for c in cases), name
        assert any(c.hostile for c in cases), name
        assert len({c.name for c in cases}) == len(cases), f"{name}: two cases have one name"
        assert "Args:" in op.function.__doc__, name
