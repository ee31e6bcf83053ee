"""What is peculiar to the vendor backend; its parity is tests/test_parity.py's.

Its ways on CUDA are run here in two manners: on fake tensors, which know shapes and raise where somebody looks at a
value, and on CPU tensors, where the way that never looks must give the same answers.
"""

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmkernels import testing
from llmkernels.discovery import implementation, refusals
from llmkernels.quant import quantize
from llmkernels.registry import OPS

BLIND = ("write_kv", "lora_gemm", "sample")  # ops with one way on the host and another where values cannot be seen
FAKE = [call for call in testing.calls() if not call[2].raises and implementation("vendor", call[0].name)]


def internal(name):
    return import_module(f"llmkernels.backends.vendor._{name}")


def calls(op, dtype=None):
    return [call for call in testing.calls(op, dtype) if not call[2].raises]


def name_of(value):
    return getattr(value, "name", value)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(7)


@pytest.fixture
def blind(monkeypatch):
    """CPU tensors are treated as if a look at their values were forbidden."""
    monkeypatch.setattr(internal("common"), "on_host", lambda x: False)


@pytest.fixture
def hopper(monkeypatch):
    """torch believes in an H100 with flash attention."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def ragged(q, k, v, starts_q, starts_k, max_q, max_k, dropout, causal, debug, *, scale, seqused_k, **window):
    """aten::_flash_attention_forward, as its documentation describes it, in plain words."""
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), torch.inf)
    group = q.shape[1] // k.shape[1]
    left, right = window["window_size_left"], 0 if causal else window["window_size_right"]
    for s, keys in enumerate(seqused_k.tolist()):
        rows = slice(*starts_q[s : s + 2].tolist())
        new, at = rows.stop - rows.start, slice(int(starts_k[s]), int(starts_k[s]) + keys)
        assert new <= max_q
        assert keys <= max_k
        if not new or not keys:
            continue
        key, value = (x[at].float().repeat_interleave(group, 1) for x in (k, v))
        distance = torch.arange(keys) - torch.arange(keys - new, keys)[:, None]
        hidden = (distance > right if right >= 0 else False) | (distance < -left if left >= 0 else distance > keys)
        scores = torch.einsum("nhd,lhd->hnl", q[rows].float(), key).mul(scale).masked_fill(hidden, -torch.inf)
        lse[:, rows] = torch.logsumexp(scores, -1)
        out[rows] = torch.einsum("hnl,lhd->nhd", torch.softmax(scores, -1), value).to(q.dtype)
    return out, lse, None, None, None


@pytest.mark.parametrize(
    ("contract", "dtype", "case"),
    [*calls("paged_attention", "float32"), *calls("paged_attention", "bfloat16")],
    ids=name_of,
)
def test_attention_that_looks_at_no_value(contract, dtype, case, blind, monkeypatch, request):
    if dtype == "bfloat16":
        request.getfixturevalue("hopper")
        monkeypatch.setattr(internal("attention_cuda"), "_flash_kernel", ragged)
    else:
        monkeypatch.setattr(internal("attention_cuda"), "_takes_flash", lambda *call: False)
    module = implementation("vendor", "paged_attention")
    result = testing.check_run(contract, dtype, case, module, "vendor")
    assert result.verdict == "passed", str(result)


@pytest.mark.parametrize("op", BLIND)
def test_ops_that_look_at_no_value(op, blind):
    for contract, dtype, case in calls(op):
        result = testing.check_run(contract, dtype, case, implementation("vendor", op), "vendor")
        assert result.verdict == "passed", str(result)


@pytest.mark.parametrize("op", sorted({contract.name for contract, _, _ in FAKE}))
def test_nothing_on_cuda_waits_for_the_device(op, blind, hopper):
    """Fake tensors raise on .item(), nonzero and the like, and on shapes that torch's kernels do not take."""
    run = implementation("vendor", op).run
    for contract, dtype, case in calls(op):
        call = testing.inputs(contract, case, dtype)
        want = contract.result_types(call)
        with FakeTensorMode(), torch.no_grad():
            given = {name: _fake(value) for name, value in call.items()}
            got = run(**given)
        got = () if got is None else got if isinstance(got, tuple) else (got,)
        assert [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in got] == want, (case.name, dtype)


def _fake(value):
    """A tensor of the same kind, without memory."""
    if hasattr(value, "scheme"):
        return value.map(_fake)
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def test_scores_too_large_for_batched_products_are_refused_with_a_fix(blind):
    contract = OPS["paged_attention"].contract
    case = next(case for case in contract.cases if case.name == "soft cap")
    call = testing.inputs(contract, case, "bfloat16")
    with FakeTensorMode():
        call = {name: _fake(value) for name, value in call.items()}
        call["block_table"] = torch.empty(4, 2**20, dtype=torch.int32)
        assert [r.code for r in refusals("vendor", "paged_attention", "torch", call, {})] == ["SHAPE"]
        assert "max_seqlen_k" in refusals("vendor", "paged_attention", "torch", call, {})[0].fix
        call |= {"max_seqlen_k": 64}
        assert not refusals("vendor", "paged_attention", "torch", call, {})


