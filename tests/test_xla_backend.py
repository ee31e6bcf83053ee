"""The xla backend: torch tensors through DLPack, jax arrays in jit, under shard_map and exported, the engine on it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import llmkernels
from llmkernels import discovery
from llmkernels.arrays import from_torch, to_torch
from llmkernels.comparison import compare
from llmkernels.discovery import implementation
from llmkernels.engine.llm import LLM
from llmkernels.engine.params import SamplingParams
from llmkernels.inputs import inputs
from llmkernels.quant import quantize
from llmkernels.registry import OPS
from llmkernels.settings import use

jax = pytest.importorskip("jax")
jnp = jax.numpy
from llmkernels.backends.xla import _program  # noqa: E402
from llmkernels.backends.xla import _torch as bridge  # noqa: E402

from llmkernels import jax_api  # noqa: E402  imports jax

EASY = [
    pytest.param(op, cases[i], id=f"{op.name}: {cases[i]}")
    for op in OPS.values()
    if (cases := [case for case in op.contract.cases if not case.hostile])
    for i in {1, len(cases) - 2}
]


def to_jax(value):
    if hasattr(value, "scheme"):
        return value.map(to_jax)
    return from_torch(value.contiguous(), "jax") if isinstance(value, torch.Tensor) else value


def listed(results):
    return list(results) if isinstance(results, (tuple, list)) else [results]


@pytest.mark.parametrize(("op", "case"), EASY)
def test_jax_arrays_in_jit_agree_with_the_oracle(op, case):
    contract = op.contract
    call = inputs(contract, case, "float32")
    arrays = {name: to_jax(x) for name, x in call.items() if name in contract.shapes.inputs and x is not None}
    options = {name: x for name, x in call.items() if name not in arrays}
    got = listed(jax.jit(lambda arrays: getattr(jax_api, op.name)(**arrays, **options, backend="xla"))(arrays))
    if contract.judge:
        assert not contract.judge(call, to_torch(got[0]).long())
        return
    written = [p.name for p in contract.shapes.inputs.values() if p.mutated and call[p.name] is not None]
    sizes = contract.validate(call)
    answers = []
    for wide in (True, False):
        again = inputs(contract, case, "float32", wide=wide)
        results = contract.reference(**again)
        answers.append([*([] if results is None else listed(results)), *(again[name] for name in written)])
    terms = contract.cost(call, sizes).operations / 2 / max(1, sum(w.numel() for w in answers[0]))
    for g, want, near in zip(got, *answers, strict=True):
        assert not compare(op.name, to_torch(g), want, near, terms=terms)[0]


def watched(monkeypatch):
    """Where the arrays lie that reach the compiled program and that leave it."""
    seen = {"in": [], "out": []}
    came, went = bridge.jax.dlpack.from_dlpack, bridge.torch.from_dlpack

    def from_dlpack(x):
        array = came(x)
        seen["in"].append((x.data_ptr(), array.unsafe_buffer_pointer()))
        return array

    def back(array):
        tensor = went(array)
        seen["out"].append((array.unsafe_buffer_pointer(), tensor.data_ptr()))
        return tensor

    monkeypatch.setattr(bridge.jax.dlpack, "from_dlpack", from_dlpack)
    monkeypatch.setattr(bridge.torch, "from_dlpack", back)
    return seen


def test_torch_tensors_are_not_copied(monkeypatch):
    seen = watched(monkeypatch)
    q, k, v = torch.randn(4, 8, 64), torch.randn(9, 16, 2, 64), torch.randn(9, 16, 2, 64)
    table = torch.arange(64, dtype=torch.int32).reshape(4, 16) % 9
    lengths, starts = torch.full((4,), 30, dtype=torch.int32), torch.arange(5, dtype=torch.int32)
    with torch.no_grad():  # a parameter is detached, not copied
        k.requires_grad_()
        out = llmkernels.paged_attention(q, k, v, table, lengths, starts, backend="xla")
    assert {theirs for theirs, _ in seen["in"]} >= {x.data_ptr() for x in (q, k, v, table, lengths, starts)}
    assert all(theirs == ours for theirs, ours in seen["in"])
    assert all(theirs == ours for theirs, ours in seen["out"])
    assert out.data_ptr() in {ours for _, ours in seen["out"]}
    out.zero_()  # the caller's own memory


def test_permuted_caches_are_not_copied(monkeypatch):
    seen = watched(monkeypatch)
    k = torch.randn(9, 2, 16, 64).transpose(1, 2)  # HND
    table, lengths = torch.arange(16, dtype=torch.int32)[None] % 9, torch.tensor([40], dtype=torch.int32)
    call = torch.randn(1, 8, 64), k, k, table, lengths, torch.tensor([0, 1], dtype=torch.int32)
    got = llmkernels.paged_attention(*call, backend="xla")
    assert (k.data_ptr(), k.data_ptr()) in seen["in"]
    torch.testing.assert_close(got, llmkernels.paged_attention(*call, backend="reference"))


def test_what_is_written_lands_in_the_callers_memory():
    cache = torch.zeros(3, 4, 2, 8)
    packed = torch.zeros(3, 2, 4, 2, 8)
    k, slots = torch.ones(2, 2, 8), torch.tensor([5, -1])
    for memory, view in ((cache, cache), (packed, packed[:, 1])):
        llmkernels.write_kv(k, None, view, None, slots, backend="xla")
        assert float(memory.sum()) == 16
        assert float(view[1, 1].sum()) == 16


def test_int64_is_exact_or_outside():
    """jax would cut 2^32 + 1 down to 1 and write slot 1."""
    cache = torch.zeros(3, 4, 2, 8)
    with use(checked=False):
        llmkernels.write_kv(torch.ones(1, 2, 8), None, cache, None, torch.tensor([2**32 + 1]), backend="xla")
    assert not cache.any()
    q, table = torch.randn(1, 2, 8), torch.randn(5, 4)
    with use(checked=False):
        turned = [
            llmkernels.rotary_embedding(q, q, table, table, torch.tensor([position]), backend="xla")[0]
            for position in (2**32, 4)
        ]
    assert torch.equal(*turned), "a position past the table is the last one, not the first"
    with pytest.raises(TypeError, match="int64 tensors are narrowed before"):
        bridge.to_jax(torch.tensor([1]))


def test_64_bits_in_a_trace_are_exact_or_outside():
    with jax.enable_x64(True):
        slots = jnp.array([2**32, 1, 2**32 + 17])
        write = jax.jit(lambda slots: jax_api.write_kv(jnp.ones((3, 2, 16), "float32"), None, cache, None, slots))
        cache = jnp.zeros((8, 16, 2, 16), "float32")
        assert float(write(slots).sum()) == 32


def test_explain_says_which_program_answers():
    x = torch.randn(4, 256)
    told = llmkernels.explain("quantized_gemm", x, quantize(torch.randn(64, 256), "w4a16_g128"))
    (mine,) = [candidate for candidate in told.candidates if candidate.backend == "xla"]
    assert mine.notes[0] == "here: plain XLA"
    assert mine.notes[1].startswith("on a TPU: Pallas, blocks of")
    assert mine.notes[1] in str(told)
    told = llmkernels.explain("silu_and_mul", x)
    assert told.candidates[-2].notes[1].startswith("on a TPU: plain XLA, which does as well")
    told = llmkernels.explain("silu_and_mul", torch.randn(2048, 512))
    assert told.candidates[-2].notes[1].startswith("on a TPU: Pallas, blocks of")


def test_a_cache_in_another_order_is_refused_by_the_kernel_with_the_fix():
    """On a TPU it would be copied whole in each call; traced arrays have no order yet."""
    from llmkernels.backends.xla._program import kernel

    k, slots = jnp.ones((2, 2, 128)), jnp.array([5, 6])

    def refused(cache):
        return [*kernel("write_kv").takes(k, k, cache, cache, slots, k_scale=None, v_scale=None)]

    (one, _) = refused(jnp.zeros((3, 8, 2, 128)))
    assert one[0] == "LAYOUT"
    assert "allocate_cache" in one[2]
    assert not refused(jax_api.allocate_cache(3, 8, 2, 128, jnp.float32))
    assert not refused(jax.ShapeDtypeStruct((3, 8, 2, 128), jnp.float32))


def test_few_programs_serve_many_shapes():
    program = implementation("xla", "rms_norm").program
    weight = torch.randn(40)
    before = program.compiled._cache_size()
    for rows in range(1, 33):
        llmkernels.rms_norm(torch.randn(rows, 40), weight, backend="xla")
    assert program.compiled._cache_size() - before == 6  # 1, 2, 4, 8, 16, 32
    assert [bridge.bucket(n) for n in (0, 1, 3, 200, 257, 600)] == [0, 1, 4, 256, 512, 768]


def test_an_emulation_keeps_few_programs(monkeypatch):
    """The whole conformance run in one process: LLVM found no memory after hundreds of them."""
    monkeypatch.setattr(_program, "MOST_INTERPRETED", 2)
    program = implementation("xla", "silu_and_mul").program
    program.compiled.clear_cache()  # of what other tests compiled
    with discovery.emulated("xla"):
        for width in (128, 256, 384, 512):
            llmkernels.silu_and_mul(torch.randn(8, 2 * width), backend="xla")
            assert program.compiled._cache_size() <= 2


def test_donated_caches_are_written_in_place():
    k, cache, slots = jnp.ones((2, 1, 8)), jnp.zeros((3, 4, 1, 8)), jnp.array([5, -1])
    memory = cache.unsafe_buffer_pointer()
    write = jax.jit(lambda k, cache, slots: jax_api.write_kv(k, None, cache, None, slots), donate_argnums=1)
    written = write(k, cache, slots)
    assert written.unsafe_buffer_pointer() == memory
    assert float(written.sum()) == float(written[1, 1].sum()) == 8


def test_a_step_that_writes_and_attends_is_both_ops():
    """As two ops, as one program of plain XLA, and as one kernel: three sequences, one new token each."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (3, n, 128), jnp.bfloat16) for key, n in zip(keys, (4, 2, 2), strict=False))
    caches = [jax.random.normal(key, (6, 8, 2, 128), jnp.bfloat16) for key in keys[3:]]
    table, lengths = jnp.array([[3, 1], [0, 4], [5, 2]], jnp.int32), jnp.array([16, 9, 1], jnp.int32)
    arrays = (q, k, v, *caches, table, lengths, jnp.arange(4, dtype=jnp.int32))
    step = partial(jax_api.write_and_attend, return_lse=True, max_seqlen_q=1, backend="xla")
    want = step(*arrays)
    assert not jnp.array_equal(want[2], caches[0])
    plain = jax.jit(step)(*arrays)
    with discovery.emulated("xla"):
        fused = jax.jit(step)(*arrays)
    for got in (plain, fused):
        assert all(jnp.array_equal(x, y) for x, y in zip(got[2:], want[2:], strict=True)), "the caches"
        assert all(jnp.abs(x - y).max() < 1e-2 for x, y in zip(got[:2], want[:2], strict=True))
    assert set(llmkernels.ledger.read()) == {"paged_attention", "write_kv"}
    with pytest.raises(ValueError, match="write_and_attend: no gradients"):
        jax.grad(lambda q: jax.jit(step)(q, *arrays[1:])[0].sum())(q)


