"""Every op over jax arrays: in jax.jit, outside it, and as torch's reference has it."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

import llmkernels
from llmkernels import discovery
from llmkernels.arrays import from_torch, to_torch
from llmkernels.inputs import inputs
from llmkernels.memory import bits
from llmkernels.quant import quantize
from llmkernels.registry import OPS
from llmkernels.settings import use

jax = pytest.importorskip("jax")
jnp = jax.numpy
from llmkernels import jax_api  # noqa: E402  imports jax

EASY = [
    pytest.param(op, case, dtype, id=f"{op.name}: {case}, {dtype}")
    for op in OPS.values()
    for dtype in op.contract.dtypes
    for case in [case for case in op.contract.cases if not case.hostile][:: 3 if dtype == "bfloat16" else 20]
]


@pytest.fixture(autouse=True)
def quiet():
    with use(policy="silent"):
        yield


def to_jax(value):
    if hasattr(value, "scheme"):
        return value.map(to_jax)
    return from_torch(value.contiguous(), "jax") if isinstance(value, torch.Tensor) else value


def split(op, call):
    """(arrays, options) of a call, arrays as jax has them."""
    arrays = {n: to_jax(v) for n, v in call.items() if n in op.contract.shapes.inputs and v is not None}
    return arrays, {n: v for n, v in call.items() if n not in arrays}


def listed(results):
    return [] if results is None else list(results) if isinstance(results, (tuple, list)) else [results]


def same(got, want):
    """The same bits, but int32 for int64."""
    got = [to_torch(g) for g in got]
    want = [w.int() if w.dtype == torch.int64 else w for w in want]
    return [(g.dtype, g.shape, bits(g.contiguous()).tolist()) for g in got] == [
        (w.dtype, w.shape, bits(w.contiguous()).tolist()) for w in want
    ]


@pytest.mark.parametrize(("op", "case", "dtype"), EASY)
def test_the_reference_jitted_and_eager_agrees_with_torch(op, case, dtype):
    arrays, options = split(op, inputs(op.contract, case, dtype))
    function = getattr(jax_api, op.name)
    before = {name: bits(to_torch(x).clone()) for name, x in arrays.items() if not hasattr(x, "scheme")}
    eager = listed(function(**arrays, **options, backend="reference"))
    jitted = listed(jax.jit(lambda arrays: function(**arrays, **options, backend="reference"))(arrays))
    assert all(bits(to_torch(arrays[name])).equal(x) for name, x in before.items()), "an argument was written"
    call = inputs(op.contract, case, dtype)
    want = listed(op.contract.reference(**call))
    want += [call[p.name] for p in op.contract.shapes.inputs.values() if p.mutated and call[p.name] is not None]
    assert same(eager, want)
    assert same(jitted, want)
    assert all(isinstance(x, jax.Array) for x in (*eager, *jitted))


def test_the_result_types_are_known_before_anything_runs():
    x, w = jax.ShapeDtypeStruct((3, 8), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    y, residual = jax.eval_shape(lambda x, w: jax_api.rms_norm(x, w, residual=x), x, w)
    assert (y.shape, y.dtype, residual.dtype) == ((3, 8), jnp.bfloat16, jnp.bfloat16)


def test_int64_where_jax_has_it():
    with jax.enable_x64(True):
        tokens = jax.jit(jax_api.sample)(jnp.zeros((2, 9), "float32"), jnp.array([0.0, 0.99], "float32"))
        assert tokens.dtype == jnp.int64
    assert tokens.tolist() == [0, 8]


def test_a_quantized_weight_is_a_pytree():
    weight = to_jax(quantize(torch.randn(16, 64), "w4a16_g32_zp"))
    assert len(jax.tree.leaves(weight)) == 3
    again = jax.tree.map(lambda part: part, weight)
    assert (again.scheme, again.shape, again.permutation) == (weight.scheme, weight.shape, None)
    x = jnp.ones((2, 64))
    run = jax.jit(jax_api.quantized_gemm)
    assert jnp.array_equal(run(x, weight), jax_api.quantized_gemm(x, weight))
    run(x, to_jax(quantize(torch.randn(16, 64), "w4a16_g32_zp")))
    assert run._cache_size() == 1
    run(x, to_jax(quantize(torch.randn(16, 64), "w8a16")))
    assert run._cache_size() == 2


def test_a_large_argument_computed_in_the_same_program():
    """The host waits for it while the program waits for the host."""
    x = jnp.ones((1024, 1024))
    got = jax.jit(lambda x: jax_api.silu_and_mul(x @ x) + 1)(x)
    assert same([got], [OPS["silu_and_mul"].contract.reference(to_torch(x @ x)) + 1])


def test_written_arrays_are_returned_and_nothing_is_overwritten():
    k, cache, slots = jnp.ones((2, 1, 8)), jnp.zeros((3, 4, 1, 8)), jnp.array([5, -1])
    assert slots.dtype == jnp.int32
    got = jax.jit(jax_api.write_kv)(k, None, cache, None, slots)
    assert float(cache.sum()) == 0
    assert float(got.sum()) == float(got[1, 1].sum()) == 8


def test_errors_before_anything_runs():
    x, w = jnp.ones((3, 8)), jnp.ones(8)
    for run in (jax_api.rms_norm, jax.jit(jax_api.rms_norm)):
        with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(9,\); the contract is weight\[hidden\]:T"):
            run(x, jnp.ones(9))
        with pytest.raises(ValueError, match="rms_norm: weight is float16; the contract says float32"):
            run(x, w.astype("float16"))
    with pytest.raises(ValueError, match=r"rms_norm: eps is a jax array; pass a Python value"):
        jax.jit(lambda x, eps: jax_api.rms_norm(x, w, eps=eps))(x, 1e-5)
    with pytest.raises(ValueError, match="rms_norm: weight is a torch array; jax_api takes jax arrays"):
        jax_api.rms_norm(x, torch.ones(8))
    with pytest.raises(ValueError, match="rms_norm: backend= asks for 'nobody'"):
        jax_api.rms_norm(x, w, backend="nobody")
    with pytest.raises(ValueError, match=r"inside jax.jit call the ops of llmkernels.jax_api"):
        jax.jit(lambda x, w: llmkernels.rms_norm(x, w, backend="reference"))(x, w)
    with pytest.raises(ValueError, match=r"use llmkernels.jax_api.write_kv, which returns them"):
        llmkernels.write_kv(x[:, None], None, jnp.zeros((1, 4, 1, 8)), None, jnp.zeros(3, "int32"))
    with pytest.raises(AttributeError, match=r"llmkernels.jax_api has no 'softmax'; the ops are"):
        _ = jax_api.softmax


def test_values_are_checked_in_both_worlds():
    args = jnp.ones((1, 1, 8)), None, jnp.zeros((3, 4, 1, 8)), None, jnp.array([12])
    with pytest.raises(ValueError, match=r"write_kv: slots\[0\] is 12; the cache has slots 0 to 11"):
        jax_api.write_kv(*args)
    on_host = jax.jit(lambda *args: jax_api.write_kv(*args, backend="reference"))
    with pytest.raises(Exception, match=r"write_kv: slots\[0\] is 12; the cache has slots 0 to 11"):
        jax.block_until_ready(on_host(*args))
    assert float(jax.jit(jax_api.write_kv)(*args).sum()) == 0  # nobody can read them: skipped, as the contract says
    with use(checked=False):
        assert float(jax_api.write_kv(*args).sum()) == 0


def test_no_gradients():
    x, w = jnp.ones((3, 8)), jnp.ones(8)
    for run in (jax_api.rms_norm, jax.jit(jax_api.rms_norm)):
        with pytest.raises(ValueError, match=r"rms_norm: no gradients; kernels only infer: put jax.lax.stop_gradient"):
            jax.grad(lambda x, run=run: run(x, w).sum())(x)
    stopped = jax.grad(lambda x: (x * jax_api.rms_norm(jax.lax.stop_gradient(x), w)).sum())(x)
    assert jnp.array_equal(stopped, jax_api.rms_norm(x, w))


@pytest.fixture
def without_xla(monkeypatch):
    monkeypatch.setattr("llmkernels.backends.ORDER", ("cpu",))
    discovery.forget_all()
    yield
    monkeypatch.undo()
    discovery.forget_all()


def test_policy_and_ledger(without_xla):
    x, w = jnp.ones((3, 8)), jnp.ones(8)
    llmkernels.ledger.reset()
    run = jax.jit(lambda x, w: jax_api.rms_norm(x, w))  # a function that no other test has traced
    for _ in range(3):
        run(x, w).block_until_ready()
    assert llmkernels.ledger.read()["rms_norm"]["reference"]["why"] == {"no backend took it": 3}
    discovery.forget_all()
    with use(policy="strict"), pytest.raises(llmkernels.Unsupported, match="rms_norm: no backend took this call"):
        jax.jit(lambda x, w: jax_api.rms_norm(x, w, eps=1e-5))(x, w)
    with use(policy="warn"), pytest.warns(UserWarning, match="rms_norm: no backend took this call"):
        jax.jit(lambda x, w: jax_api.rms_norm(x, w, eps=1e-4))(x, w)


BACKEND = {
    "__init__.py": 'ARRAYS = ("jax",)\nNATIVE = True\n\n\ndef absent():\n    return None\n',
    "silu_and_mul.py": """
