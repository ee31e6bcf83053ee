"""The small calls of `llmkernels bench --quick` under pytest-benchmark:  pytest bench/test_speed.py --benchmark-only

Each is checked against the float64 oracle before it is timed.  One copy of the arguments is used, so caches are warm:
compare two runs of this file with one another; `llmkernels bench` compares with the device's limit.
"""

import pytest

from llmkernels import bench, registry
from llmkernels.bench.cases import BENCH, timed
from llmkernels.bench.subject import Subject, bound
from llmkernels.discovery import Unsupported
from llmkernels.inputs import inputs
from llmkernels.settings import use

CALLS = [
    pytest.param(op, case, backend, id=f"{op}-{case.name}-{backend}")
    for op in sorted(BENCH)
    for case in timed(op, "cpu", quick=True)
    for backend in bench.candidates(op)
]


@pytest.mark.parametrize(("op", "case", "backend"), CALLS)
@pytest.mark.parametrize("dtype", bench.DTYPES["cpu"])
def test_speed(benchmark, op, case, backend, dtype):
    contract = registry.get(op).contract
    subject = Subject(contract, case.name, dtype, inputs(contract, case, dtype))
    call = subject.copy()
    try:
        with use(policy="silent", verify=False):
            run = registry.get(op).choose(call, backend).run
    except Unsupported as error:
        pytest.skip("; ".join(map(str, error.refusals[backend])))
    wrong, _, _ = subject.judge(subject.answers(run, call))
    assert not wrong
    benchmark.extra_info |= {"bytes": subject.cost.bytes, "operations": subject.cost.operations}
    benchmark(bound(contract, run, subject.copy()))