def test_a_cache_keeps_the_order_of_the_backend():
    """Head by head within a page, whatever the shape says, before and after a step."""
    cache = jax_api.allocate_cache(3, 4, 2, 8, jnp.float32)
    k, slots = jnp.arange(32.0).reshape(2, 2, 8), jnp.array([5, 6])
    write = jax.jit(
        lambda k, cache, slots: jax_api.write_kv(k, None, cache, None, slots, backend="xla"),
        donate_argnums=1,
        out_shardings=cache.format,
    )
    memory = cache.unsafe_buffer_pointer()
    written = write(k, cache, slots)
    assert written.format.layout.major_to_minor == (0, 2, 1, 3)
    assert written.unsafe_buffer_pointer() == memory
    want = jax_api.write_kv(k, None, jnp.zeros((3, 4, 2, 8)), None, slots, backend="reference")
    assert jnp.array_equal(written, want)


def test_a_program_for_tpus_is_lowered_without_one():
    """As a serialized artifact: every op that decodes a token, from this machine."""
    shape = jax.ShapeDtypeStruct
    q, cache = shape((8, 8, 128), jnp.bfloat16), shape((64, 16, 2, 128), jnp.bfloat16)
    table, ints = shape((8, 16), jnp.int32), shape((8,), jnp.int32)
    weight = to_jax(quantize(torch.randn(256, 1024), "w4a16_g128"))

    def decode(q, k, k_cache, v_cache, table, lengths, starts, slots):
        k_cache, v_cache = jax_api.write_kv(k, k, k_cache, v_cache, slots, backend="xla")
        out = jax_api.paged_attention(q, k_cache, v_cache, table, lengths, starts, backend="xla")
        return jax_api.quantized_gemm(out.reshape(8, 1024), weight, backend="xla"), k_cache, v_cache

    k, starts = shape((8, 2, 128), jnp.bfloat16), shape((9,), jnp.int32)
    exported = jax.export.export(jax.jit(decode), platforms=["tpu"])(q, k, cache, cache, table, ints, starts, ints)
    assert exported.platforms == ("tpu",)
    assert exported.out_avals[0].shape == (8, 256)
    assert exported.mlir_module().count("tpu_custom_call") == 3, "all three are Pallas kernels"


SHARDED = Path(__file__).parent / "xla_sharded.py"


def test_eight_devices_give_the_answer_of_one():
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, SHARDED], env=flags, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["paged_attention", "norm_linear_activation", "quantized_gemm"]


def test_the_engine_writes_the_same_text():
    greedy, texts = SamplingParams(temperature=0, max_tokens=6), []
    for backend, order in (("cpu", (0, 1, 2, 3)), ("xla", (0, 2, 1, 3))):
        llmkernels.ledger.reset()
        with use(backend):
            llm = LLM(prefix_reuse=False)
            strides = llm._runner.target.cache.k[0].stride()
            assert tuple(sorted(range(4), key=lambda axis: -strides[axis])) == order, "as CACHE_AXES has it"
            texts.append(llm.generate(["DESCRIPTION\nThe open() system call"], greedy)[0].text)
        assert {name for op in llmkernels.ledger.read().values() for name in op} == {backend}
    assert texts[0] == texts[1]
