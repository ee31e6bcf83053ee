"""What XLA makes of the row-wise ops on a TPU, beside the one pass of the Pallas kernel; no TPU is needed, but libtpu.

    make compile-tpu && .venv/bin/python bench/tpu_rowwise.py [--target v6e] [--rows 8192]

Prints a table in Markdown.  programs, bytes and cycles are those of libtpu's own estimate of the plain program; the
least is what the op must read and write, each array once, which is what the kernel does.
"""

import argparse
import os
import re
import sys

from llmkernels.crosscompile import tpu

HIDDEN = 4096


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append")
    parser.add_argument("--rows", type=int, default=8192)
    asked = parser.parse_args()
    if not (tpu.FOLDER / "libtpu").is_dir():
        sys.exit(f"there is no libtpu in {tpu.FOLDER}: make compile-tpu installs it")
    sys.path.insert(0, str(tpu.FOLDER.resolve()))
    os.environ.update(tpu.ENVIRONMENT)
    print(f"| {asked.rows} rows | target | programs | bytes | of the least | estimated cycles |")
    print("|---|---|---|---|---|---|")
    for target in asked.target or ("v5e", "v6e", "v7x"):
        for name, plain, arrays, options, least in calls(asked.rows):
            programs, moved, cycles = estimate(plain, arrays, options, target)
            print(f"| {name} | {target} | {programs} | {moved / 1e6:.0f} MB | {moved / least:.1f}x | {cycles} |")


def calls(rows):
    """(name, function, shapes of its arrays, options, bytes that must move)."""
    from llmkernels.backends.xla import quantize_activation, rms_norm, rotary_embedding, silu_and_mul

    x, numbers = ((rows, HIDDEN), "bfloat16"), rows * HIDDEN
    yield "rms_norm", rms_norm.plain, [x, ((HIDDEN,), "bfloat16")], {}, 4 * numbers
    yield "silu_and_mul", silu_and_mul.plain, [((rows, 2 * HIDDEN), "bfloat16")], {}, 6 * numbers
    yield "quantize_activation int8", quantize_activation.plain, [x], {}, 3 * numbers
    grouped = {"dtype": "float8_e4m3fn", "group": 128}
    yield "quantize_activation e4m3, group 128", quantize_activation.plain, [x], grouped, 3 * numbers
    heads = [((rows, count, 128), "bfloat16") for count in (32, 8)]
    tables = [((8192, 64), "bfloat16")] * 2
    yield (
        "rotary_embedding 32 + 8 heads",
        rotary_embedding.plain,
        [*heads, *tables, ((rows,), "int32")],
        {},
        5 * numbers,
    )


def estimate(plain, arrays, options, target):
    """(programs, bytes, cycles) of a function as libtpu compiles it."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=tpu.chips("xla")[target].topology, chips_per_host_bounds=(1, 1, 1)
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arrays]
    compiled = jax.jit(lambda *given: plain(*given, **options)).lower(*shapes).compile()
    entry = compiled.as_text().partition("\nENTRY")[2]
    cycles = [int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', entry)]
    return len(cycles), compiled.cost_analysis()["bytes accessed"], sum(cycles)


if __name__ == "__main__":
    main()
