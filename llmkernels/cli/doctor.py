"""`llmkernels doctor`: what this machine has, what was built, and why a backend is missing.

It must answer where everything else fails, so each finding is gathered on its own, nothing optional is assumed, and
a plug-in is imported in a process of its own: one that crashes is a line in the report.
"""

import json as json_
import os
import pkgutil
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import llmkernels
from llmkernels import cache_folder, discovery, settings
from llmkernels.cli import app, check_environment
from llmkernels.cli.screen import console, show_json
from llmkernels.roofline import cpu_model

PACKAGES = (
    "torch", "numpy", "triton", "jax", "jaxlib", "libtpu", "torch-xla", "transformers", "safetensors", "tokenizers",
    "typer", "rich", "matplotlib", "pybind11", "onnxruntime", "flashinfer-python",
)  # fmt: skip
ISA = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
PREFIXES = ("LLMKERNELS_", "CUDA_VISIBLE", "CUDA_HOME", "ROCM_HOME", "HIP_VISIBLE", "TRITON_INTERPRET", "JAX_PLATFORMS",
            "OMP_", "PJRT_DEVICE")  # fmt: skip
PLUGIN_SECONDS = 60
TRY_PLUGIN = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from llmkernels import discovery
if not discovery.package(sys.argv[1]).absent():
    for op in json.loads(sys.argv[3]):
        if module := discovery.implementation(sys.argv[1], op):
            lacks = [name for name in ("run", "refuse") if not hasattr(module, name)]
            assert not lacks, f"{module.__name__} lacks {' and '.join(lacks)}"
"""


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Examine this machine: versions, chips, backends, plug-ins, what was built, caches, the environment."""
    facts = examine()
    if json:
        show_json(facts)
    else:
        _show(facts)


def examine() -> dict[str, Any]:
    """Everything `doctor --json` prints."""
    problems: list[str] = []
    facts = {
        "version": llmkernels.__version__,
        "python": {"version": platform.python_version(), "platform": platform.platform(), "executable": sys.executable},
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "isa": _isa()},
        "gpus": _gpus(problems),
        "backends": _backends(problems),
        "plugins": _plugins(problems),
        "build": _build(),
        "cache": _cache(problems),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES)},
    }
    try:
        check_environment()
    except ValueError as error:
        problems.append(str(error))
    return facts | {"problems": problems}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _isa() -> list[str]:
    """The instruction sets that kernels here may choose between, as the operating system names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return []
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(line[1].split()) if line else set()
    return [name for name in ISA if name in flags]


def _gpus(problems: list[str]) -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its own libraries is missing
        if not isinstance(error, ModuleNotFoundError):
            problems.append(f"torch cannot be imported: {error}; reinstall it")
        return []
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        chip = torch.cuda.get_device_properties(index)
        kind = getattr(chip, "gcnArchName", "") if torch.version.hip else f"sm_{chip.major}{chip.minor}"
        found.append(
            {
                "name": chip.name,
                "kind": kind,
                "memory_bytes": chip.total_memory,
                "multiprocessors": chip.multi_processor_count,
            }
        )
    return found


def _backends(problems: list[str]) -> list[dict[str, Any]]:
    try:
        names = discovery.backends()
    except ValueError as error:
        problems.append(str(error))
        return []
    plugins = {point.name for point in metadata.entry_points(group="llmkernels.backends")}
    return [_backend(name, module) for name, module in names.items() if name not in plugins] + [
        {"backend": discovery.REFERENCE, "package": "llmkernels.ops", "available": True, "reason": None,
         "kernels": _ops(), "native": False, "isa": None, "emulation": None}
    ]  # fmt: skip


def _backend(name: str, module: str) -> dict[str, Any]:
    why = discovery.absent(name)
    package = sys.modules.get(module)  # absent() imported it, if it can be imported
    return {
        "backend": name,
        "package": module,
        "available": why is None,
        "reason": why and {"code": why.code, "reason": why.reason, "fix": why.fix},
        "kernels": _files(package.__path__) if package else [],
        "native": bool(getattr(package, "NATIVE", False)),
        "isa": None if why else _kernels_isa(package),
        "emulation": getattr(package, "EMULATION", None),
    }


def _kernels_isa(package: Any) -> str | None:
    """The instruction set a backend's kernels use here, or its complaint about the one that was asked for."""
    if not hasattr(package, "isa"):
        return None
    try:
        return str(package.isa())
    except ValueError as error:
        return str(error)


