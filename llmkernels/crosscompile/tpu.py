"""Compile a backend's Pallas kernels for TPUs that are not here, by the compiler that comes with libtpu.

libtpu is no dependency, and must not be importable beside jax in every day's environment: jax would look for a TPU
whenever it starts.  So it lies in a folder of its own, which only the processes that compile know.
"""

import atexit
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from llmkernels import discovery, status
from llmkernels.crosscompile import schedule
from llmkernels.crosscompile.tpu_calls import Call, arguments

FOLDER = Path("build") / "libtpu"
ENVIRONMENT = {  # what libtpu asks of a machine that is none of its own
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
NUMBERS = ("bundles", "spills", "vmem", "matrix", "loads", "vector")
ROW = {"kernel", "target", "launch", "ops", "why", *NUMBERS}
SLACK, SLACK_BUNDLES = 1.1, 64  # what a program may grow by before it is called worse
_KERNEL = re.compile(r'%([\w.-]+) = [^\n]*custom_call_target="tpu_custom_call"')  # the others are XLA's own programs


def chips(backend: str) -> dict[str, Any]:
    """The generations that the backend's kernels are for, by name; ValueError where it has no Pallas kernels."""
    try:
        return dict(_part(backend, "tpu._chips").CHIPS)
    except ModuleNotFoundError:
        raise ValueError(f"--backend is {backend!r}, which has no Pallas kernels") from None


def compile_all(backend: str, calls: Sequence[tuple[Call, str]], libtpu: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """A row for each (call, generation), in order.

    Args:
        libtpu: the folder that it was installed into.
        jobs: processes at once.
    """
    if not (libtpu / "libtpu").is_dir():
        raise ValueError(f"--libtpu is {libtpu}, where there is none: make compile-tpu installs it")
    os.environ.update(ENVIRONMENT)  # before the processes start, and jax in them
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), prepare, (str(libtpu.resolve()),)) as pool:
        yield from pool.map(partial(_row, backend), *zip(*calls, strict=True))


