"""Benchmarks: nothing wrong is timed, everything that is timed is told, and a recorded call comes back as it was."""

import json

import pytest
import torch
from typer.testing import CliRunner

import llmkernels
from llmkernels import bench, ledger, registry, roofline
from llmkernels.bench import peers, results, timing
from llmkernels.bench.cases import BENCH, timed
from llmkernels.bench.dispatch import overhead
from llmkernels.bench.peers import small_ops as _small_ops  # noqa: F401
from llmkernels.bench.replay import recorded
from llmkernels.bench.subject import PEER_SLACK, Subject
from llmkernels.cli import app
from llmkernels.contract import Case, Cost
from llmkernels.inputs import inputs

CEILINGS = roofline.Ceilings(
    "a chip", 2, {"read": 2e10, "copy": 1e10}, {"float32": 1e11, "bfloat16": 4e10, "int8": 4e11}, "2026-01-01"
)
QUICK = [
    pytest.param(op, case, id=f"{op}-{case.name}") for op in sorted(BENCH) for case in timed(op, "cpu", quick=True)
]
ROW = {
    *("op", "backend", "dtype", "case", "seconds", "limit_seconds", "percent_of_limit", "peers", "ratio_to_best_peer"),
    *("dispatch_seconds", "parity_error"),
}


@pytest.fixture(autouse=True)
def little_time(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "QUICK_BUDGET", 1e-3)
    monkeypatch.setattr(timing, "MOST_COPIES", 2)
    monkeypatch.setattr(roofline, "measure", lambda *args, **options: CEILINGS)


def subject(op, case=None, dtype="float32"):
    contract = registry.get(op).contract
    case = case or timed(op, "cpu", quick=True)[0]
    return Subject(contract, case.name, dtype, inputs(contract, case, dtype))


def command(*arguments):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_every_op_has_calls_worth_timing_whose_names_differ():
    assert set(BENCH) == set(registry.OPS)
    for op, lines in BENCH.items():
        names = [line.case.name for line in lines]
        assert len(set(names)) == len(names)
        assert timed(op, "cpu", quick=True)
        assert len(timed(op, "cuda", quick=False)) == len(lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "case"), QUICK)
def test_quick_calls_cost_something_and_peers_agree_with_the_oracle(op, case, dtype):
    one = subject(op, case, dtype)
    assert one.cost.bytes > 0
    answered = 0
    for name, prepare in peers.peers(op, quick=True):
        call = one.copy()
        if run := prepare(call):
            wrong, error, _ = one.judge(one.answers(lambda *_, run=run, **__: run(), call), PEER_SLACK)
            assert not wrong, f"{name}: {wrong}"
            assert error < 0.1
            answered += 1
    assert answered, "no peer answers"


def test_a_copy_has_the_same_layout_and_its_own_memory():
    contract = registry.get("paged_attention").contract
    case = next(c for c in contract.cases if c.name == "packed K|V")
    one = subject("paged_attention", case)
    copy = one.copy()
    assert copy["k_cache"].stride() == one.call["k_cache"].stride()
    assert copy["k_cache"].untyped_storage().data_ptr() == copy["v_cache"].untyped_storage().data_ptr()
    assert copy["k_cache"].untyped_storage().data_ptr() != one.call["k_cache"].untyped_storage().data_ptr()
    assert one.nbytes < 2 * sum(x.nbytes for x in one.call.values() if isinstance(x, torch.Tensor))


def test_what_is_wrong_is_not_timed(monkeypatch):
    from llmkernels.discovery import implementation

    module = implementation("vendor", "rms_norm")
    monkeypatch.setattr(module, "run", lambda x, weight, **options: x * weight)
    told = list(bench.measure(CEILINGS, bench.subjects("cpu", "rms_norm", "float32", quick=True), "vendor", quick=True))
    assert [type(line) for line in told] == [bench.NotTimed] * len(told)
    assert all(line.why.startswith("fails parity: y is ") for line in told)


def test_a_wrong_peer_is_not_timed(monkeypatch):
    def prepare(call):
        return lambda: torch.zeros_like(call["x"])

    peers.peers("rms_norm")
    monkeypatch.setitem(peers.PEERS, "rms_norm", {"zeros": prepare})
    calls = bench.subjects("cpu", "rms_norm", "float32", quick=True)
    told = list(bench.measure(CEILINGS, calls, "reference", peers=True, quick=True))
    assert [(line.backend, line.why[:12]) for line in told if isinstance(line, bench.NotTimed)] == [
        ("zeros", "fails parity")
    ]
    assert [line.peers for line in told if isinstance(line, bench.Row)] == [{}]


