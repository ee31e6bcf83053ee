"""Every op under torch.library, torch.compile and torch.export, straight from its contract."""

import io
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import llmkernels
from llmkernels import torch_library
from llmkernels.inputs import inputs
from llmkernels.memory import bits
from llmkernels.quant import quantize
from llmkernels.registry import OPS
from llmkernels.settings import use

FULL_GRAPH = {"fullgraph": True, "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def quiet():
    torch._dynamo.reset()
    with use(policy="silent"), torch.no_grad():
        yield


def some_cases(op):
    """The first and the last easy case."""
    easy = [case for case in op.contract.cases if not case.hostile]
    return easy[0], easy[-1]


CALLS = [pytest.param(op, case, id=f"{op.name}: {case}") for op in OPS.values() for case in some_cases(op)]


def flattened(op, call):
    """Positional and keyword arguments of torch.ops.llmkernels.<op>."""
    args, options = [], {}
    for p in op.contract.signature.parameters.values():
        value = call[p.name]
        if hasattr(value, "scheme"):
            options |= torch_library.parts(value, p.name)
            value = value.values
        if p.kind is p.KEYWORD_ONLY:
            options[p.name] = value
        else:
            args.append(value)
    return tuple(args), options


def written(op, call):
    return [call[p.name] for p in op.contract.shapes.inputs.values() if p.mutated and call[p.name] is not None]


def everything(op, function, case, dtype="float32"):
    """What a call returns, and what it wrote."""
    call = inputs(op.contract, case, dtype)
    results = function(**call)
    results = results if isinstance(results, tuple) else [] if results is None else [results]
    return [*results, *written(op, call)]


def equal(got, want):
    """The same bits in the same shapes."""
    return [(g.dtype, g.shape, bits(g.contiguous()).tolist()) for g in got] == [
        (w.dtype, w.shape, bits(w.contiguous()).tolist()) for w in want
    ]


@pytest.mark.parametrize(("op", "case"), CALLS)
def test_opcheck(op, case):
    args, options = flattened(op, inputs(op.contract, case, "float32"))
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
    if any(x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for x in tensors):
        utilities.remove("test_schema")  # compares arguments by torch.allclose, which torch lacks for FP8
    torch.library.opcheck(getattr(torch.ops.llmkernels, op.name).default, args, options, test_utils=utilities)


@pytest.mark.parametrize(("op", "case"), CALLS)
def test_the_public_function_compiles_into_one_graph(op, case):
    want = everything(op, op.function, case)
    assert equal(everything(op, torch.compile(op.function, **FULL_GRAPH), case), want)


@pytest.mark.parametrize(("op", "case"), CALLS)
def test_the_torch_op_compiles_into_one_graph(op, case):
    def through_torch(**call):
        args, options = flattened(op, call)
        results = getattr(torch.ops.llmkernels, op.name)(*args, **options)
        return tuple(results) if isinstance(results, list) else results

    want = everything(op, op.function, case)
    assert equal(everything(op, through_torch, case), want)
    assert equal(everything(op, torch.compile(through_torch, **FULL_GRAPH), case), want)


def test_the_schema_says_what_the_contract_says():
    assert torch_library.schema(OPS["write_kv"].contract) == (
        "write_kv(Tensor k, Tensor? v, Tensor(c!) k_cache, Tensor(d!)? v_cache, Tensor slots, *, "
        "Tensor? k_scale=None, Tensor? v_scale=None, str? backend=None) -> ()"
    )
    assert "SymInt[2] window=[-1, -1], float soft_cap=0.0" in torch_library.schema(OPS["paged_attention"].contract)
    assert torch_library.schema(OPS["rms_norm"].contract).endswith("-> Tensor[]")


def test_compiles_where_nobody_imported_torch_library():
    code = """
import torch, llmkernels, sys
torch.set_grad_enabled(False)
run = torch.compile(lambda x, w: llmkernels.rms_norm(x, w) + 1, fullgraph=True, backend="aot_eager")
assert "llmkernels.torch_library" not in sys.modules
x, w = torch.randn(3, 8), torch.ones(8)
with llmkernels.use(policy="silent"):
    assert torch.equal(run(x, w), llmkernels.rms_norm(x, w) + 1)
assert "llmkernels.torch_library" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_every_number_of_tokens(backend):
    def layer(x, weight, residual, uniform):
        y, residual = llmkernels.rms_norm(x * 2, weight, residual=residual)
        return llmkernels.sample(llmkernels.silu_and_mul(y) + 1, uniform), residual

    run = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 17, 64):
            args = torch.randn(tokens, 32), torch.rand(32), torch.randn(tokens, 32), torch.rand(tokens)
            assert equal(run(*args), layer(*args))


def test_dynamic_attention():
    attention = OPS["paged_attention"]
    case = next(c for c in attention.contract.cases if c.name == "mixed")
    run = torch.compile(llmkernels.paged_attention, dynamic=True, **FULL_GRAPH)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for new, lengths in (((1, 8, 2), (9, 30, 8)), ((1, 13, 1, 5), (40, 13, 1, 21))):
            other = replace(case, args={**case.args, "new": new, "lengths": lengths})
            assert equal(everything(attention, run, other), everything(attention, attention.function, other))


class Places:
    """A recorder that notes where arguments lie."""

    def __init__(self):
        self.seen = []

    def note(self, op, call):
        self.seen += [call[p.name].data_ptr() for p in OPS[op].contract.shapes.inputs.values() if p.mutated]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_written_caches_are_functionalised_and_not_copied(backend):
    """write_kv into a packed K|V cache, read back in the same graph; inductor writes into the caller's memory."""

    def step(k, v, cache, slots):
        llmkernels.write_kv(k * 2, v, cache[:, 0], cache[:, 1], slots)
        return cache[:, 0].flatten(0, 1)[slots] + cache[:, 1].flatten(0, 1)[slots]

    k, v, slots = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.tensor([0, 17, 9])
    caches = [torch.zeros(5, 2, 4, 2, 8) for _ in range(2)]
    places = Places()
    with use(recorder=places):
        got = torch.compile(step, fullgraph=True, backend=backend)(k, v, caches[0], slots)
    assert torch.equal(got, step(k, v, caches[1], slots))
    assert torch.equal(*caches)
    assert torch.equal(got, k * 2 + v)
    if backend == "inductor":
        assert places.seen == [caches[0][:, 0].data_ptr(), caches[0][:, 1].data_ptr()]


def test_layers_of_one_cache_are_written_where_they_lie():
    """Views whose offset is known at run time only, since the number of pages is: inductor takes it for 0."""

    def step(k, v, cache, slots):
        for layer in (0, 1):
            llmkernels.write_kv(k + layer, v - layer, cache[layer, 0], cache[layer, 1], slots)
        return cache[1, 0].flatten(0, 1)[slots]

    run = torch.compile(step, fullgraph=True, dynamic=True)
    k, v, slots = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.tensor([0, 17, 9])
    for pages in (5, 7):
        caches = [torch.zeros(2, 2, pages, 4, 2, 8) for _ in range(2)]
        assert torch.equal(run(k, v, caches[0], slots), step(k, v, caches[1], slots))
        assert torch.equal(*caches)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_lora_writes_a_part_of_a_fresh_result(backend):
    def layer(x, weight, a, b, adapters, scales):
        qkv = x @ weight.T
        before = qkv.clone()
        llmkernels.lora_gemm(qkv[:, 16:32], x, a, b, adapters, scales)
        return before, qkv

    args = (
        torch.randn(4, 32), torch.randn(48, 32), torch.randn(2, 4, 32), torch.randn(2, 16, 4),
        torch.tensor([0, -1, 1, 0], dtype=torch.int32), torch.ones(2),
    )  # fmt: skip
    before, after = torch.compile(layer, fullgraph=True, backend=backend)(*args)
    assert torch.equal(before[:, :16], after[:, :16])
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[:, 32:], after[:, 32:])
    torch.testing.assert_close(after, layer(*args)[1])
    assert not torch.equal(before[0, 16:32], after[0, 16:32])


