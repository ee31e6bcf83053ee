"""Schedules of the kernels for TPUs beside those of others, from libtpu's compiler.  No TPU is needed, no time is told.

    make tpu-peers          libtpu and the kernels of tpu-inference into build/, then this, into bench/results

A core issues one bundle of instructions a cycle, so bundles bound the time from below wherever copies do not.

Decode: bundles of the loop over keys, copies included, for one page of keys and values of all KV heads (512 KiB, which
every kernel copies once), in a block that no mask cuts.  "alone": without what starts copies and counts blocks.
Products: bundles of a whole call, loops counted as often as they run and every branch taken.
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
from pathlib import Path
from unittest import mock

from llmkernels.crosscompile import tpu, tpu_calls

PEERS = Path("build") / "tpu_inference"
RESULTS = Path("bench") / "results" / "tpu-peers.json"
TARGETS = ("v5e", "v6e", "v7x")
PAGE, HEADS, KV_HEADS, DIM, HIDDEN = 128, 32, 8, 128, 4096
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
    for scheme in ("w8a8", "w4a16"):
        for count in (8, 512):
            yield from ((f"{scheme}, {count} rows", who) for who in PRODUCTS if PRODUCTS[who](scheme, count))


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
    import jax

    what, who, target = names
    row = {"what": what, "who": who, "target": target, "why": ""}
    decode = what.startswith("decode")
    made, *about = (
        DECODE[who](*sizes(what)) if decode else PRODUCTS[who](what.partition(",")[0], int(what.split()[-2]))
    )

    def program(sharding):
        run, shapes = made
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
        return (lambda arrays, _: run(*arrays)), shapes, {}

    try:
        (device,) = sharded_device(target)
        with mock.patch("jax.devices", lambda *_: [device]):  # peers ask it what they compile for
            kernels, others = tpu.schedules("xla", target, program)
        row |= (of_step(kernels, *about) if decode else of_call(kernels or others)) 
    except Exception as error:  # whatever a compiler raises is why the kernel was not compiled
        row["why"] = tpu.raised(error)
    return row
