"""Which kernels a backend really launches on a chip that is not here, and how each of them is specialised.

Every call of the contracts and of the benchmarks is made as if the chip were Triton's current device; where Triton
would compile, the specialisation is written down instead, and nothing is launched.  So there is no second list to keep:
a kernel that no call reaches is found by `unreached`.
"""

import ast
import inspect
import math
import os
import pkgutil
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from llmkernels import quant, registry
from llmkernels.bench.cases import timed
from llmkernels.contract import Case, Contract, Cost
from llmkernels.crosscompile.chips import CHIPS, Chip
from llmkernels.discovery import backends, implementation
from llmkernels.inputs import inputs

BENCH_DTYPE = "bfloat16"
MOST_KEYS = 1 << 17  # a benchmark's cache; the numbers of a larger one would take gigabytes, and it compiles the same


@dataclass(eq=False)
class Launch:
    """One specialisation of one kernel: everything that Triton's compiler is told."""

    kernel: str  # file and function: 'silu_and_mul._gate'
    chip: Chip
    function: Any
    signature: dict[str, str]
    constants: dict[tuple, Any]
    attributes: dict[tuple, Any]
    options: dict[str, Any]
    users: dict[tuple[str, str], str] = field(default_factory=dict)  # (op, dtype) -> the first case that asks for it
    timed: bool = False  # a benchmark's call asks for it

    @property
    def values(self) -> dict[str, Any]:
        """Constants by name, those that Triton made of a one left out."""
        names, declared = list(self.signature), {p.name for p in self.function.params if p.is_constexpr}
        named = {names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}
        return {name: _plain(value) for name, value in named.items() if name in declared}

    @property
    def types(self) -> dict[str, str]:
        """Arguments by name: pointers with what they point to, the others with their width."""
        return {name: kind for name, kind in self.signature.items() if kind != "constexpr"}

    @property
    def name(self) -> str:
        """What tells it from the kernel's other specialisations, in one line; the same in every run."""
        pointers = ",".join(kind.lstrip("*") for kind in self.types.values() if kind.startswith("*"))
        wide = ",".join(name for name, kind in self.types.items() if kind in ("i64", "u64"))
        ones = ",".join(
            list(self.signature)[p[0]] for p in self.constants if list(self.signature)[p[0]] not in self.values
        )
        loose = ",".join(
            name
            for i, (name, kind) in enumerate(self.signature.items())
            if kind.startswith("*") and not self.attributes.get((i,))
        )
        extra = {"int64": wide, "one": ones, "unaligned": loose}
        words = [f"{name}={value}" for name, value in self.values.items()]
        words += [f"{name}={value}" for name, value in extra.items() if value]
        words += [f"warps={self.options['num_warps']}", f"stages={self.options['num_stages']}"]
        return f"{pointers} {' '.join(words)}"

    @property
    def features(self) -> set[tuple[str, Any]]:
        """What a choice of specialisations should have one of each: values of constants, types, and who asks for it."""
        return {*self.values.items(), *self.types.items(), *(("user", user) for user in self.users)}


@dataclass(frozen=True)
class Planned:
    """What a call of the benchmarks launches on a chip, in this order, each with the number of its programs."""

    op: str
    case: str
    chip: Chip
    cost: Cost
    read: float  # bytes of the cost that are not what it returns; half of them where it writes in place
    launches: list[tuple[Launch, int]]


@dataclass
class Recorded:
    launches: list[Launch]  # distinct ones
    planned: list[Planned]
    problems: list[str]  # what went wrong while asking, in sentences


