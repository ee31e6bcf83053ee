"""Dispatch: who answers, what a wrong call, an untaken call and an unknown backend say, and what is remembered."""

import json
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import llmkernels
from llmkernels import discovery, ledger, settings
from llmkernels.discovery import CODES, Refusal, backends

X, W = torch.ones(2, 8), torch.ones(8)
ATTENTION = (
    torch.randn(3, 4, 8),
    torch.randn(6, 4, 2, 8),
    torch.randn(6, 4, 2, 8),
    torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
    torch.tensor([6, 5], dtype=torch.int32),
    torch.tensor([0, 2, 3], dtype=torch.int32),
)


@pytest.fixture
def plug_in(monkeypatch):
    """A function that installs a backend `fake`, made of functions, in the place of all others."""

    def install(run, refuse=lambda **call: [], traits=None, native=False, absent=lambda: None, op="rms_norm"):
        package, module = ModuleType("fake_backend"), ModuleType(f"fake_backend.{op}")
        package.ARRAYS, package.NATIVE, package.absent, package.EMULATION = ("torch",), native, absent, None
        package.__path__, package.__file__ = [], __file__
        module.run, module.refuse, module.TRAITS = run, refuse, traits or {}
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, package.__name__, package)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        point = SimpleNamespace(name="fake", value="fake_backend")
        monkeypatch.setattr("llmkernels.backends.ORDER", ())
        monkeypatch.setattr(discovery, "entry_points", lambda group: [point])
        discovery.forget_all()

    yield install
    monkeypatch.undo()
    discovery.forget_all()


def answer_seven(x, weight, *, residual=None, eps=1e-6):
    return torch.full_like(x, 7)


def no_cuda(x, weight, **options):
    yield "DTYPE", f"x is {x.dtype}", "cast to bfloat16"
    yield "SHAPE", "hidden=8; takes multiples of 64", "pad hidden to 64"


# who answers


def test_plug_in_is_asked_first_and_counted(plug_in):
    plug_in(answer_seven)
    ledger.reset()
    for _ in range(3):
        assert (llmkernels.rms_norm(X, W) == 7).all()
    assert ledger.read()["rms_norm"] == {"fake": {"calls": 3, "why": {"first in order": 3}}}
    ledger.reset()
    assert ledger.read() == {}


def test_named_backend_strongest_first(plug_in, monkeypatch):
    plug_in(answer_seven)
    want = llmkernels.rms_norm(X, W, backend="reference")
    assert not (want == 7).any()
    with llmkernels.use("reference"):
        assert torch.equal(llmkernels.rms_norm(X, W), want)
        assert (llmkernels.rms_norm(X, W, backend="fake") == 7).all()
        with llmkernels.use("fake"):
            assert (llmkernels.rms_norm(X, W) == 7).all()
        assert torch.equal(llmkernels.rms_norm(X, W), want)
    assert (llmkernels.rms_norm(X, W) == 7).all()


def test_environment_chooses(plug_in, monkeypatch):
    plug_in(answer_seven)
    monkeypatch.setenv("LLMKERNELS_BACKEND", "reference")
    settings.environment.cache_clear()
    discovery.forget_all()
    try:
        assert not (llmkernels.rms_norm(X, W) == 7).any()
        monkeypatch.setenv("LLMKERNELS_RMS_NORM", "fake")
        settings.environment.cache_clear()
        discovery.forget_all()
        assert (llmkernels.rms_norm(X, W) == 7).all()
        monkeypatch.setenv("LLMKERNELS_RMS_NORMAL", "fake")
        settings.environment.cache_clear()
        discovery.forget_all()
        with pytest.raises(ValueError, match="'rms_normal' is not an op; the ops are"):
            llmkernels.rms_norm(X, W)
    finally:
        settings.environment.cache_clear()


def test_only_the_reference_takes_it(plug_in):
    plug_in(answer_seven, refuse=no_cuda)
    with warnings.catch_warnings(), llmkernels.use(policy="silent"):
        warnings.simplefilter("error")
        silent = llmkernels.rms_norm(X, W)
    with pytest.warns(UserWarning, match=r"(?s)\[SHAPE\] hidden=8; takes multiples of 64; pad.*slow reference") as said:
        answers = [llmkernels.rms_norm(x, W) for x in (X, X, torch.ones(3, 8))]
    assert torch.equal(answers[0], silent)
    assert len(said) == 1  # once a kind of call
    assert said[0].filename == __file__
    with llmkernels.use(policy="strict"), pytest.raises(llmkernels.Unsupported, match="SHAPE"):
        llmkernels.rms_norm(X, W)


def test_a_named_backend_that_refuses_raises_with_every_reason(plug_in):
    plug_in(answer_seven, refuse=no_cuda)
    with pytest.raises(llmkernels.Unsupported, match=r"(?s)x +float32 \(2, 8\).*\[DTYPE\].*\[SHAPE\]") as caught:
        llmkernels.rms_norm(X, W, backend="fake")
    assert [r.code for r in caught.value.refusals["fake"]] == ["DTYPE", "SHAPE"]