def _ops() -> list[str]:
    """The ops by their file names, since importing them takes torch."""
    place = Path(llmkernels.__file__).parent / "ops"
    return sorted(f.stem for f in place.glob("[a-z]*.py") if "@op(" in f.read_text())


def _files(path: Any) -> list[str]:
    return sorted({module.name for module in pkgutil.iter_modules(path)} & set(_ops()))


def _plugins(problems: list[str]) -> list[dict[str, Any]]:
    found = []
    for point in metadata.entry_points(group="llmkernels.backends"):
        problem = _try_plugin(point.name)
        if problem:
            problems.append(f"the plug-in {point.name} ({point.value}) fails: {problem}")
        found.append(
            {
                "backend": point.name,
                "package": point.value,
                "distribution": point.dist and point.dist.name,
                "problem": problem,
            }
        )
    return found


def _try_plugin(name: str) -> str | None:
    """What goes wrong when a plug-in and its kernels are imported; None if nothing does."""
    command = [sys.executable, "-c", TRY_PLUGIN, name, json_.dumps(sys.path), json_.dumps(_ops())]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=PLUGIN_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"importing it took more than {PLUGIN_SECONDS} s"
    if tried.returncode == 0:
        return None
    lines = tried.stderr.strip().splitlines()
    return lines[-1] if lines else f"the import ended with code {tried.returncode}"


def _build() -> dict[str, Any] | None:
    """What setup.py compiled and what it skipped, and why; None in a tree that was never built."""
    try:
        return json_.loads((Path(llmkernels.__file__).parent / "_build.json").read_text())
    except FileNotFoundError:
        return None


def _cache(problems: list[str]) -> dict[str, Any]:
    try:
        folder = cache_folder.folder()
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return {"folder": None, "files": {}}
    return {
        "folder": str(folder),
        "files": {f.name: f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()},
    }


def _show(facts: dict[str, Any]) -> None:
    screen = console()

    def line(name: str, text: str, style: str = "") -> None:
        screen.print(f"{name:12} {text}", markup=False, style=style, soft_wrap=True)

    line("llmkernels", facts["version"], "bold")
    line("python", f"{facts['python']['version']} on {facts['python']['platform']}")
    line("installed", ", ".join(f"{name} {v}" for name, v in facts["versions"].items() if v) or "nothing else")
    line("missing", ", ".join(name for name, v in facts["versions"].items() if not v), "dim")
    line("cpu", f"{facts['cpu']['model']}, {facts['cpu']['cores']} cores: {' '.join(facts['cpu']['isa'])}")
    for gpu in facts["gpus"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        line("gpu", f"{gpu['name']} ({gpu['kind']}), {memory}, {gpu['multiprocessors']} multiprocessors")
    if not facts["gpus"]:
        line("gpu", "none that torch sees", "dim")
    screen.print()
    for b in facts["backends"]:
        state = "ready" if b["available"] else f"{b['reason']['code']}: {b['reason']['reason']}; {b['reason']['fix']}"
        of = f"{len(b['kernels'])} ops" + (f", {b['isa']}" if b["isa"] else "")
        line(b["backend"], f"{state}  ({of})", "green" if b["available"] else "yellow")
    for p in facts["plugins"]:
        line(p["backend"], f"plug-in {p['package']}: {p['problem'] or 'loads'}", "red" if p["problem"] else "green")
    screen.print()
    if not facts["build"]:
        line("build", "this tree was not built; run pip install . for the compiled kernels", "dim")
    for name, part in (facts["build"] or {"backends": {}})["backends"].items():
        told = "compiled" if part["built"] else f"not compiled: {part['why']}; {part['fix']}"
        line("build", f"{name}: {told}", "green" if part["built"] else "dim")
    line("cache", f"{facts['cache']['folder']}: {', '.join(facts['cache']['files']) or 'empty'}")
    line("environment", " ".join(f"{k}={v}" for k, v in facts["environment"].items()) or "nothing set")
    line("policy", _policy())
    for problem in facts["problems"]:
        line("problem", problem, "bold red")


def _policy() -> str:
    try:
        return settings.environment().policy
    except ValueError:
        return "unknown"
