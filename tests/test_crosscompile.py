"""`llmkernels compile`: what is recorded, what is read from machine code, and what fails the check."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmkernels import status
from llmkernels.contract import Cost
from llmkernels.crosscompile import limits, record, resources
from llmkernels.crosscompile.chips import CHIPS, find
from llmkernels.crosscompile.resources import Resources

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(not util.find_spec("triton"), reason="triton is not installed")
GOOD = Resources(64, 0, 0, 1024, {"HMMA": 4}, ["bf16"], 8, 0.5, 4096)


def row(**changes):
    """A row of a report: a good one, with changes."""
    words = {"kernel": "k._k", "target": "sm_90", "launch": "bf16 BLOCK=64", "ops": {"rms_norm": ["bfloat16"]}}
    return words | {"timed": True, "why": ""} | asdict(GOOD) | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"spills": 3}, "spills 3 registers"),
        ({"matrix": {}}, "multiplies bf16 without a matrix instruction"),
        ({"matrix": {}, "products": []}, None),
        ({"shared": 228 << 10}, "bytes of shared memory; sm_90 has 232448"),
        ({"programs": 0}, "no program of it fits"),
        ({"why": "did not end in 60 s", "registers": None}, "did not end in 60 s"),
    ],
)
def test_what_fails(changes, words):
    found = list(record.faults(row(**changes)))
    assert (words in found[0]) if words else not found


def test_what_is_worse_than_before():
    kept = {"triton": record.version(), "rows": [row()]}
    assert not list(record.worse([row(registers=72)], kept))
    assert "takes 100 registers; it took 64" in next(record.worse([row(registers=100)], kept))[1]
    assert "fewer programs fit" in next(record.worse([row(shared=9000, programs=4)], kept))[1]
    assert not list(record.worse([row(registers=100, launch="another")], kept))
    assert not list(record.worse([row(registers=100)], kept | {"triton": "another"}))


def test_occupancy_is_the_smallest_of_registers_waves_and_shared_memory():
    assert find("sm_90").occupancy(registers=32, shared=0, warps=4) == 16
    assert find("sm_90").occupancy(registers=255, shared=0, warps=4) == 2
    assert find("sm_90").occupancy(registers=32, shared=100 << 10, warps=4) == 2
    assert find("gfx942").occupancy(registers=128, shared=0, warps=4) == 4
    assert find("gfx942").occupancy(registers=32, shared=40 << 10, warps=4) == 1
    assert find("gfx1100").occupancy(registers=256, shared=0, warps=4) == 2
    with pytest.raises(ValueError, match="--target is 'sm_75'; the targets are sm_80"):
        find("sm_75")


def test_what_limits_a_call():
    chip = find("sm_90")  # 132 units, 4.8 TB/s, 989e12 operations/s
    good = replace(GOOD, in_flight=1 << 20)
    multiply, norm = ("_product.multiply", 264, good), ("_rows._prepare", 1, replace(good, products=[], matrix={}))

    def found(cost, *launches):
        one = limits.limit(cost, cost.bytes, launches, chip)
        return one.by, pytest.approx(one.seconds), pytest.approx(one.share)

    assert found(Cost(4.8e9, 1), multiply) == ("memory", 1e-3, 1)
    many = replace(good, matrix={"HGMMA": 4})
    assert found(Cost(1, 989e9), norm, ("_product.multiply", 264, many)) == ("arithmetic", 1e-3, 1)
    assert found(Cost(1, 989e9), ("_product.multiply", 133, many)) == ("arithmetic", 264e-3 / 133, 133 / 264)
    assert found(Cost(1, 989e9), ("_attention.attend", 133, many)) == ("arithmetic", 1e-3, 1)
    assert found(Cost(1, 989e9), multiply) == ("arithmetic", 1e-3 / limits.MMA_SYNC, 1)
    assert found(Cost(1, 1), norm, multiply) == ("latency", 1.4e-6, pytest.approx(0, abs=1e-3))
    few = replace(GOOD, programs=2, in_flight=2048)  # 4 programs have asked for 4 KiB, and wait 700 ns for them
    assert found(Cost(4096e3, 1), ("_few.multiply_few", 4, few))[:2] == ("latency", 0.7e-3)


def test_products_that_matrix_units_can_do():
    def ttir(kind, precision):
        return (
            f"%5 = tt.dot %3, %4, %0, inputPrecision = {precision} : tensor<16x64x{kind}> * tensor<64x32x{kind}> -> x"
        )

    assert resources.products(ttir("bf16", "tf32"), CHIPS["gfx1100"]) == ["bf16"]
    assert resources.products(ttir("f32", "tf32"), CHIPS["sm_90"]) == ["f32"]
    assert resources.products(ttir("f32", "ieee"), CHIPS["sm_90"]) == []
    assert resources.products(ttir("f32", "ieee"), CHIPS["gfx942"]) == ["f32"]
    assert resources.products(ttir("f32", "ieee"), CHIPS["gfx1201"]) == []
    assert resources.products("", CHIPS["sm_90"]) == []


def test_assembly_is_read():
    asm = """
        buffer_load_dwordx4 v[0:3], v1, s[0:3], 0
        global_load_b128 v[0:3], v1, off
        global_load_u16 v5, v1, off
        v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
        .agpr_count: 16
        .group_segment_fixed_size: 0
        .private_segment_fixed_size: 46
        .sgpr_spill_count: 5
        .vgpr_count: 48
        .vgpr_spill_count: 0
    """
    kernel = SimpleNamespace(
        asm={"amdgcn": asm, "ttir": "tt.dot %1, %2, %3 : tensor<16x16xbf16> * tensor<16x16xbf16>"},
        metadata=SimpleNamespace(shared=2048),
    )
    found = resources.measure(kernel, CHIPS["gfx942"], warps=4)
    assert (found.registers, found.spills, found.scalar_spills, found.shared) == (48, 12, 5, 2048)
    assert found.matrix == {"v_mfma_f32_bf16": 1}
    assert found.in_flight == found.programs * 4 * 64 * (16 + 16 + 2)


def test_evidence_says_compiled(tmp_path):
    file = tmp_path / "compiled.json"
    rows = [row(target=chip) for chip in ("sm_90", "gfx942")] + [row(target="gfx942", launch="another")]
    status.write(file, record.evidence("triton", rows))
    kept = status.read(file)
    assert {(r["mode"], r["device"], r["passed"]) for r in kept} == {
        ("compiled", "sm_90", 1),
        ("compiled", "gfx942", 2),
    }
    emulated = kept[0] | {"mode": "emulated", "device": "a CPU"}
    table = [r for r in status.rows([*kept, emulated]) if (r["op"], r["dtype"]) == ("rms_norm", "bfloat16")]
    mine = [r for r in table if r["backend"] == "triton"]
    if mine:
        assert [r["evidence"] for r in mine] == ["emulated", "compiled", "compiled"]
        known = [line.split(" | ")[1] for line in status.markdown(table).splitlines() if line.startswith("| `triton`")]
        assert known == ["emulated", "compiled for gfx942; sm_90"]


def test_a_report_survives_its_file(tmp_path):
    file = tmp_path / "report.json"
    record.write(file, record.report("triton", [row()], ["a problem"]))
    assert record.read(file)["rows"] == [row()]
    file.write_text('{"rows": [{}]}')
    with pytest.raises(ValueError, match="not a report of `llmkernels compile`"):
        record.read(file)


def compile_(*arguments, **environment):
    command = [sys.executable, "-m", "llmkernels", "compile", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the calls of benchmarks are kept: drawing their numbers takes seconds."""
    return tmp_path_factory.mktemp("triton")