def test_bug_in_refuse_is_an_error(plug_in):
    def refuse(x, weight, **options):
        return [("DTYPE", f"{x.dtpye}", "")]

    plug_in(answer_seven, refuse=refuse)
    with pytest.raises(AttributeError, match="dtpye"):
        llmkernels.rms_norm(X, W)


def test_absent_backend_is_explained(plug_in):
    plug_in(answer_seven, absent=lambda: ("ABSENT", "no such chip", "buy one"))
    fake = llmkernels.explain("rms_norm", X, W).candidates[0]
    assert (fake.backend, fake.verdict, fake.reasons[0].code) == ("fake", "refuses", "ABSENT")


def test_wrong_kernel_is_refused_with_parity(plug_in, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMKERNELS_CACHE", str(tmp_path))
    plug_in(answer_seven, native=True)
    fake = llmkernels.explain("rms_norm", X, W).candidates[0]
    assert fake.reasons[0].code == "PARITY"
    assert "llmkernels conformance --backend fake --op rms_norm" in fake.reasons[0].fix
    with llmkernels.use(policy="silent"):
        assert not (llmkernels.rms_norm(X, W) == 7).any()
    kept = json.loads((tmp_path / "selfcheck.json").read_text())
    assert [key for key, complaint in kept.items() if key.startswith("rms_norm fake float32 cpu") and complaint]
    with llmkernels.use(verify=False):
        assert (llmkernels.rms_norm(X, W) == 7).all()


def test_traits_are_required(plug_in):
    plug_in(answer_seven, traits={"deterministic": True, "workspace_bytes": 4096})
    with llmkernels.use(require={"deterministic": True, "workspace_bytes": 8192}):
        assert (llmkernels.rms_norm(X, W) == 7).all()
    with llmkernels.use(require={"workspace_bytes": 100}):
        assert llmkernels.explain("rms_norm", X, W).candidates[0].reasons[0].code == "TRAIT"
    with llmkernels.use(require="batch_invariant"), pytest.raises(llmkernels.Unsupported, match="TRAIT"):
        llmkernels.rms_norm(X, W, backend="fake")


def test_bind_is_run_with_the_options_of_the_call(plug_in):
    plug_in(answer_seven)
    assert llmkernels.bind(llmkernels.rms_norm, X, W).func is answer_seven
    bound = llmkernels.bind("rms_norm", X, W, residual=X, eps=1e-3)
    assert bound.keywords == {"eps": 1e-3}  # arrays come with each call
    assert (bound(X, W, residual=X) == 7).all()


# what is remembered


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.bfloat16(), w.bfloat16()),
        lambda x, w: (torch.ones(3, 8), w),
        lambda x, w: (torch.ones(8, 2).T, w),
        lambda x, w: (torch.ones(2, 16)[:, ::2], w),
        lambda x, w: (x.numpy(), w.numpy()),
    ],
    ids=["dtype", "shape", "transposed", "strided", "numpy"],
)
def test_another_kind_of_call_is_chosen_anew(plug_in, change):
    seen = []

    def refuse(x, weight, **options):
        seen.append((x.dtype, x.shape))
        return []

    plug_in(answer_seven, refuse=refuse)
    for _ in range(3):
        with llmkernels.use(policy="silent"):
            llmkernels.rms_norm(X, W)
    assert len(seen) == 1
    for _ in range(3):
        with llmkernels.use(policy="silent"):
            llmkernels.rms_norm(*change(X, W))
            llmkernels.rms_norm(X, W)
    assert len(seen) == (1 if isinstance(change(X, W)[0], np.ndarray) else 2)
    with llmkernels.use(policy="silent"):
        before = len(seen)
        llmkernels.rms_norm(X, W, eps=1e-3)
        llmkernels.rms_norm(X, W, residual=X)
    assert len(seen) == before + 2


def test_a_broken_call_after_a_good_one_of_the_same_shape_still_raises(plug_in):
    plug_in(answer_seven)
    llmkernels.rms_norm(X, W)
    with pytest.raises(ValueError, match="weight is float64"):
        llmkernels.rms_norm(X, W.double())
    with pytest.raises(ValueError, match="put them on one device"):
        llmkernels.rms_norm(X, W.to("meta"))


def test_what_is_remembered_has_a_bound(monkeypatch):
    """An engine that gives a bound which grows with each step makes a new kind of call each time."""
    monkeypatch.setattr("llmkernels.dispatch.KEYS", 5)
    for bound in range(6, 26):
        llmkernels.paged_attention(*ATTENTION, max_seqlen_k=bound)
    assert len(llmkernels.paged_attention.forget.__self__) == 5
    llmkernels.ledger.reset()
    llmkernels.paged_attention(*ATTENTION, max_seqlen_k=25)
    assert sum(row["calls"] for row in llmkernels.ledger.read()["paged_attention"].values()) == 1


def test_a_remembered_call_is_refused_once_gradients_are_wanted(plug_in):
    plug_in(answer_seven)
    gain = torch.nn.Parameter(W)
    with torch.no_grad():
        for _ in range(2):
            llmkernels.rms_norm(X, gain)
    with pytest.raises(ValueError, match="weight requires a gradient"):
        llmkernels.rms_norm(X, gain)