class Block(torch.nn.Module):
    """A gated block whose weights are quantized."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.rand(64))
        self.up = quantize(torch.randn(96, 64), "w4a16_g32_zp")
        self.down = quantize(torch.randn(64, 48), "fp8_row")

    def forward(self, x):
        y = llmkernels.norm_linear_activation(x, self.up, norm_weight=self.gain, activation="swiglu")
        return x + llmkernels.quantized_gemm(y, self.down)


def test_export_with_a_free_number_of_rows_survives_a_file():
    model, rows = Block(), torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (torch.randn(5, 64),), dynamic_shapes=({0: rows},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (2, 9):
        x = torch.randn(rows, 64)
        assert torch.equal(loaded(x), model(x))


def test_a_compiled_model_packs_its_weight_once():
    """A backend's packing is kept on the QuantizedWeight, so the op must see the same one in every call."""
    seen = []

    class Weights:
        def note(self, op, call):
            seen.append(call["weight"])

    model = Block()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    with use(recorder=Weights()):
        run(torch.randn(3, 64))
        run(torch.randn(3, 64))
    assert seen[0] is seen[2]
    assert seen[1] is seen[3]
    assert seen[0] is not seen[1]


def test_choice_and_ledger_work_in_compiled_code():
    x, w = torch.randn(3, 8), torch.ones(8)
    run = torch.compile(lambda x, w: llmkernels.rms_norm(x, w, backend="reference"), **FULL_GRAPH)
    llmkernels.ledger.reset()
    run(x, w)
    run(x, w)
    assert llmkernels.ledger.read()["rms_norm"]["reference"]["why"] == {"backend=": 2}
    with pytest.raises(ValueError, match="asks for 'nobody'; the backends are"):
        torch.compile(lambda x, w: llmkernels.rms_norm(x, w, backend="nobody"), **FULL_GRAPH)(x, w)


def test_a_broken_call_is_refused_while_tracing():
    run = torch.compile(llmkernels.rms_norm, **FULL_GRAPH)
    with pytest.raises(Exception, match=r"rms_norm: weight has shape \(9,\); the contract is weight\[hidden\]:T"):
        run(torch.randn(3, 8), torch.ones(9))
    with (
        torch.enable_grad(),
        pytest.raises(Exception, match=r"rms_norm: x requires a gradient; kernels only infer: use torch.no_grad"),
    ):
        run(torch.randn(3, 8, requires_grad=True), torch.ones(8))
    write, cache = torch.compile(llmkernels.write_kv, **FULL_GRAPH), torch.zeros(2, 4, 1, 8)
    with pytest.raises(ValueError, match=r"write_kv: slots\[0\] is 99; the cache has slots 0 to 7"):
        write(torch.ones(1, 1, 8), None, cache, None, torch.tensor([99]))
