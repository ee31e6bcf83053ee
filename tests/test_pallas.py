"""Pallas kernels for TPUs on a machine without one: interpreted in both modes of copies, faults planted, exported."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pallas_calls
import pallas_faults
import pytest

pytestmark = pytest.mark.skipif(not util.find_spec("jax"), reason="jax is not installed")
QUICK = (
    "no wait for a copy",
    "a token is put before its page is there",
    "a page that does not exist",
    "the scale of the first head",
)


def told(script, *names, seconds=250):
    """What a script says; in a process of its own, since a kernel that waits for nothing never ends."""
    done = subprocess.run(
        [sys.executable, script, *names], capture_output=True, text=True, env=os.environ, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_grid_has_two_turns_more_than_steps(tmp_path):
    from llmkernels.crosscompile.schedule import read

    bundles = ["     0   :  { %s1 = smov 0 }"]
    asked = "%p1 = scmp.ge.s32.totalorder %s1, 1  ;;  %p2 = scmp.lt.s32.totalorder %s1, 9"
    bundles += [f"  0x1 LB: > {{ {asked} }} /* Start region 2 */"]
    bundles += ["  0x2   : > { %1 = sbr.rel (%p3) target = $region4 }", "  0x3   : > { vst }"]
    bundles += ["  0x4   : > { %p4 = scmp.ge.s32.totalorder %s2, 10 } /* Start region 4 */"]
    bundles += ["  0x5   :  { %2 = sbr.rel (!%p4) target = $region2 }"]
    (tmp_path / "17-kernel.1-72-final_bundles.txt").write_text("\n".join(bundles))
    units = "== CAPACTIY:\nMXU, VSTORE:SPILL\n2 2\n== UTILIZATION:\n" + "0 0\n" * 6
    (tmp_path / "17-kernel.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(units)
    (program,) = read(Path(tmp_path))
    assert program.runs() == [1, 10, 8, 8, 10, 1]


def test_interpreted_calls_are_right_however_late_copies_come():
    assert told(pallas_calls.__file__) == {
        f"{name}, {mode}": None for name in pallas_calls.CALLS for mode in pallas_calls.MODES
    }


SOME, SEVERAL_BLOCKS = {"rows": 80, "out": 200, "in_": 640}, {"rows": 520, "out": 72, "in_": 4480}
GATED = {"rows": 80, "features": 288, "in_": 384, "activation": "swiglu", "norm_weight": True, "residual": True}
ROUNDED = {"rows": 80, "out": 72, "in_": 512, "input_scale": 0.25}
SCHEMES = ("w4a16_g128_zp", "w4a16_g32", "w4a16_g128_actorder", "w8a16_g128_zp", "w8a8", "fp8_row_a16", "mxfp4")
MANY_ROWS = [
    *(("quantized_gemm", scheme, SOME) for scheme in SCHEMES),
    ("quantized_gemm", "w8a8", {"rows": 520, "out": 1100, "in_": 1300}),
    *(("quantized_gemm", scheme, SEVERAL_BLOCKS) for scheme in ("w4a16", "w4a16_g128_zp", "w8a8")),
    *(("norm_linear_activation", scheme, GATED) for scheme in ("w4a16", "w4a16_g128", "w8a16", "w8a8")),
    *(("quantized_gemm", "w4a16", SOME | {"x_special": kind}) for kind in ("NaN", "infinity")),
    *(("quantized_gemm", "w8a8", ROUNDED | {"x_special": kind}) for kind in ("ties", "zero rows", "NaN", "infinity")),
    *(("quantized_gemm", "w8a8", ROUNDED | {"rows": 500, "x_special": kind}) for kind in ("ties", "zero rows", "NaN")),
    *(("quantized_gemm", "w8a8_static", ROUNDED | {"x_special": kind}) for kind in ("ties", "NaN", "beyond the scale")),
]
ORDERED = [
    *(("quantized_gemm", "w4a16", {"rows": rows, "out": 700, "in_": 1300}) for rows in (500, 520)),
    ("quantized_gemm", "w4a16", {"rows": 490, "out": 1100, "in_": 600}),
    ("norm_linear_activation", "w4a16", {"rows": 500, "features": 300, "in_": 1300}),
    *(("quantized_gemm", "w4a16", SOME | {"rows": 500, "x_special": kind}) for kind in ("NaN", "infinity")),
    *(("quantized_gemm", "w4a16", SOME | {"rows": 520, "x_special": kind}) for kind in ("NaN", "infinity")),
]

SEPARATE = [  # on v6e sums of GELU end in a loop of their own, and MXFP4 is unpacked in short pieces
    *(("norm_linear_activation", scheme, GATED | {"activation": "gelu_tanh"}) for scheme in ("w4a16_g128", "w8a16")),
    ("quantized_gemm", "mxfp4", SOME),
]
FEW_ROWS = [
    ("quantized_gemm", "w4a16_g64", {"rows": 20, "out": 200, "in_": 640}),
    ("quantized_gemm", "w4a16", {"rows": 3, "out": 200, "in_": 4480}),
    ("quantized_gemm", "w4a16", {"rows": 8, "out": 1100, "in_": 1300}),
    ("quantized_gemm", "w8a8", {"rows": 3, "out": 200, "in_": 4480}),
    ("norm_linear_activation", "w4a16", GATED | {"rows": 5}),
    ("norm_linear_activation", "w4a16_g128", GATED | {"rows": 9}),
]


@pytest.mark.parametrize(
    ("like", "op", "scheme", "sizes"),
    [
        *((like, *call) for like in ("v5e", "v7x") for call in MANY_ROWS),
        *(("v6e", *call) for call in MANY_ROWS if call[1] == "w8a8"),
        *(("v6e", *call) for call in (*ORDERED, *SEPARATE)),
    ],
)
def test_interpreted_products_of_many_rows(op, scheme, sizes, like):
    """More than the contract's cases have, in the sizes of a chip."""
    check_product(op, scheme, sizes, like)


