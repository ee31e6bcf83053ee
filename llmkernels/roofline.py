"""What this device can do at most, measured; and what a call needs at least, from its contract's cost.

    limits = roofline.measure("cpu")
    limits.seconds(contract.cost(call, sizes), "bfloat16")     no implementation can be faster, caches cold

Roofline model: Williams, Waterman, Patterson 2009, https://doi.org/10.1145/1498765.1498785.
Measured once for a device, a number of threads and a torch version, then kept in the cache folder.
"""

import functools
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkernels import cache_folder
from llmkernels.contract import Cost

NAME = "roofline"
WIDER = {  # what a kernel may compute in instead, where the chip is faster that way: a ceiling must hold for it too
    "float32": ("float32",),
    "bfloat16": ("bfloat16", "float16", "float32"),
    "float16": ("float16", "bfloat16", "float32"),
    "int8": ("int8", "bfloat16", "float16", "float32"),
    "float8_e4m3fn": ("float8_e4m3fn", "bfloat16", "float16", "float32"),
}
ACTIVATION = {"int8": "int8", "fp8": "float8_e4m3fn"}  # a weight scheme's activation -> what the product is done in
CPU_BYTES, GPU_BYTES = 1 << 28, 1 << 31  # larger than any cache
CPU_SIZES, GPU_SIZES = (256, 512, 1024, 2048), (4096, 8192)
TOO_SLOW = 0.25  # seconds: a product this slow is not tried at a larger size


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: name -> bytes per second; rates: dtype -> operations per second (a multiply and an add are two)."""

    device: str
    threads: int | None
    bandwidth: Mapping[str, float]
    rates: Mapping[str, float]
    recorded: str

    @property
    def bytes_per_second(self) -> float:
        return max(self.bandwidth.values())

    def rate(self, dtype: str) -> float:
        """Operations per second a kernel can reach whose inputs are `dtype`."""
        return max(self.rates.get(name, 0.0) for name in WIDER.get(dtype, ("float32",)))

    def seconds(self, cost: Cost, dtype: str) -> float:
        """The least time a call of this cost can take when its data come from memory."""
        return max(cost.bytes / self.bytes_per_second, cost.operations / self.rate(dtype))

    def json(self) -> dict[str, Any]:
        return asdict(self)


def arithmetic(call: Mapping[str, Any], sizes: Mapping[str, Any]) -> str:
    """The dtype a call's products may be done in: T, unless a weight's scheme quantizes the activation too."""
    for value in call.values():
        if activation := getattr(getattr(value, "scheme", None), "activation", None):
            return ACTIVATION[activation]
    return str(sizes["T"])


def device_name(device: str = "cpu") -> str:
    """'NVIDIA H200', or the CPU's model; what results and evidence are filed under."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_model()


