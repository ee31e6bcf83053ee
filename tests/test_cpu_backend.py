"""What is peculiar to the native CPU kernels: several instruction sets in one module, bits that ignore the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmkernels
from llmkernels import use
from llmkernels.discovery import absent, implementation

pytestmark = pytest.mark.skipif(absent("cpu") is not None, reason=str(absent("cpu")))
UNUSED = ("scale", "sinks", "alibi_slopes", "k_scale", "v_scale", "tree_mask", "max_seqlen_q", "max_seqlen_k")
DEFAULTS = dict.fromkeys(UNUSED) | {"causal": True, "window": (-1, -1), "soft_cap": 0.0}
CONFORM = """
import sys, torch
torch.set_num_threads(1)
from llmkernels import testing
from llmkernels.backends import cpu
assert cpu.isa() == sys.argv[1], cpu.isa()
wrong = [str(r) for r in testing.conform("cpu", op=sys.argv[2], dtype=sys.argv[3]) if r.verdict == "failed"]
sys.exit("\\n".join(wrong[:5]) or 0)
"""
OURS = ("merge_attention", "paged_attention", "quantize_activation", "rms_norm", "rotary_embedding", "sample",
        "silu_and_mul", "write_kv")  # fmt: skip


def python(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )


def lesser_isas():
    """Every instruction set below the one that tests run on, which test_parity covers."""
    if absent("cpu"):
        return []
    from llmkernels.backends import cpu

    every = ("avx512", "avx2", "portable")
    return every[every.index(cpu.isa()) + 1 :]


@pytest.mark.parametrize("isa", lesser_isas())
@pytest.mark.parametrize("op", OURS)
def test_parity_on_a_lesser_instruction_set(isa, op):
    result = python(CONFORM, isa, op, "bfloat16", LLMKERNELS_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("isa", lesser_isas())
@pytest.mark.parametrize("op", OURS)
def test_parity_on_a_lesser_instruction_set_in_other_dtypes(isa, op, dtype):
    result = python(CONFORM, isa, op, dtype, LLMKERNELS_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_is_named():
    result = python("from llmkernels.backends import cpu; cpu.isa()", LLMKERNELS_CPU_ISA="avx1024")
    assert "LLMKERNELS_CPU_ISA is 'avx1024'; this processor runs" in result.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells which libraries are loaded")
def test_one_openmp_runtime():
    """A second one would bring a second team of threads, and the two would wait for each other."""
    script = """
import re
from llmkernels.backends import cpu
cpu.isa()
print(*{line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib(g|i)?omp[-.0-9]", line)})
"""
    assert len(python(script).stdout.split()) == 1


def test_doctor_can_ask():
    from llmkernels.backends import cpu

    assert cpu.isa() in ("avx512", "avx2", "portable")


def attention(lengths, new, heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, pages=300):
    """The arguments of a call whose sequences are drawn one after the other: the first is always the same."""
    cache = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(pages, 16, kv_heads, dim, generator=cache).to(dtype) for _ in range(2))
    table = torch.zeros(len(lengths), max(-(-n // 16) for n in lengths), dtype=torch.int32)
    queries = []
    for s, (length, count) in enumerate(zip(lengths, new, strict=True)):
        draw = torch.Generator().manual_seed(s)
        used = -(-length // 16)
        table[s, :used] = torch.randperm(pages, generator=draw)[:used]
        queries.append(torch.randn(count, heads, dim, generator=draw).to(dtype))
    starts = torch.tensor([0, *new]).cumsum(0).int()
    return torch.cat(queries), keys, values, table, torch.tensor(lengths, dtype=torch.int32), starts


@pytest.mark.parametrize(("length", "new"), [(1300, 1), (700, 5), (90, 60), (2200, 40)])
def test_attention_is_batch_invariant(length, new):
    """The same sequence alone and in company of other lengths, on one thread and on several: the same bits."""
    run = implementation("cpu", "paged_attention").run
    results = []
    for batch in (1, 2, 7, 64):
        others = [(37 * i) % 900 + 3 for i in range(1, batch)]
        call = attention([length, *others], [new, *(min(3, n) for n in others)])
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, lse = run(*call, **DEFAULTS, return_lse=True)
            results.append((out[:new], lse[:new]))
    torch.set_num_threads(1)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("op", ["rms_norm", "silu_and_mul", "quantize_activation"])
def test_rows_are_batch_invariant(op):
    options = {
        "rms_norm": {"residual": None, "eps": 1e-6},
        "quantize_activation": {"dtype": "int8", "group": 0, "scale": None},
    }
    run, extra = implementation("cpu", op).run, (torch.ones(4096),) if op == "rms_norm" else ()
    x = torch.randn(64, 4096)

    def first(batch):
        result = run(x[:batch], *extra, **options.get(op, {}))
        return (result[0] if isinstance(result, tuple) else result)[0]

    for threads in (1, 3):
        torch.set_num_threads(threads)
        for batch in (1, 2, 7, 64):
            assert torch.equal(first(batch), first(1))
    torch.set_num_threads(1)


def test_silu_far_below_zero():
    """Where exp(-g) would be infinite: the bound of a polynomial instead left -6e21 of these numbers."""
    gate, value = torch.tensor([-1e30, -3e38, -1e4, -torch.inf, -80.0]), torch.tensor([1e30, 3e38, 1e4, 1.0, 1.0])
    got = llmkernels.silu_and_mul(torch.cat([gate, value]), backend="cpu")
    torch.testing.assert_close(got, torch.nn.functional.silu(gate) * value, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("page", [-1, 300, 2**31 - 1])
def test_a_page_outside_the_cache_is_never_read(page):
    """Where values are not checked beforehand, the kernel still refuses to leave the cache."""
    call = attention([40, 600], [1, 20])
    call[3][1, 7] = page
    with use("cpu", checked=False), pytest.raises(IndexError, match="points outside its array"):
        llmkernels.paged_attention(*call)


def test_a_position_outside_the_table_is_never_read():
    x, table = torch.randn(2, 1, 8), torch.randn(5, 4)
    with use("cpu", checked=False), pytest.raises(IndexError, match="points outside its array"):
        llmkernels.rotary_embedding(x, x, table, table, torch.tensor([0, 5]))


def test_a_cache_with_spread_channels_is_refused():
    q, keys, *rest = attention([40], [1])
    spread = keys.repeat_interleave(2, -1)[..., ::2]
    reasons = implementation("cpu", "paged_attention").refuse(q, spread, *rest)
    assert [reason[0] for reason in reasons] == ["LAYOUT"]