@pytest.mark.parametrize(("op", "scheme", "sizes"), FEW_ROWS)
@pytest.mark.parametrize("like", ["v5e", "v6e", "v7x"])
def test_interpreted_products_of_few_rows(op, scheme, sizes, like):
    """What nibbles become is another number on each of them; the contract's cases are interpreted as on v5e."""
    check_product(op, scheme, sizes, like)


def check_product(op, scheme, sizes, like):
    result = pallas_calls.product_like(like, op, scheme, sizes)
    assert result.verdict == "passed", str(result)


@pytest.mark.parametrize("columns", [4096, 28672, 131072])
def test_blocks_of_rounded_rows_fit_vmem(columns):
    rounding, chips = (import_module(f"llmkernels.backends.xla.tpu.{name}") for name in ("_bytes", "_chips"))
    for chip in (chip for chip in chips.CHIPS.values() if chip.registers >= 64):  # v4 rounds by plain XLA
        for size in (2, 4):
            assert 2 * rounding.height(512, columns, size, chip) * columns * (size + 1) < chip.vmem_limit, chip


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("norm_linear_activation", "fp8_block, rms, everything"),
        ("norm_linear_activation", "w4a16_g32_zp, rms"),
        ("paged_attention", "dim 256"),  # on AVX2 these two need sums in short runs
        ("lora_gemm", "update cancels y"),
    ],
)
def test_interpreted_products_agree_with_the_oracle(op, case):
    from llmkernels import testing

    (result,) = testing.conform("xla", op, "float32", case, emulate=True)
    assert result.verdict == "passed", str(result)


def test_planted_faults_are_noticed():
    found = told(pallas_faults.__file__, *QUICK)
    assert all(found.values()), found


def test_every_fault_has_a_place(tmp_path):
    for fault in pallas_faults.FAULTS.values():
        source = pallas_faults.ROOT / "backends" / "xla" / "tpu" / fault.file
        pallas_faults.plant(fault, Path(shutil.copy(source, tmp_path)))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_planted_fault_is_noticed():
    found = told(pallas_faults.__file__, seconds=550)
    assert all(found.values()), found


