"""Schedules of the kernels for TPUs beside those of others, from libtpu's compiler.  No TPU is needed, no time is told.

    make tpu-peers          libtpu and the kernels of tpu-inference into build/, then this, into bench/results

A core issues one bundle of instructions a cycle, so bundles bound the time from below wherever copies do not.

Decode: bundles of the loop over keys, copies included, for one page of keys and values of all KV heads (512 KiB, which
every kernel copies once), in a block that no mask cuts.  "alone": without what starts copies and counts blocks.
Products: bundles of all programs of a call, loops counted as often as they run and every branch taken; of branches that
exclude each other, as in tpu-inference's kernel, the mean.
matrix, loads: used slots of the matrix unit and of loads, of those that the bundles have.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

from llmkernels.crosscompile import tpu, tpu_calls

PEERS = Path("build") / "tpu_inference"
RESULTS = Path("bench") / "results" / "tpu-peers.json"
TARGETS = ("v5e", "v6e", "v7x")
PAGE, HEADS, KV_HEADS, DIM, HIDDEN, GROUP = 128, 32, 8, 128, 4096, 128
STEPS = [(8, 2048), (64, 2048), (8, 16384), (64, 16384)]  # sequences, keys of each


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--only", default="", help="part of what a row is called")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help=f"write rows there, such as {RESULTS}")
    asked = parser.parse_args()
    for folder, what in ((tpu.FOLDER / "libtpu", "libtpu"), (PEERS / "tpu_inference", "tpu-inference")):
        if not folder.is_dir():
            sys.exit(f"there is no {what} in {folder.parent}: make tpu-peers installs it")
    os.environ.update(tpu.ENVIRONMENT)
    names = [(what, who, target) for what, who in rows() for target in asked.target or TARGETS]
    names = [one for one in names if asked.only in " ".join(one)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.jobs, context, prepare, (str(tpu.FOLDER.resolve()),)) as pool:
        found = list(pool.map(measured, names))
    print("\n".join(table(found)))
    if asked.json:
        report = {"libtpu": tpu.version(), "recorded": time.strftime("%Y-%m-%d"), "rows": found}
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


def rows():
    """(what, who) of each row."""
    for seqs, keys in STEPS:
        yield from ((f"decode {seqs} x {keys // 1024}k", who) for who in DECODE)
    for scheme, others in PEERS_OF.items():
        for count in (8, 512):
            yield from ((f"{scheme}, {count} rows", who) for who in (OURS, *others, "XLA's dot"))


def table(found):
    yield "| call | kernel | target | bundles | alone | matrix | loads | spills |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in found:
        if row["why"]:
            yield f"| {row['what']} | {row['who']} | {row['target']} | not compiled: {row['why'][:80]} | | | | |"
            continue
        shares = f"{row['matrix']:.0%} | {row['loads']:.0%}"
        bundles = f"{row['bundles']:.0f} | {row['alone'] or 0:.0f}"
        yield f"| {row['what']} | {row['who']} | {row['target']} | {bundles} | {shares} | {row['spills']} |"


def prepare(libtpu):
    """A process that compiles: libtpu's folder, and tpu-inference's kernels without its package, which needs vLLM."""
    tpu.prepare(libtpu)
    package = types.ModuleType("tpu_inference")
    package.__path__ = [str(PEERS / "tpu_inference")]
    logger = types.ModuleType("tpu_inference.logger")
    logger.init_logger = quiet
    utils = types.ModuleType("tpu_inference.utils")
    utils.get_device_name = device_name
    sys.modules |= {"tpu_inference": package, "tpu_inference.logger": logger, "tpu_inference.utils": utils}


def quiet(name):
    found = logging.getLogger(name)
    found.warning_once, found.info_once = found.debug, found.debug
    return found


def device_name():
    import jax

    return {"TPU v5 lite": "TPU v5e", "TPU v6 lite": "TPU v6e", "TPU7x": "TPU v7"}[jax.devices()[0].device_kind]


def measured(names):
    """A row."""
    what, who, target = names
    row = {"what": what, "who": who, "target": target, "why": ""}
    devices = []

    def made(sharding):
        devices.extend(sharding.device_set)
        run, arrays = program(sharding)
        return (lambda arrays, _: run(*arrays)), arrays, {}

    try:
        decode = what.startswith("decode")
        program, *about = DECODE[who](*sizes(what), target) if decode else PRODUCTS[who](*sizes(what))
        with mock.patch("jax.devices", return_value=devices):  # peers ask it what they compile for
            kernels, others = tpu.schedules("xla", target, program if who == OURS else made)
        row |= of_step(max(kernels, key=len_of), *about) if decode else of_call(kernels + others)
    except Exception as error:  # whatever a compiler raises is why the kernel was not compiled
        row["why"] = tpu.raised(error)
    return row


def len_of(schedule):
    return schedule.bundles


def sizes(what):
    """decode 8 x 2k -> (8, 2048); w8a8, 512 rows -> ('w8a8', 512)."""
    words = what.replace(",", "").split()
    return (int(words[1]), int(words[3][:-1]) * 1024) if words[0] == "decode" else (words[0], int(words[1]))


def of_step(schedule, pages, heads=KV_HEADS, copies_outside=False):
    """Bundles for a page of all KV heads, of a loop that has `pages` of `heads` in each turn.

    Of branches that multiply, the shorter is the one without masks.
    """
    matrix = schedule.slots["MXU"]
    busy = sorted((loop for loop, _ in schedule.turns if any(matrix[i] for i in loop)), key=len)
    inner = outer = busy[0]
    if copies_outside:
        outer = next(loop for loop in busy if len(loop) > len(inner))
    branches = [range(*skip) for skip in schedule.skips if skip[0] in inner and skip[1] - 1 in inner]
    branches = [one for one in branches if any(matrix[i] for i in one)]
    branches = [one for one in branches if not any(one != other and one[0] in other for other in branches)]
    alone, *others = sorted(branches, key=len) if len(branches) > 1 else [inner]
    left = [i for i in outer if not any(i in other for other in others)]
    share = KV_HEADS / heads / pages
    return {
        "bundles": round(len(left) * share, 1), "alone": round(len(alone) * share, 1), "spills": schedule.spills,
        "matrix": round(schedule.used("MXU", left), 3), "loads": round(schedule.used("VLOAD", left), 3),
    }  # fmt: skip


def of_call(schedules):
    """Bundles of all programs of a call."""
    runs = [(one, alternated(one)) for one in schedules]
    total = sum(sum(times) for _, times in runs)

    def share(unit):
        used = sum(n * times[i] for one, times in runs for i, n in enumerate(one.slots[unit]))
        return round(used / sum(one.capacity[unit] * sum(times) for one, times in runs), 3)

    spills = sum(one.spills for one in schedules)
    return {"bundles": round(total), "alone": None, "spills": spills, "matrix": share("MXU"), "loads": share("VLOAD")}


def alternated(schedule):
    """How often each bundle runs, where of several products one runs in each turn."""
    times, matrix = schedule.runs(), schedule.slots["MXU"]
    branches = [one for one in schedule.inside(range(schedule.bundles)) if any(matrix[i] for i in one)]
    arms = [one for one in branches if not any(other != one and other[0] in one for other in branches)]
    for i in (i for one in arms for i in one):
        times[i] /= len(arms)
    return times


def shaped(function, *shapes):
    """From a sharding, the function and its arrays."""
    import jax

    return lambda sharding: (function, [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes])


def our_decode(seqs, keys, target):
    from llmkernels.backends.xla.tpu import _chips, _tiles

    tiles = _tiles.choose(
        _chips.CHIPS[target], tokens=seqs, seqs=seqs, kv_heads=KV_HEADS, group=HEADS // KV_HEADS, dim=DIM, v_dim=DIM,
        page_size=PAGE, dtype="bfloat16", stored="bfloat16",
    )  # fmt: skip
    return partial(tpu.program, "xla", tpu_calls.attention("decode", tokens=seqs, seqs=seqs, keys=keys)), tiles.pages


def jax_paged(seqs, keys, target):
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    pages = 8
    cache = ((KV_HEADS, pages_of(seqs, keys), PAGE, DIM), "bfloat16")
    arrays = [((seqs, HEADS, DIM), "bfloat16"), cache, cache, ((seqs,), "int32"), ((seqs, keys // PAGE), "int32")]
    return shaped(partial(paged_attention, pages_per_compute_block=pages), *arrays), pages, 1


def jax_ragged(seqs, keys, target):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages = 4
    run = partial(ragged_paged_attention, sm_scale=DIM**-0.5, num_kv_pages_per_block=pages, num_queries_per_block=8)
    arrays = [((seqs, HEADS, DIM), "bfloat16"), ((pages_of(seqs, keys), PAGE, 2 * KV_HEADS, DIM), "bfloat16")]
    lengths = [((seqs,), "int32"), ((seqs, keys // PAGE), "int32"), ((seqs + 1,), "int32"), ((1,), "int32")]
    return shaped(run, *arrays, *lengths), pages


def vllm_ragged(seqs, keys, target):
    from tpu_inference.kernels.ragged_paged_attention.v3.kernel import ragged_paged_attention

    new = ((seqs, KV_HEADS, DIM), "bfloat16")
    arrays = [((seqs, HEADS, DIM), "bfloat16"), new, new, ((pages_of(seqs, keys), PAGE, KV_HEADS, 2, DIM), "bfloat16")]
    lengths = [((seqs,), "int32"), ((seqs * keys // PAGE,), "int32"), ((seqs + 1,), "int32"), ((3,), "int32")]
    run = partial(ragged_paged_attention, sm_scale=DIM**-0.5)
    return shaped(run, *arrays, *lengths), min(keys, 4096) // PAGE, KV_HEADS, True  # its own block: 4096 keys


def pages_of(seqs, keys):
    """In a cache that libtpu has room for: which pages there are is nothing that a schedule knows."""
    return min(seqs * keys // PAGE, 4096)


def our_product(scheme, rows):
    return (partial(tpu.program, "xla", tpu_calls.product(scheme, rows)),)


def vllm_product(scheme, rows, blocks=None):
    from tpu_inference.kernels.quantized_matmul import kernel, tuned_block_sizes

    stored, rounded = ("int8", "int8") if scheme == "w8a8" else ("int4", None)
    value = blocks and tuned_block_sizes.TunedValue(*blocks)
    run = partial(kernel.quantized_matmul_kernel, x_q_dtype=rounded, tuned_value=value)
    shapes = ((rows, HIDDEN), "bfloat16"), ((HIDDEN, HIDDEN), stored), ((HIDDEN,), "float32")
    return (shaped(run, *shapes),)


def vllm_groups(scheme, rows, blocks):
    """Its kernel for a scale for 128 columns; it scales x for the same columns too, and adds up in bfloat16."""
    from tpu_inference.kernels.quantized_matmul import blockwise_kernel, tuned_block_sizes

    value = tuned_block_sizes.TunedValue(*blocks)
    run = partial(blockwise_kernel.quantized_matmul_kernel, block_size=GROUP, tuned_value=value)
    shapes = ((rows, HIDDEN), "bfloat16"), ((HIDDEN, HIDDEN), "int4"), ((HIDDEN // GROUP, 1, HIDDEN), "float32")
    return (shaped(run, *shapes),)


def in_blocks(kernel, features, columns):
    """A kernel of tpu-inference with blocks of our choice: all rows, so many features and columns."""
    return lambda scheme, rows: kernel(scheme, rows, (max(rows, 16), features, columns))


def xla_product(scheme, rows):
    import jax.numpy as jnp
    from jax import lax

    def bytes_of(x, weight, x_scale, scale):
        total = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return (total.astype(jnp.float32) * x_scale * scale).astype(jnp.bfloat16)

    def nibbles(x, weight, scale):
        return (x @ weight.astype(jnp.bfloat16).T) * scale

    def groups(x, weight, scale):
        wide = weight.astype(jnp.bfloat16).reshape(HIDDEN, -1, GROUP) * scale[..., None]
        return x @ wide.reshape(HIDDEN, HIDDEN).T

    weight = (HIDDEN, HIDDEN)
    if scheme == "w8a8":
        shapes = ((rows, HIDDEN), "int8"), (weight, "int8"), ((rows, 1), "float32"), ((1, HIDDEN), "float32")
        return (shaped(bytes_of, *shapes),)
    run, scales = (groups, (HIDDEN, HIDDEN // GROUP)) if scheme == "w4a16_g128" else (nibbles, (HIDDEN,))
    return (shaped(run, ((rows, HIDDEN), "bfloat16"), (weight, "int4"), (scales, "bfloat16")),)


OURS = "llmkernels"
DECODE = {
    OURS: our_decode,
    "jax paged_attention, 8 pages a block": jax_paged,
    "jax ragged_paged_attention, 8 queries, 4 pages": jax_ragged,
    "tpu-inference ragged_paged_attention v3": vllm_ragged,
}
BLOCKS = (512, 2048), (1024, 4096)  # features, columns
ROWS, GROUPS = "tpu-inference quantized_matmul", "tpu-inference blockwise quantized_matmul"
PRODUCTS = {
    OURS: our_product,
    ROWS: vllm_product,
    **{f"{ROWS}, blocks of {n} x {k}": in_blocks(vllm_product, n, k) for n, k in BLOCKS},
    **{f"{GROUPS}, blocks of {n} x {k}": in_blocks(vllm_groups, n, k) for n, k in BLOCKS},
    "XLA's dot": xla_product,
}
PEERS_OF = {  # those that do the same work: the same bytes, scales for the same weights
    scheme: [who for who in PRODUCTS if who.startswith(kernel)]
    for scheme, kernel in (("w8a8", ROWS), ("w4a16", ROWS), ("w4a16_g128", GROUPS))
}

if __name__ == "__main__":
    main()
