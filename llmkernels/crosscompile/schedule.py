"""What a Pallas kernel takes of a TPU, read from the schedule that libtpu's compiler writes, never from the source.

A TPU core issues one bundle of instructions a cycle, and waits for nothing that the compiler did not foresee, but for
copies.  So the final bundles of a program, and how often its loops run, are what its computation takes, in cycles.
libtpu writes them where LIBTPU_INIT_ARGS has FLAGS; the flags are undocumented, so libtpu's version is pinned.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The passes that are read: all of them are 100 to 300 MB for a program of attention, and take half of the time.
_PASSES = "original|final_bundles|final_hlo-static-per-bundle-utilization"
FLAGS = f"--xla_jf_dump_to={{folder}} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_PASSES}"
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2},?\s*)*:\s*(>*)\s*(.*)$")
_NAME = re.compile(r"^\d+-(.+)-\d+-final_bundles\.txt$")
_COMPARED = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%p\w+\), )?%\w+, (\d+)\b")
_BACK = re.compile(r"sbr\.rel \(!(%p\w+)\) target = \$region(\d+)")
_BRANCH = re.compile(r"sbr\.rel \((!?)%p\w+\) target = \$region(\d+)")
_VMEM = re.compile(r"space=vmem, size = (0x[0-9a-f]+),[^\n]* scoped")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")


@dataclass(frozen=True)
class Schedule:
    """One program of a core.

    Args:
        name: what the kernel is called.
        depth: of each bundle, how many loops it stands in.
        slots: unit -> of each bundle, how many of its slots are used.  VSTORE:SPILL counts vector registers that are
            stored because there are too few.
        capacity: unit -> slots of one bundle.
        vmem: bytes of VMEM that are the kernel's own: buffers, scratch, windows of its blocks.
        skips: (bundle, bundle): where a branch leads forward past a part of the program.
        turns: (bundles of a loop, how often it runs), outer loops first; 0 where the program does not say.
        stages: of those loops, the ones that run a grid: what a branch leads past is left out in two of their turns.
    """

    name: str
    depth: list[int]
    slots: dict[str, list[int]]
    capacity: dict[str, int]
    vmem: int
    skips: list[tuple[int, int]]
    turns: list[tuple[range, int]]
    stages: list[range]

    @property
    def bundles(self) -> int:
        return len(self.depth)

    @property
    def spills(self) -> int:
        return sum(self.slots["VSTORE:SPILL"])

    def used(self, unit: str, inside: Sequence[int] = ()) -> float:
        """The share of a unit's slots that is used, in some bundles or in all."""
        inside = inside or range(self.bundles)
        return sum(self.slots[unit][i] for i in inside) / max(1, self.capacity[unit] * len(inside))

    def runs(self) -> list[int]:
        """How often each bundle runs, every branch taken; a loop of unknown length counts once."""
        times = [1] * self.bundles
        for loop, turns in self.turns:
            staged = {i for part in self.inside(loop) for i in part} if loop in self.stages else ()
            for i in loop:
                times[i] *= max(1, turns - 2 * (i in staged))
        return times

    def inside(self, part: range) -> list[range]:
        """The parts of the program, within this one, that a branch leads past."""
        return [range(*skip) for skip in self.skips if skip[0] in part and skip[1] - 1 in part]

    def loops(self, depth: int) -> Iterator[range]:
        """The runs of bundles that stand in `depth` loops or more."""
        begin = None
        for i, deep in enumerate([*self.depth, 0]):
            if deep >= depth and begin is None:
                begin = i
            elif deep < depth and begin is not None:
                yield range(begin, i)
                begin = None


def read(folder: Path) -> list[Schedule]:
    """The programs whose schedules lie in `folder`, those of the compiler's own left out."""
    found = []
    for file in sorted(folder.glob("*-final_bundles.txt")):
        if (match := _NAME.match(file.name)) and "schedule-analysis" not in file.name:
            if match[1].startswith("<") or match[1] == "TLP":
                continue
            found.append(_schedule(match[1], file))
    return found


def _schedule(name: str, file: Path) -> Schedule:
    rows = [match for line in file.read_text().splitlines() if (match := _BUNDLE.match(line))]
    begins = {region: i for i, row in enumerate(rows) for region in _REGION.findall(row[2])}
    branches = [(i, begins.get(branch[2], 0)) for i, row in enumerate(rows) if (branch := _BRANCH.search(row[2]))]
    stem = file.name.partition(f"-{name}-")[0]
    (utilization,) = file.parent.glob(f"{stem}-{name}-*-final_hlo-static-per-bundle-utilization.txt")
    head, _, body = utilization.read_text().partition("== UTILIZATION:")
    _, units, capacity = head.strip().splitlines()
    names = [unit.strip() for unit in units.split(",")]
    numbers = [[int(n) for n in line.split()] for line in body.strip().splitlines() if line.strip()]
    turns = _turns(rows, begins)
    return Schedule(
        name,
        [len(row[1]) for row in rows],
        {unit: [row[i] for row in numbers] for i, unit in enumerate(names)},
        dict(zip(names, map(int, capacity.split()), strict=True)),
        sum(int(size, 16) for size in _VMEM.findall(_stage(file.parent, stem, name, "original"))),
        [(i, to) for i, to in branches if to > i],
        turns,
        [loop for loop, times in turns if _is_stages(rows, loop, times)],
    )


def _turns(rows: list[re.Match], begins: Mapping[str, int]) -> list[tuple[range, int]]:
    """Loops by the branches that lead back, with the number that their counters are compared with."""
    compared = dict(match for row in rows for match in _COMPARED.findall(row[2]))
    found = []
    for i, row in enumerate(rows):
        for predicate, region in _BACK.findall(row[2]):
            begin = begins.get(region, i)
            if begin < i:
                found.append((range(begin, i), int(compared.get(predicate, 0))))
    return sorted(found, key=lambda loop: (loop[0].start, -loop[0].stop))


def _is_stages(rows: list[re.Match], loop: range, turns: int) -> bool:
    """Whether a loop copies in, computes and copies out by turns: it asks whether 1 <= turn < turns - 1."""
    words = " ".join(rows[i][2] for i in loop)
    asked = (rf"scmp\.{sign}\.s32\.totalorder (%\w+), {n}\b" for sign, n in (("ge", 1), ("lt", turns - 1)))
    first, last = (set(re.findall(pattern, words)) for pattern in asked)
    return bool(first & last)


def _stage(folder: Path, stem: str, name: str, stage: str) -> str:
    return "".join(file.read_text() for file in folder.glob(f"{stem}-{name}-*-{stage}.txt"))