@pytest.mark.parametrize("op", sorted({contract.name for contract, _, _ in FAKE}))
def test_arrays_elsewhere_are_refused_with_a_fix(op):
    contract, dtype, case = calls(op)[0]
    call = testing.inputs(contract, case, dtype)
    call = {n: v.to("meta") if isinstance(v, torch.Tensor) or hasattr(v, "scheme") else v for n, v in call.items()}
    (refusal,) = refusals("vendor", op, "torch", call, {})
    assert refusal.code == "DEVICE"
    assert "meta" in refusal.reason
    assert "cpu" in refusal.fix


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w4a16_g128_zp", "w8a16", "w8a8", "fp8_row", "mxfp4"])
def test_a_weight_is_packed_once(scheme, rng):
    weight = quantize(torch.randn(64, 128, generator=rng), scheme)
    x = torch.randn(3, 128, generator=rng).bfloat16()
    run = implementation("vendor", "quantized_gemm").run
    first = run(x, weight)
    packed = dict(weight.packed["vendor"])
    assert packed
    assert torch.equal(run(x, weight), first)
    assert weight.packed["vendor"].keys() == packed.keys()
    assert all(weight.packed["vendor"][kind] is form for kind, form in packed.items())


def test_the_integer_product_of_onednn(rng):
    """Values small enough that a CPU without VNNI adds pairs of products without saturating."""
    weight = quantize(torch.randn(48, 320, generator=rng), "w8a8")
    weight.values.remainder_(64)
    values = torch.randint(-64, 64, (5, 320), dtype=torch.int8, generator=rng)
    got = internal("products")._onednn(values, weight)
    assert torch.equal(got.long(), values.long() @ weight.values.long().T)


@pytest.mark.parametrize(("contract", "dtype", "case"), calls("norm_linear_activation", "bfloat16"), ids=name_of)
def test_a_cpu_that_multiplies_bfloat16(contract, dtype, case, monkeypatch):
    monkeypatch.setattr(internal("products"), "CPU_BFLOAT16", True)
    module = implementation("vendor", "norm_linear_activation")
    result = testing.check_run(contract, dtype, case, module, "vendor")
    assert result.verdict == "passed", str(result)


def test_a_product_in_pieces_is_the_product(rng, monkeypatch):
    weight = torch.randn(300, 64, generator=rng).bfloat16()
    x = torch.randn(5, 64, generator=rng)
    products = internal("products")
    monkeypatch.setattr(products, "PIECE", 2048)
    for codes in (products.Codes(weight), products.codes(quantize(weight, "w4a16_g32"))):
        values, scales, group = codes
        dense = values.double() if scales is None else values.double() * scales.double().repeat_interleave(group, 1)
        torch.testing.assert_close(products._converted(x, codes).double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 700])
def test_long_decode_in_tiles_is_one_attention(length, rng, monkeypatch):
    """The tiles of a long decode, and sequences that share a call, give what one sequence in one call gives."""
    cpu, run = internal("attention_cpu"), implementation("vendor", "paged_attention").run
    k, v = (torch.randn(64, 16, 2, 32, generator=rng) for _ in "kv")
    lengths = torch.tensor([length, 40, 1, length], dtype=torch.int32)
    table = torch.randperm(64, generator=rng)[:48].int().repeat(4, 1)
    q, starts = torch.randn(4, 8, 32, generator=rng), torch.arange(5, dtype=torch.int32)
    alone = [
        run(q[i : i + 1], k, v, table[i : i + 1], lengths[i : i + 1], starts[:2], return_lse=True) for i in range(4)
    ]
    for tile in (1, 1 << 14, 1 << 30):
        monkeypatch.setattr(cpu, "TILE_BYTES", tile)
        out, lse = run(q, k, v, table, lengths, starts, return_lse=True)
        torch.testing.assert_close(out, torch.cat([x for x, _ in alone]))
        torch.testing.assert_close(lse, torch.cat([x for _, x in alone]))


def test_the_scratch_buffer_serves_every_mode(rng):
    """Made in inference mode, it must be writable outside, and one call must not show through in the next."""
    run = implementation("vendor", "paged_attention").run
    k, v = (torch.randn(64, 16, 8, 32, generator=rng) for _ in "kv")  # a gather of 1 MB
    q, lengths, starts = torch.randn(1, 8, 32, generator=rng), torch.tensor([1024]).int(), torch.tensor([0, 1]).int()
    orders = [torch.randperm(64, generator=rng)[None].int() for _ in range(2)]
    with torch.inference_mode():
        first = [run(q, k, v, order, lengths, starts) for order in orders]
    again = [run(q, k, v, order, lengths, starts) for order in orders]
    torch.testing.assert_close(first, again, rtol=0, atol=0)
