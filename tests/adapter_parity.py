"""What an adapter for somebody's tensors has to pass: the same answers as the reference, written arguments included."""

import llmkernels
from llmkernels.comparison import compare
from llmkernels.inputs import inputs
from llmkernels.registry import OPS

DTYPES = ("float32", "bfloat16")


def cases(each=3):
    """(op, dtype, case): easy cases of every op, the first in each dtype, the middle and the last in one."""
    for op in OPS.values():
        easy = [case for case in op.contract.cases if not case.hostile]
        for at in sorted({round(i * (len(easy) - 1) / (each - 1)) for i in range(each)}):
            for dtype in DTYPES if at == 0 else DTYPES[at % 2 :][:1]:
                yield op, dtype, easy[at]


def tally(functions, there, back):
    """(passed, failed) of those cases for an adapter's functions, of which each must have run on xla, and no other."""
    passed = failed = 0
    for op, dtype, case in cases():
        wrong = complaints(getattr(functions, op.name), op, dtype, case, there, back)
        passed, failed = passed + (not wrong), failed + bool(wrong)
        for text in wrong:
            print(f"{op.name}, {dtype}, {case}: {text}")
    told = llmkernels.ledger.read()
    assert set(told) == set(OPS), f"not every op ran: {sorted(set(OPS) - set(told))}"
    assert all(set(backends) == {"xla"} for backends in told.values()), told
    return passed, failed


def complaints(function, op, dtype, case, there, back):
    """What is wrong about function(...) on tensors that `there` moved to the device and `back` fetches."""
    contract, call = op.contract, inputs(op.contract, case, dtype)
    arrays = [name for name, x in call.items() if x is not None and name in contract.shapes.inputs]
    moved = call | {n: call[n].map(there) if hasattr(call[n], "scheme") else there(call[n]) for n in arrays}
    results = function(**moved)
    results = [] if results is None else [*results] if isinstance(results, tuple) else [results]
    written = [p.name for p in contract.shapes.inputs.values() if p.mutated and call[p.name] is not None]
    got = [back(x) for x in [*results, *(moved[name] for name in written)]]
    if contract.judge:
        return contract.judge(call, got[0].long())
    answers = []
    for wide in (True, False):
        again = inputs(contract, case, dtype, wide=wide)
        said = contract.reference(**again)
        said = [] if said is None else [*said] if isinstance(said, tuple) else [said]
        answers.append([*said, *(again[name] for name in written)])
    terms = contract.cost(call, contract.validate(call)).operations / 2 / max(1, sum(w.numel() for w in answers[0]))
    names = [*contract.outputs(call), *written]
    assert len(got) == len(names)
    return [
        text
        for name, g, want, near in zip(names, got, *answers, strict=True)
        for text in compare(name, g, want, near, None if name not in written else call[name], terms)[0]
    ]