def test_recorded_calls(plug_in, tmp_path):
    plug_in(answer_seven)
    with ledger.record(tmp_path / "calls.jsonl"):
        for x in (X, X, torch.ones(5, 8)):
            llmkernels.rms_norm(x, W, eps=1e-5)
        llmkernels.paged_attention(*ATTENTION, backend="reference")
    llmkernels.rms_norm(torch.ones(9, 8), W)
    first, second, attention = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert (first["op"], first["count"], second["count"]) == ("rms_norm", 2, 1)
    assert first["arguments"]["x"] == {"dtype": "float32", "shape": [2, 8], "strides": [8, 1]}
    assert first["arguments"]["eps"] == 1e-5
    assert attention["arguments"]["seq_lens"]["values"] == [6, 5]


# what a wrong call says


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: llmkernels.rms_norm(X, torch.ones(9)), r"weight has shape \(9,\); the contract is .* hidden=8"),
        (lambda: llmkernels.rms_norm(X.double(), W.double()), "x is float64; the contract says float32 or bf"),
        (lambda: llmkernels.rms_norm(X.int(), W), "x is int32"),
        (lambda: llmkernels.rms_norm(X, None), "weight is missing"),
        (lambda: llmkernels.rms_norm([1.0], W), r"x is \[1.0\], of type list; pass an array"),
        (lambda: llmkernels.rms_norm(X), "missing 1 required positional argument: 'weight'"),
        (lambda: llmkernels.rms_norm(X, W.to("meta")), "x is on cpu but weight is on meta; put them on one device"),
        (lambda: llmkernels.rms_norm(X, W.numpy()), "x is a torch array but weight is a numpy array"),
        (lambda: llmkernels.rms_norm(X, W, backend="nonsuch"), "'nonsuch'; the backends are .*reference"),
        (lambda: llmkernels.rms_norm(X, torch.nn.Parameter(W)), r"weight requires a gradient; .*torch.no_grad\(\)"),
        (lambda: llmkernels.explain("rms", X, W), "'rms' is not an op; the ops are"),
        (lambda: llmkernels.use(policy="loud").__enter__(), "policy is 'loud'; use one of strict, warn, silent"),
        (lambda: llmkernels.use(require="speed").__enter__(), "require names speed; the traits are deterministic"),
        (lambda: llmkernels.use(speed=1).__enter__(), "not speed"),
    ],
)  # fmt: skip
def test_value_errors_name_argument_value_and_expectation(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_values_are_checked_unless_switched_off():
    q, k, v, table, lengths, starts = ATTENTION
    bad = table.clone()
    bad[1, 0] = 77
    with llmkernels.use(policy="silent"):
        llmkernels.paged_attention(*ATTENTION)  # remembered; the check must survive that
        with pytest.raises(ValueError, match=r"block_table\[1, 0\] is 77; the cache has pages 0 to 5"):
            llmkernels.paged_attention(q, k, v, bad, lengths, starts)
        with llmkernels.use(checked=False), pytest.raises(IndexError):
            llmkernels.paged_attention(q, k, v, bad, lengths, starts, backend="reference")


def test_missing_attribute_lists_the_ops():
    with pytest.raises(AttributeError, match=r"llmkernels has no 'rmsnorm'; the ops are .*rms_norm"):
        _ = llmkernels.rmsnorm


# other people's arrays


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_numpy_arrays_of_dtypes_that_numpy_has_from_ml_dtypes(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    k, cache = (
        np.arange(8, dtype=ml_dtypes.bfloat16).reshape(1, 1, 8),
        np.zeros((2, 4, 1, 8), getattr(ml_dtypes, dtype)),
    )
    with llmkernels.use(policy="silent"):
        llmkernels.write_kv(k, k, cache, cache.copy(), np.array([5]))
        y, _ = llmkernels.quantize_activation(k, dtype="float8_e4m3fn")
    assert cache[1, 1, 0].tolist() == list(range(8))
    assert y.dtype == ml_dtypes.float8_e4m3fn
    assert y[0, 0, -1] == 448


def test_numpy_arrays_through_the_reference():
    with llmkernels.use(policy="silent"):
        y = llmkernels.rms_norm(X.numpy(), W.numpy())
    assert isinstance(y, np.ndarray)
    np.testing.assert_allclose(y, 1, rtol=1e-5)


# the shape of a refusal


def test_refusals_carry_a_known_code():
    with pytest.raises(TypeError, match="'SPEED' is not one of ABSENT"):
        Refusal("SPEED", "too slow", "wait")
    assert str(Refusal("SHAPE", "K=704", "pad K to 768")) == "[SHAPE] K=704; pad K to 768"
    assert len(CODES) == 10


def test_every_folder_is_listed():
    from pathlib import Path

    folders = {p.parent.name for p in (Path(__file__).parent.parent / "backends").glob("*/__init__.py")}
    assert folders <= set(backends())


def test_explanation_prints_one_line_a_verdict():
    text = str(llmkernels.explain("rms_norm", X, W))
    assert text.startswith("rms_norm(x: float32 (2, 8) on cpu")
    assert "reference" in text