@needs_triton
def test_a_kernel_for_both_vendors(cache, tmp_path):
    """silu_and_mul has no product: no matrix instruction is missed, and nothing spills."""
    arguments = ["--op", "silu_and_mul", "--target", "sm_90", "--target", "gfx942", "--most", "1", "--json"]
    done = compile_(*arguments, "--cache", str(cache), "--record", str(tmp_path / "evidence.json"))
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert not report["problems"]
    assert {(r["kernel"], r["target"]) for r in report["rows"]} == {
        ("silu_and_mul._gate", "sm_90"),
        ("silu_and_mul._gate", "gfx942"),
    }
    for one in report["rows"]:
        assert 0 < one["registers"] <= 256
        assert one["in_flight"] > 0
        assert one["timed"]
    assert {r["mode"] for r in status.read(tmp_path / "evidence.json")} == {"compiled"}


PLANTED = """
import sys
from llmkernels.crosscompile import launches
from llmkernels.crosscompile.build import compile_all
from llmkernels.crosscompile.chips import CHIPS
from pathlib import Path
from llmkernels.backends.triton import silu_and_mul

recorded = launches.record("triton", [CHIPS["sm_90"]], Path(sys.argv[1]), "silu_and_mul")
found = recorded.launches
assert not recorded.problems
(large,) = [call for call in recorded.planned if call.case == "8192 x 14336"]
assert [(one.kernel, programs) for one, programs in large.launches] == [("silu_and_mul._gate", 8192 * 14)], large
assert large.cost.bytes == 3 * 8192 * 14336 * 2, large.cost
missing = launches.unreached("triton", found)
assert "silu_and_mul._gate" not in missing
assert "merge_attention._merge" in missing  # nobody called merge_attention
launch = found[0]
launch.constants = {path: 3 for path in launch.constants}  # no power of two
(built,) = compile_all([launch], 1, 30, Path(sys.argv[1]))
assert "power of 2" in built.why, built
assert "tl.arange" in built.why, built
(slow,) = compile_all([found[1]], 1, -1, Path(sys.argv[1]) / "fresh")
assert "did not end" in slow.why, slow
"""


@needs_triton
def test_what_does_not_compile_or_never_ends_is_told(cache):
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, str(cache)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@needs_triton
def test_a_target_that_is_none_is_named():
    done = compile_("--target", "sm_999")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"llmkernels: --target is 'sm_999'; the targets are {', '.join(CHIPS)}"]
    done = compile_("--backend", "vendor")
    assert done.returncode == 2
    assert "has no Triton kernels" in done.stderr