def record(
    backend: str,
    chips: list[Chip],
    cache: Path,
    op: str | None = None,
    seen: Callable[[str], None] = lambda text: None,
    only_bench: bool = False,
) -> Recorded:
    """Every distinct launch of the backend on each chip; with only_bench, those of the benchmarks' calls.

    A call that the backend refuses on a chip launches nothing there.  cache: a folder for the benchmarks' calls.
    """
    found: dict[tuple, Launch] = {}
    planned: list[Planned] = []
    wrong: list[str] = []
    for contract, dtype, case, bench in _calls(backend, op):
        if only_bench and not bench:
            continue
        seen(f"{contract.name} {dtype} {case.name}")
        module = implementation(backend, contract.name)
        call, cost = _large(contract, case, dtype, cache) if bench else (inputs(contract, case, dtype), None)
        contract.validate(call)
        for chip in chips:
            returned: list[torch.Tensor] = []
            with _standing_in(chip, backend) as noted:
                try:
                    if any(reason[0] != "DEVICE" for reason in module.refuse(**call)):  # type: ignore[union-attr]
                        continue
                    returned = _call(contract, module.run, call)  # type: ignore[union-attr]
                except Exception as error:  # whatever a backend raises is a finding
                    wrong.append(f"{contract.name} {dtype} {case.name!r} on {chip.name}: {_raised(error)}")
            steps = []
            for function, signature, constants, attributes, options, programs in noted:
                key = (function, chip.name, str(signature), str(constants), str(attributes), str(options))
                name = f"{function.module.rpartition('.')[2]}.{function.fn.__name__}"
                fresh = Launch(name, chip, function, signature, constants, attributes, options)
                launch = found.setdefault(key, fresh)
                launch.users.setdefault((contract.name, dtype), case.name)
                launch.timed |= bench
                steps.append((launch, programs))
            if cost and steps:
                written = sum(part.nbytes for part in returned) if returned else cost.bytes / 2
                planned.append(Planned(contract.name, case.name, chip, cost, cost.bytes - written, steps))
    return Recorded(list(found.values()), planned, wrong)


def compiles(backend: str) -> bool:
    """Whether the backend has kernels that Triton compiles."""
    return bool(_kernels(backend))


def unreached(backend: str, launches: list[Launch]) -> list[str]:
    """Kernels of the backend that no recorded launch runs, itself or from within another kernel."""
    kernels = _kernels(backend)
    reached: set[Any] = set()
    waiting = {launch.function for launch in launches}
    while waiting:
        function = waiting.pop()
        reached.add(function)
        waiting |= _called(function) - reached
    return sorted(name for name, function in kernels.items() if function not in reached)