def test_a_spill_fails_whatever_was_kept():
    from llmkernels.crosscompile import tpu

    assert list(tpu.faults({"why": "", "spills": 1})) == ["stores 1 vector registers for lack of them"]
    assert not list(tpu.faults({"why": "", "spills": 0}))


EXPORT = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
from jax import export
from llmkernels.crosscompile import tpu
from llmkernels.crosscompile.tpu_calls import calls
for call in calls():
    if call.name in ("decode 8 x 2k", "w4a16_g128, 8 rows", "rms, dense, swiglu, 8 rows"):
        run, positional, named = tpu.program("xla", call)
        artifact = export.export(jax.jit(run), platforms=["tpu"])(positional, named)
        assert "tpu_custom_call" in artifact.mlir_module(), call.name
        print(call.op, len(artifact.mlir_module_serialized))
assert "libtpu" not in sys.modules
"""


def test_kernels_are_exported_for_tpus_without_libtpu():
    done = subprocess.run([sys.executable, "-c", EXPORT], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("op", ["paged_attention", "write_kv", "rotary_embedding", "quantized_gemm"])
def test_kernels_count_in_32_bits_where_jax_has_64(op):
    import jax

    from llmkernels import testing
    from llmkernels.discovery import emulated
    from llmkernels.registry import OPS

    contract = OPS[op].contract
    with jax.enable_x64(True), emulated("xla"):
        results = (testing.check(contract, "bfloat16", case, "xla") for case in contract.cases)
        taken = next(result for result in results if result.verdict != "refused")
    assert taken.verdict == "passed", str(taken)


def test_kernels_take_64_bits_in_a_trace():
    """Slots beyond 32 bits are none; and the program for a TPU has the kernel, whose scalars are int32."""
    import jax
    import jax.numpy as jnp
    from jax import export

    from llmkernels import jax_api
    from llmkernels.discovery import emulated

    cache = jax_api.allocate_cache(8, 16, 2, 128, jnp.float32)
    with jax.enable_x64(True):
        slots = jnp.array([2**32, 1, 2**32 + 17])

        def written(slots):
            return jax_api.write_kv(jnp.ones((3, 2, 128), "float32"), None, cache, None, slots)

        with emulated("xla"):
            assert float(jax.jit(written)(slots).sum()) == 256
        assert "tpu_custom_call" in export.export(jax.jit(lambda x: written(x)), platforms=["tpu"])(slots).mlir_module()


def test_a_kept_schedule_is_read(tmp_path):
    """Loops, slots, spills and branches of a program that is written out here as libtpu writes it."""
    from llmkernels.crosscompile.schedule import read

    stem = "17-kernel.1"
    bundles = ["     0   :  { %1 = sbr.rel (%p1) target = $region3 }", "  0x1 LB: > { vst /* Start region 2 */ }"]
    bundles += ["  0x2   : > { %p2 = scmp.ge.s32.totalorder %s3, 8 }"]
    bundles += ["  0x3   :  { %4 = sbr.rel (!%p2) target = $region2 } /* Start region 3 */"]
    (tmp_path / f"{stem}-72-final_bundles.txt").write_text("\n".join(["= control target key start", *bundles]))
    units = "== CAPACTIY:\nMXU, VSTORE:SPILL\n2 2\n== UTILIZATION:\n0 0\n2 1\n1 0\n0 0\n"
    (tmp_path / f"{stem}-70-final_hlo-static-per-bundle-utilization.txt").write_text(units)
    vmem = "#allocation1 [shape = 'f32[8]', space=vmem, size = 0x100, scoped, tag = 'scratch operand']"
    (tmp_path / f"{stem}-02-original.txt").write_text(vmem)
    (program,) = read(Path(tmp_path))
    assert (program.name, program.bundles, program.spills, program.vmem) == ("kernel.1", 4, 1, 256)
    assert list(program.loops(1)) == [range(1, 3)]
    assert program.skips == [(0, 3)]
    assert program.turns == [(range(1, 3), 8)]
    assert program.runs() == [1, 8, 8, 1]
    assert program.used("MXU", range(1, 3)) == 0.75
