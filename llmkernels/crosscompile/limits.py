"""What limits the benchmarks' calls on chips that are not here, by what their kernels were compiled to.

    llmkernels compile --limits --target gfx942

No call can be faster than the largest of these; it may well be slower, for nothing here knows what waits for what:

    memory       bytes of the call, each moved once, over the chip's bandwidth
    latency      those that are read, no more of them under way than resident programs have asked for (Little's law),
                 and as many times LATENCY as kernels follow one another
    arithmetic   operations over the rate of the unit that was compiled for; the last round of tiles, which leaves units
                 idle, counts as a whole one where all tiles are alike

`sample` passes over its logits as often as their values want, which counts as once here.  H100 is among the products
because it is where the kernels ran: a limit above a time that was measured there would be wrong.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmkernels.bench import results
from llmkernels.contract import Cost
from llmkernels.crosscompile.chips import CHIPS, LATENCY, Chip
from llmkernels.crosscompile.launches import Planned
from llmkernels.crosscompile.record import version
from llmkernels.crosscompile.resources import Resources

H100 = replace(CHIPS["sm_90"], product="H100", bandwidth=3.35e12)
RAN = {"H100": "NVIDIA H100 80GB HBM3"}  # product -> the device under which results are kept
MMA_SYNC = 0.62  # of Hopper's rate, through mma.sync: Luo et al. 2025, https://arxiv.org/abs/2501.12084, table 9
UNEQUAL = ("_attention.attend",)  # under a causal mask the last tiles have most to do, and come first
ROW = {"op", "case", "target", "product", "bytes", "operations", "seconds", "by", "share", "launches"}


@dataclass(frozen=True)
class Limit:
    """seconds that a call takes at least; share: of the speed that memory and a busy matrix unit alone would allow."""

    seconds: float
    by: str
    share: float


def limit(cost: Cost, read: float, launches: Sequence[tuple[str, int, Resources]], chip: Chip) -> Limit:
    """What limits a call.

    Args:
        read: bytes, of those that the call moves.
        launches: kernel, programs, resources of each.  The first that multiplies, or else the first, does the work.
        chip: with the units, the bandwidth and the rates of a product.
    """
    kernel, programs, found = next((one for one in launches if one[2].products), launches[0])
    memory, operations = cost.bytes / chip.bandwidth, cost.operations / _rate(found, chip)
    latency = len(launches) * LATENCY
    if found.in_flight:
        resident = min(programs, found.programs * chip.units)
        latency = max(latency, read * LATENCY / (resident * found.in_flight / found.programs))
    rounds = -(-programs // chip.units)
    arithmetic = operations if kernel in UNEQUAL else operations * rounds * chip.units / programs
    times = {"memory": memory, "arithmetic": arithmetic, "latency": latency}
    by = max(times, key=lambda name: times[name])
    return Limit(times[by], by, max(memory, operations) / times[by])


def _rate(found: Resources, chip: Chip) -> float:
    """Operations/s of the unit that the kernel's products were compiled for."""
    if not found.products:
        return chip.rates["float32"]
    kinds = {"i8": "int8", "f32": "float32", "bf16": "half", "f16": "half"}
    rate = min(chip.rates[kinds.get(kind, "fp8")] for kind in found.products)
    slow = chip.name == "sm_90" and not any("GMMA" in name for name in found.matrix)
    return rate * MMA_SYNC if slow else rate


def rows(planned: Iterable[Planned], measured: Mapping[Any, Resources]) -> Iterator[dict[str, Any]]:
    """A row for each call and product.  measured: launch -> what it was compiled to; a call that lacks one is left."""
    for call in planned:
        if not all(launch in measured for launch, _ in call.launches):
            continue
        taken = [(launch.kernel, programs, measured[launch]) for launch, programs in call.launches]
        for chip in [call.chip, H100] if call.chip.name == H100.name else [call.chip]:
            found = limit(call.cost, call.read, taken, chip)
            told = [
                {"kernel": kernel, "programs": programs, "resident": one.programs, "occupancy": one.occupancy}
                for kernel, programs, one in taken
            ]
            words = {"op": call.op, "case": call.case, "target": chip.name, "product": chip.product}
            yield words | asdict(call.cost) | asdict(found) | {"launches": told}


def report(backend: str, found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {"backend": backend, "triton": version(), "recorded": time.strftime("%Y-%m-%d"), "rows": list(found)}


def key(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return row["op"], row["case"], row["target"], row["product"]


def timed(product: str) -> dict[tuple[str, str], float]:
    """Seconds that Triton's calls took on a product, by op and case, where that was recorded."""
    file = results.place(RAN[product]) if product in RAN else None
    if not file or not file.exists():
        return {}
    rows = [one for one in results.read(file)["rows"] if one["backend"] == "triton"]
    return {(one["op"], one["case"]): one["seconds"] for one in rows}


def table(found: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Lines of cells, the heads first: a call, and what limits it on each product."""
    products = list(dict.fromkeys(one["product"] for one in found))
    took = {product: timed(product) for product in products}
    yield ["call", *products]
    cells = {(one["op"], one["case"], one["product"]): one for one in found}
    for op, case in dict.fromkeys((one["op"], one["case"]) for one in found):
        mine = [(product, cells.get((op, case, product))) for product in products]
        yield [f"{op} {case}", *(_cell(one, took[product].get((op, case))) for product, one in mine)]


def _cell(one: Mapping[str, Any] | None, took: float | None) -> str:
    if one is None:
        return ""
    share = f", {100 * one['share']:.0f} %" if one["share"] < 0.995 else ""
    return f"{_time(one['seconds'])} {one['by']}{share}" + (f"; took {_time(took)}" if took else "")


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    head, *lines = table(found)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def read(file: Path) -> dict[str, Any]:
    from llmkernels.crosscompile import record

    return record.read(file, ROW)