def chosen(launches: list[Launch], most: int) -> list[Launch]:
    """Of each kernel and chip at most `most`: half of them launches of benchmarks, the rest what adds most features.

    Where there is room, every value of every constant and every type of every argument comes at least once.
    """
    groups: dict[tuple[str, str], list[Launch]] = {}
    for launch in launches:
        groups.setdefault((launch.kernel, launch.chip.name), []).append(launch)
    found = []
    for group in groups.values():
        kept = _cover([launch for launch in group if launch.timed], [], -(-most // 2))
        found += _cover(group, kept, most)
    return found


def _cover(group: list[Launch], kept: list[Launch], most: int) -> list[Launch]:
    """`kept`, and of the group whatever adds the most features next, until nothing is new or there are enough."""
    kept, rest = list(kept), list(group)
    have = set().union(*(launch.features for launch in kept))
    while rest and len(kept) < most:
        best = max(rest, key=lambda launch: len(launch.features - have))
        if not best.features - have:
            break
        kept.append(best)
        have |= best.features
        rest.remove(best)
    return kept


def _calls(backend: str, op: str | None) -> Iterator[tuple[Contract, str, Case, bool]]:
    """The benchmarks' calls first, then every case of the contracts that is not forbidden."""
    for entry in [registry.get(op)] if op else registry.OPS.values():
        contract = entry.contract
        if not implementation(backend, contract.name):
            continue
        for case in timed(contract.name, "cuda", quick=False):
            if sum(case.args.get("lengths", ())) <= MOST_KEYS:
                yield contract, BENCH_DTYPE, case, True
        for dtype in contract.dtypes:
            yield from ((contract, dtype, case, False) for case in contract.cases if not case.raises)


def _large(contract: Contract, case: Case, dtype: str, cache: Path) -> tuple[dict[str, Any], Cost]:
    """The call of a benchmark, and what it costs: shapes and strides are kept, for to draw its numbers takes long."""
    parts = (contract.inputs, inputs, quant.quantizer, _large)
    made_by = [inspect.getsource(inspect.getmodule(part)) for part in parts]  # type: ignore[arg-type]
    code = zlib.crc32(repr([made_by, case.name, dict(case.args), dtype, torch.__version__]).encode())
    file = cache / "calls" / f"{contract.name}-{code:08x}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn = inputs(contract, case, dtype)
        kept = _with_memory(drawn, "meta"), asdict(contract.cost(drawn, contract.validate(drawn)))
        torch.save(kept, aside := file.with_suffix(f".{os.getpid()}"))
        aside.replace(file)
    call, cost = torch.load(file, weights_only=False)
    return _with_memory(call, "cpu"), Cost(**cost)


def _with_memory(call: dict[str, Any], device: str) -> dict[str, Any]:
    """The call's arrays on memory that nobody has touched, so that it costs nothing; what shared memory still does."""
    memories: dict[int, Any] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        old = value.untyped_storage()
        if old._cdata not in memories:
            memories[old._cdata] = torch.empty(old.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
        fresh = torch.empty(0, dtype=value.dtype, device=device)
        return fresh.set_(memories[old._cdata], value.storage_offset(), value.shape, value.stride())

    return {name: value.map(move) if hasattr(value, "scheme") else move(value) for name, value in call.items()}


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _call(contract: Contract, run: Callable, call: Mapping[str, Any]) -> list[torch.Tensor]:
    """What the call returns."""
    parameters = contract.signature.parameters.values()
    found = run(
        *[call[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY],
        **{p.name: call[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY},
    )
    parts = found if isinstance(found, tuple) else (found,)
    return [part for part in parts if part is not None]


class _Driver:
    """What Triton asks of a device's driver before it compiles."""

    def __init__(self, chip: Chip):
        from triton.backends.compiler import GPUTarget

        self.target, self.number = GPUTarget(chip.vendor, chip.arch, chip.wave), list(CHIPS).index(chip.name)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number  # Triton remembers the compiler of a device by its number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _standing_in(chip: Chip, backend: str) -> Iterator[list[tuple]]:
    """The chip as the device that torch and Triton see; yields the list that launches are written to.

    Each is function, signature, constants, attributes, options, programs.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    noted: list[tuple] = []
    programs = 0
    run = JITFunction.run

    def count(self: Any, *args: Any, grid: tuple[int, ...], **options: Any) -> Any:
        nonlocal programs
        programs = math.prod(grid)
        return run(self, *args, grid=grid, **options)

    def write_down(
        self: Any, key: str, signature: dict, device: int, constants: dict, options: Any, attributes: dict, warmup: bool
    ) -> None:
        noted.append((self, dict(signature), dict(constants), dict(attributes), dict(vars(options)), programs))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", count))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", write_down))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(chip)))
        for name, answer in _told_by_torch(chip).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        stack.enter_context(mock.patch.object(torch.version, "hip", "7.0" if chip.vendor == "hip" else None))
        for forget in _remembered(backend):  # what the backend keeps about the device it saw last
            forget()
        yield noted


@cache
def _told_by_torch(chip: Chip) -> dict[str, Any]:
    """What functions of torch.cuda say of the chip."""
    major, minor = divmod(chip.arch, 10) if isinstance(chip.arch, int) else (int(chip.arch[3:-2], 16), 0)
    properties = SimpleNamespace(
        name=chip.product,
        major=major,
        minor=minor,
        multi_processor_count=chip.units,
        shared_memory_per_block_optin=chip.shared_block,
        shared_memory_per_multiprocessor=chip.shared_unit,
        gcnArchName=chip.name,
        warp_size=chip.wave,
    )
    return {
        "get_device_properties": properties,
        "get_device_capability": (major, minor),
        "get_device_name": chip.product,
        "current_device": None,  # the index of every array's device here
    }


@cache
def _remembered(backend: str) -> list[Callable[[], None]]:
    return [value.cache_clear for module in _modules(backend) for value in vars(module).values() if _is_cache(value)]


def _is_cache(value: Any) -> bool:
    return callable(getattr(value, "cache_clear", None)) and callable(getattr(value, "cache_info", None))


@cache
def _modules(backend: str) -> list[ModuleType]:
    package = import_module(backends()[backend])
    return [import_module(f"{package.__name__}.{file.name}") for file in pkgutil.iter_modules(package.__path__)]


@cache
def _kernels(backend: str) -> dict[str, Any]:
    """Every function that Triton compiles in the backend's files, by file and name."""
    from triton.runtime.jit import JITFunction

    return {
        f"{module.__name__.rpartition('.')[2]}.{value.fn.__name__}": value
        for module in _modules(backend)
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.module == module.__name__
    }


def _called(function: Any) -> set[Any]:
    """The compiled functions that a kernel names."""
    from triton.runtime.jit import JITFunction

    names = vars(inspect.getmodule(function.fn))
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    values = [names.get(name) for name in used]
    return {value for value in values if isinstance(value, JITFunction)}


def _plain(value: Any) -> Any:
    """A constant as a word: dtypes and functions have long reprs."""
    if callable(getattr(value, "fn", None)):
        return value.fn.__name__
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