import jax
import jax.numpy as jnp


TRAITS = {"deterministic": True}


def refuse(x):
    if x.dtype == jnp.float16:
        yield "DTYPE", "no float16", "cast to bfloat16"


def run(x):
    gate, value = jnp.split(x.astype("float32"), 2, -1)
    return (jax.nn.silu(gate) * value).astype(x.dtype)
""",
    "write_kv.py": """
TRAITS = {}


def refuse(k, v, k_cache, v_cache, slots, *, k_scale, v_scale):
    if v is not None or k_scale is not None or k_cache.dtype != k.dtype:
        yield "OPTION", "only plain keys", "write them one by one"


def run(k, v, k_cache, v_cache, slots, *, k_scale=None, v_scale=None):
    flat = k_cache.reshape(-1, *k_cache.shape[2:])
    places = slots + (slots < 0) * 2**30  # past the end: dropped
    return flat.at[places].set(k, mode="drop").reshape(k_cache.shape)
""",
}


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """A backend for jax arrays, installed as a plug-in is."""
    (tmp_path / "toy_jax").mkdir()
    for name, text in BACKEND.items():
        (tmp_path / "toy_jax" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LLMKERNELS_CACHE", str(tmp_path / "cache"))
    point = EntryPoint("toy", "toy_jax", "llmkernels.backends")
    monkeypatch.setattr(discovery, "entry_points", lambda group: [point])
    discovery.forget_all()
    yield "toy"
    monkeypatch.undo()
    discovery.forget_all()


def test_a_backend_for_jax_arrays_is_traced(backend):
    x = jnp.linspace(-3, 3, 24).reshape(2, 12)
    program = str(jax.make_jaxpr(jax_api.silu_and_mul)(x))
    assert "pure_callback" not in program
    assert "logistic" in program
    llmkernels.ledger.reset()
    run = jax.jit(lambda x: jax_api.silu_and_mul(x))
    for _ in range(3):
        y = run(x)
    assert jnp.allclose(y, jax_api.silu_and_mul(x, backend="reference"), atol=1e-6)
    assert llmkernels.ledger.read()["silu_and_mul"]["toy"]["why"] == {"first in order": 1}
    half = x.astype("float16")
    assert "pure_callback" in str(jax.make_jaxpr(lambda x: jax_api.silu_and_mul(x, backend="reference"))(half))
    jax_api.silu_and_mul(half)
    assert llmkernels.ledger.read()["silu_and_mul"]["xla"]["why"] == {"first in order": 1}, "after what refuses"
    with pytest.raises(llmkernels.Unsupported, match=r"\[DTYPE\] no float16; cast to bfloat16"):
        jax_api.silu_and_mul(x.astype("float16"), backend=backend)


def test_a_backend_returns_what_it_would_write(backend):
    k, cache, slots = jnp.ones((2, 1, 8)), jnp.zeros((3, 4, 1, 8)), jnp.array([5, -1])
    want = jax_api.write_kv(k, None, cache, None, slots, backend="reference")
    for run in (jax_api.write_kv, jax.jit(jax_api.write_kv, static_argnames="backend")):
        assert jnp.array_equal(run(k, None, cache, None, slots, backend=backend), want)
    with pytest.raises(ValueError, match=r"write_kv: slots\[1\] is 99"):
        jax_api.write_kv(k, None, cache, None, jnp.array([0, 99]), backend=backend)


def test_only_jax_api_imports_jax():
    modules = "llmkernels, llmkernels.ops, llmkernels.testing, llmkernels.torch_library"
    code = f"import sys, {modules}; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