@functools.cache
def cpu_model() -> str:
    """The model name the kernel gives, else the architecture; family and model where the name is a generic one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    model = facts.get("model name", platform.machine())
    if not any(letter.isdigit() for letter in model) and "cpu family" in facts:
        model += f" (family {facts['cpu family']}, model {facts['model']})"
    return model


def measure(device: str = "cpu", *, fresh: bool = False, say: Callable[[str], None] = lambda text: None) -> Ceilings:
    """The ceilings of `device`: from the cache, or measured now, which takes some seconds.

    Args:
        fresh: measure again, and raise what the cache knows where more was reached.
        say: told what is being measured.
    """
    import torch

    check_device(device)
    name = device_name(device)
    threads = None if device.startswith("cuda") else torch.get_num_threads()
    key = f"{name} threads={threads} torch={torch.__version__}"
    known = cache_folder.load(NAME)
    if fresh or key not in known:
        best = _gpu_best if device.startswith("cuda") else _cpu_best
        bandwidth = dict(_bandwidth(device, best, say))
        rates = dict(_rates(device, best, say))
        if key in known:  # what was reached once can be reached: a busy machine lowers no ceiling
            bandwidth, rates = _higher(bandwidth, known[key]["bandwidth"]), _higher(rates, known[key]["rates"])
        found = Ceilings(name, threads, bandwidth, rates, time.strftime("%Y-%m-%d"))
        known = cache_folder.load(NAME) | {key: found.json()}
        cache_folder.store(NAME, known)
    return Ceilings(**known[key])


def _higher(new: Mapping[str, float], old: Mapping[str, float]) -> dict[str, float]:
    return {name: max(new.get(name, 0.0), old.get(name, 0.0)) for name in (*old, *new)}


def check_device(device: str) -> None:
    """ValueError unless torch can put a tensor there."""
    import torch

    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return
    if kind != "cuda" or (index and not index.isdigit()):
        raise ValueError(f"device is {device!r}; use 'cpu', 'cuda' or 'cuda:1'")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch {torch.__version__} sees no GPU here; use 'cpu'")
    if int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}; torch sees {torch.cuda.device_count()} GPUs, numbered from 0")


def _bandwidth(device: str, best: Callable, say: Callable[[str], None]) -> Iterator[tuple[str, float]]:
    """Three streams over memory; which of them is fastest differs from chip to chip."""
    import torch

    size = GPU_BYTES if device.startswith("cuda") else CPU_BYTES
    source, target = (torch.full((size // 4,), 1.0, device=device) for _ in range(2))
    for name, moved, run in (
        ("read", size, lambda: source.sum()),
        ("copy", 2 * size, lambda: target.copy_(source)),
        ("update", 3 * size, lambda: target.add_(source)),
    ):
        say(f"memory bandwidth, {name}")
        yield name, moved / best(run)


def _rates(device: str, best: Callable, say: Callable[[str], None]) -> Iterator[tuple[str, float]]:
    """The library's matrix product in each dtype the device has one for, the best over some sizes."""
    import torch

    sizes = GPU_SIZES if device.startswith("cuda") else CPU_SIZES
    for dtype, product in PRODUCTS.items():
        say(f"matrix rate, {dtype}")
        rate = 0.0
        for size in sizes:
            operands = [torch.randn(size, size, device=device) for _ in range(2)]
            try:
                run = product(*operands)
                seconds = best(run)
            except (RuntimeError, NotImplementedError):  # torch has no such product on this device
                break
            rate = max(rate, 2 * size**3 / seconds)
            if seconds > TOO_SLOW / 8:  # the next size takes eight times as long
                break
        if rate:
            yield dtype, rate


def _plain(dtype: str) -> Callable:
    def product(a: Any, b: Any) -> Callable:
        import torch

        a, b = (x.to(getattr(torch, dtype)) for x in (a, b))
        return lambda: a @ b

    return product


def _int8(a: Any, b: Any) -> Callable:
    import torch

    a, b = ((32 * x).clamp(-128, 127).to(torch.int8) for x in (a, b))
    return lambda: torch._int_mm(a, b.t())


def _fp8(a: Any, b: Any) -> Callable:
    import torch

    a, b = (x.to(torch.float8_e4m3fn) for x in (a, b))
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


PRODUCTS: dict[str, Callable] = {
    "float32": _plain("float32"),
    "bfloat16": _plain("bfloat16"),
    "float16": _plain("float16"),
    "int8": _int8,
    "float8_e4m3fn": _fp8,
}


def _cpu_best(run: Callable, budget: float = 0.3) -> float:
    """The shortest of several runs: other programs on the machine only ever make one longer."""
    run()
    times: list[float] = []
    while sum(times) < budget or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if times[0] > TOO_SLOW:
            break
    return min(times)


def _gpu_best(run: Callable, repeats: int = 10) -> float:
    import torch

    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return min(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def with_unit(value: float, unit: str) -> str:
    """1234567.0, 'B/s' -> '1.23 MB/s'; seconds come out as ns, us, ms or s."""
    if value == 0:
        return f"0 {unit}"
    prefixes = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "m": -3, "u": -6, "n": -9}
    exponent = min(max(math.floor(math.log10(abs(value)) / 3) * 3, -9), 15)
    prefix = next(name for name, power in prefixes.items() if power == exponent)
    return f"{value / 10.0**exponent:.3g} {prefix}{unit}"