def test_a_peer_that_rounds_in_groups_of_its_own_must_still_compute_the_product():
    one = subject("quantized_gemm", Case("", {"scheme": "w4a8_g128", "rows": 4, "out": 64, "in_": 512}))
    groups, weight = one.call["x"].unflatten(1, (-1, 32)), one.call["weight"].dequantize()
    levels = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / levels).round() * levels).flatten(1)
    assert one.judge([rounded @ weight.T], PEER_SLACK)[0]  # another answer than the contract's
    assert not one.judge_own_rounding([rounded @ weight.T])
    coarse = ((groups / levels / 8).round() * 8 * levels).flatten(1)
    for wrong in (
        coarse @ weight.T,
        1.02 * rounded @ weight.T,
        rounded[:, :-1] @ weight[:, :-1].T,
        rounded @ weight.roll(1, 0).T,
    ):
        assert "further from the product" in one.judge_own_rounding([wrong])
    assert one.judge_own_rounding([torch.full((4, 64), torch.nan)])


def test_a_refusal_and_a_crash_are_told(monkeypatch):
    from llmkernels.discovery import implementation

    def crash(*args, **options):
        raise RuntimeError("no such tile")

    module = implementation("vendor", "rms_norm")
    for name, change, words in (
        ("refuse", lambda **call: iter([("SHAPE", "too wide", "cut it")]), "refused: [SHAPE] too wide; cut it"),
        ("run", crash, "raised RuntimeError: no such tile"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, change)
            calls = bench.subjects("cpu", "rms_norm", "float32", quick=True)
            told = list(bench.measure(CEILINGS, calls, "vendor", quick=True))
        assert [line.why for line in told] == [words] * len(told)
        assert told


def test_the_report(tmp_path):
    file, picture = tmp_path / "report.json", tmp_path / "roofline.png"
    told = command("--op", "silu_and_mul", "--quick", "--peers", "--json", file, "--plot", picture)
    assert told.exit_code == 0, told.stderr
    report = json.loads(file.read_text())
    assert {"device", "ceilings", "rows"} <= set(report)
    assert report["device"] == "a chip"
    assert report["rows"]
    for row in report["rows"]:
        assert set(row) >= ROW
        assert row["limit_seconds"] == max(row["bytes"] / 2e10, row["operations"] / CEILINGS.rate(row["dtype"]))
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit_seconds"] / row["seconds"])
        assert row["ratio_to_best_peer"] == pytest.approx(min(row["peers"].values()) / row["seconds"])
        assert row["parity_error"] <= row["tolerance"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    shown = command("--load", file)
    assert shown.exit_code == 0
    assert shown.stdout.count("silu_and_mul") == len(report["rows"])
    printed = command("--op", "silu_and_mul", "--quick", "--json", "-")
    assert set(json.loads(printed.stdout)) >= {"device", "ceilings", "rows"}


def test_a_report_keeps_what_a_later_run_did_not_measure():
    def row(case, seconds):
        return {"op": "o", "backend": "b", "dtype": "d", "case": case, "seconds": seconds}

    old = {"device": "x", "ceilings": {}, "rows": [row("a", 1), row("b", 1)], "not_timed": []}
    new = {"device": "x", "ceilings": {}, "rows": [row("b", 2)], "not_timed": [row("c", None)]}
    merged = results.merge(old, new)
    assert [(r["case"], r["seconds"]) for r in merged["rows"]] == [("a", 1), ("b", 2)]
    assert [r["case"] for r in merged["not_timed"]] == ["c"]


def test_an_empty_report_is_not_drawn(tmp_path):
    file = tmp_path / "empty.json"
    results.write(file, bench.report(CEILINGS, []))
    told = command("--load", file, "--plot", tmp_path / "x.png")
    assert told.exit_code == 2
    assert "no row with operations to draw" in told.stderr


def test_recorded_calls_come_back_as_they_were(tmp_path):
    file = tmp_path / "calls.jsonl"
    made = [subject(op).copy() for op in sorted(BENCH)]
    case = next(c for c in registry.get("paged_attention").contract.cases if c.name == "tree")
    made.append(subject("paged_attention", case).copy())
    names = [*sorted(BENCH), "paged_attention"]
    with ledger.record(file):
        for name, call in zip(names, made, strict=True):
            for _ in range(2):
                getattr(llmkernels, name)(**call)
    back = list(recorded(file, "cpu"))
    assert [one.contract.name for one in back] == names
    for one, call in zip(back, made, strict=True):
        assert one.case.endswith("2 times")
        for name, value in call.items():
            again = one.call[name]
            if hasattr(value, "scheme"):
                assert (str(again.scheme), again.shape) == (str(value.scheme), value.shape)
            elif isinstance(value, torch.Tensor):
                assert (again.dtype, again.shape, again.stride()) == (value.dtype, value.shape, value.stride()), name
            else:
                assert again == value, name
        for name in ledger.LENGTHS & set(call):
            assert one.call[name].tolist() == call[name].tolist()
        one.contract.check_values and one.contract.check_values(one.call)
    told = command("--replay", file, "--op", "rms_norm", "--quick", "--backend", "reference", "--json", "-")
    assert told.exit_code == 0, told.stderr
    assert [row["case"] for row in json.loads(told.stdout)["rows"]] == [f"line {1 + names.index('rms_norm')}, 2 times"]


def test_a_file_that_is_no_recording(tmp_path):
    file = tmp_path / "calls.jsonl"
    file.write_text('{"op": "rms_norm"}\n')
    told = command("--replay", file)
    assert told.exit_code == 2
    assert "line 1 is no recorded call" in told.stderr


def test_dispatch_is_told_for_each_op():
    cost = overhead("rms_norm", "float32", budget=1e-3)
    assert cost.dispatch_seconds == pytest.approx(cost.call_seconds - cost.run_seconds)
    told = command("--dispatch", "--op", "rms_norm", "--json", "-")
    assert [set(row) for row in json.loads(told.stdout)["rows"]] == [
        {"op", "run_seconds", "call_seconds", "dispatch_seconds"}
    ]


def test_the_least_a_call_can_take():
    assert CEILINGS.seconds(Cost(2e10, 1), "float32") == 1  # memory
    assert CEILINGS.seconds(Cost(1, 1e11), "float32") == 1  # arithmetic
    assert CEILINGS.rate("bfloat16") == 1e11  # a kernel may compute in float32 where that is faster
    assert CEILINGS.rate("int8") == 4e11
    assert roofline.arithmetic(subject("rms_norm").call, {"T": "bfloat16"}) == "bfloat16"
    weight = subject("quantized_gemm", timed("quantized_gemm", "cpu", quick=True)[1]).call["weight"]
    assert str(weight.scheme) == "w8a8"
    assert roofline.arithmetic({"weight": weight}, {"T": "bfloat16"}) == "int8"


def test_ceilings_are_measured_once_and_never_fall(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(roofline, "CPU_BYTES", 1 << 16)
    monkeypatch.setattr(roofline, "CPU_SIZES", (16,))
    speeds = iter([1.0, 0.5, 2.0])
    kept = {}
    monkeypatch.setattr(roofline.cache_folder, "load", lambda name: kept)
    monkeypatch.setattr(roofline.cache_folder, "store", lambda name, value: kept.update(value))
    speed = [next(speeds)]
    monkeypatch.setattr(roofline, "_cpu_best", lambda run, budget=0.3: run() is None or 1 / speed[0])
    first = roofline.measure()
    assert first.bandwidth == {"read": 1 << 16, "copy": 2 << 16, "update": 3 << 16}
    assert set(first.rates) >= {"float32", "bfloat16", "float16"}
    assert roofline.measure() == first
    speed[0] = next(speeds)
    assert roofline.measure(fresh=True).bandwidth == first.bandwidth
    speed[0] = next(speeds)
    assert roofline.measure(fresh=True).bandwidth["read"] == 2 << 16


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234567.0, "B/s", "1.23 MB/s"),
        (0.0, "s", "0 s"),
        (3.4e-5, "s", "34 us"),
        (2e-12, "s", "0.002 ns"),
        (9.2e11, "op/s", "920 Gop/s"),
    ],
)
def test_numbers_with_units(value, unit, text):
    assert roofline.with_unit(value, unit) == text