def prepare(libtpu: str) -> None:
    """What a process does before it imports jax, to compile for TPUs and to have the schedules."""
    sys.path.insert(0, libtpu)
    folder = tempfile.mkdtemp(prefix="schedules-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["LIBTPU_INIT_ARGS"] = schedule.FLAGS.format(folder=folder)
    os.environ["SCHEDULES"] = folder


def _row(backend: str, call: Call, target: str) -> dict[str, Any]:
    began = time.perf_counter()
    row: dict[str, Any] = {"kernel": call.op, "target": target, "launch": call.name, "ops": {call.op: [call.dtype]}}
    row |= dict.fromkeys(NUMBERS) | {"why": ""}
    try:
        kernels, _ = schedules(backend, target, partial(program, backend, call))
        row |= numbers(max(kernels, key=lambda kernel: kernel.bundles))
    except Exception as error:  # whatever a compiler raises is why the kernel was not compiled
        row["why"] = raised(error)
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def raised(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def numbers(program: schedule.Schedule) -> dict[str, Any]:
    """What is kept of a schedule: matrix, loads and vector are shares of the slots of all bundles."""
    shares = {"matrix": "MXU", "loads": "VLOAD", "vector": "VALU"}
    return {"bundles": program.bundles, "spills": program.spills, "vmem": program.vmem} | {
        name: round(program.used(unit), 3) for name, unit in shares.items()
    }


def schedules(backend: str, target: str, made: Callable) -> tuple[list[schedule.Schedule], list[schedule.Schedule]]:
    """The Pallas kernels of a program for one core of that generation, and XLA's own parts.  The process is prepared.

    Args:
        made: from a sharding, (function, positional arguments, named ones), by shapes.
    """
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chips(backend)[target].topology, chips_per_host_bounds=(1, 1, 1)
    )
    device, folder = topology.devices[0], Path(os.environ["SCHEDULES"])
    shutil.rmtree(folder)
    folder.mkdir()
    run, positional, named = made(jax.sharding.SingleDeviceSharding(device))
    with jax.default_device(device):  # where Pallas looks for the generation
        compiled = jax.jit(run).lower(positional, named).compile()
    names = _KERNEL.findall(compiled.as_text() or "")
    found = schedule.read(folder)
    return [one for one in found if one.name in names], [one for one in found if one.name not in names]


def program(backend: str, call: Call, sharding: Any = None) -> tuple[Callable, list[Any], dict[str, Any]]:
    """(function of arrays and of those among the options, shapes of the first, shapes of the second)."""
    import jax

    def array(shape: tuple[int, ...], dtype: str) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    positional, named, fixed = arguments(call, partial(_weight, backend, array), array)
    kernel = _part(backend, f"tpu.{call.kernel or call.op}")
    refused = [reason for _, reason, _ in kernel.takes(*positional, **named, **fixed)]
    if refused:
        raise ValueError(f"refused: {'; '.join(refused)}")
    return lambda arrays, options: kernel.run(*arrays, **options, **fixed), positional, named


def _weight(backend: str, array: Callable, name: str, out: int, columns: int) -> Any:
    """A quantized weight by shapes, as the backend's programs take it."""
    from llmkernels.quant import scheme

    to = scheme(name)
    groups = -(-columns // to.group) if to.group else 1
    shape = {"tensor": (1, 1), "block": (-(-out // 128), groups)}.get(to.granularity, (out, groups))
    stored = {"int4": "uint8", "mxfp4": "uint8", "int8": "int8", "fp8": "float8_e4m3fn"}[to.weight]
    zeros = None if to.symmetric else array(shape, stored)
    scales = array(shape, "uint8" if to.weight == "mxfp4" else "float32")
    values = array((out, columns // 2 if to.packed else columns), stored)
    return _part(backend, "_weight").Weight(values, scales, zeros, None, None, to, (out, columns))


def _part(backend: str, name: str) -> Any:
    return import_module(f"{discovery.backends()[backend]}.{name}")


def faults(one: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a row."""
    if one["why"]:
        yield one["why"]
    elif one["spills"]:
        yield f"stores {one['spills']} vector registers for lack of them"


def worse(rows: Iterable[Mapping[str, Any]], kept: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Rows that take more than the same call did when the report was kept, by the same compiler."""
    if kept.get("libtpu") != version():
        return
    before = {key(one): one for one in kept["rows"]}
    for one in rows:
        old = before.get(key(one))
        if old is None or one["why"] or old["why"]:
            continue
        if one["bundles"] > SLACK * old["bundles"] + SLACK_BUNDLES:
            yield one, f"has {one['bundles']} bundles; it had {old['bundles']}"
        if one["vmem"] > SLACK * old["vmem"]:
            yield one, f"takes {one['vmem']} bytes of VMEM; it took {old['vmem']}"


def report(backend: str, rows: Iterable[Mapping[str, Any]], problems: Iterable[str]) -> dict[str, Any]:
    words = {"backend": backend, "libtpu": version(), "recorded": time.strftime("%Y-%m-%d")}
    return words | {"rows": [dict(one) for one in rows], "problems": list(problems)}


def evidence(backend: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """For `llmkernels status`: how many calls of each op and dtype were compiled for each generation."""
    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    for one in rows:
        for op, dtypes in one["ops"].items():
            for dtype in dtypes:
                cell = counts.setdefault((op, dtype, f"TPU {one['target']}"), dict.fromkeys(status.COUNTS, 0))
                cell["failed" if one["why"] else "passed"] += 1
    facts = {"mode": "compiled", "recorded": time.strftime("%Y-%m-%d"), "versions": status.versions()}
    for (op, dtype, target), cell in counts.items():
        yield {"op": op, "backend": backend, "dtype": dtype, "device": target, **facts, **cell}


def version() -> str:
    """Of the libtpu in FOLDER, by the name of its metadata; empty where there is none."""
    return next((path.name.split("-")[1].removesuffix(".dist") for path in FOLDER.glob("libtpu-*.dist-info")), "")


def key(one: Mapping[str, Any]) -> tuple[str, str, str]:
    return one["kernel"], one["target"], one["launch"]
