"""Builds llmkernels: the Python part always, each native backend where this machine has a compiler for it.

    csrc/<backend>/*.cpp *.cu *.hip   ->   llmkernels/backends/<backend>/_native.<abi>.so
    csrc/hip/<name>.hip               ->   llmkernels/backends/hip/<name>.<chip>.co, loaded at run time: no ROCm to link

The folder is the list of sources.  One that needs flags of its own, say for an instruction set, opens with a line

    // flags x86_64: -mavx2 -mfma          on that machine only; "// flags: ..." on every one

A backend that cannot be built is skipped and the rest is installed.  Because pip hides what a build prints, what
happened is written to llmkernels/_build.json, which `llmkernels doctor` reads.

    LLMKERNELS_BUILD   auto (default), none, or names, as in cpu,cuda: exactly these, and then a failure is an error
    LLMKERNELS_ARCHS   the GPUs to compile for, as in "90a" or "80;90a;gfx942"
    CXX, CUDA_HOME, HIPCXX, MAX_JOBS   compilers, and how many of them run at once
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Distribution, find_namespace_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("LLMKERNELS_BUILD", "auto").lower().replace(" ", "") or "auto"
NATIVE = ("cpu", "cuda", "hip")
ARCHS = "80;89;90a;100f;120f+PTX;gfx90a;gfx942;gfx950"  # 80 covers 86, 100f covers 103
MODULE = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
COMMON = "-std=c++17 -O3 $includes $flags -MD -MF $out.d -c $in -o $out"


class Skip(Exception):
    """Why a backend is not built, and what would change that."""

    def __init__(self, why: str, fix: str):
        super().__init__(why, fix)
        self.why, self.fix = why, fix

    def unless(self, demanded: bool, backend: str) -> "Skip":
        if demanded:
            raise SystemExit(f"LLMKERNELS_BUILD={MODE} asks for {backend}, but {self.why}; {self.fix}")
        return self


@dataclass(frozen=True)
class Toolchain:
    """How one backend is compiled: for each suffix the command that compiles $in to $out; the command that links."""

    compiler: str
    rules: dict[str, str]
    link: str
    archs: tuple[str, ...] = ()


def toolchain(backend: str) -> Toolchain:
    """The compilers of `backend`; Skip where one of them is missing."""
    archs = [arch for arch in re.split(r"[;, ]+", os.environ.get("LLMKERNELS_ARCHS") or ARCHS) if arch]
    cxx = find("a C++ compiler", "g++, or set CXX", os.environ.get("CXX"), "g++", "clang++", "c++")
    host = f"{cxx} -fPIC -fvisibility=hidden {COMMON}"
    if backend == "cpu":
        return Toolchain(cxx, {".cpp": f"{host} -fopenmp"}, f"{cxx} -shared -fopenmp $in -o $out")
    if backend == "cuda":
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        nvcc = find("nvcc", "the CUDA toolkit, or set CUDA_HOME", f"{home}/bin/nvcc", "nvcc")
        chips = tuple(arch for arch in archs if not arch.startswith("gfx"))
        bind = f"{nvcc} -ccbin {cxx} -Xcompiler -fPIC,-fvisibility=hidden {COMMON}"
        device = f"{bind} --expt-relaxed-constexpr --compress-mode=size {' '.join(map(gencode, chips))}"
        return Toolchain(nvcc, {".cu": device, ".cpp": bind}, f"{nvcc} -shared -cudart static $in -o $out", chips)
    places = (os.environ.get("HIPCXX"), "clang++-22", "amdclang++", "/opt/rocm/llvm/bin/clang++")
    clang = find("clang for AMD GPUs", "clang-22 and lld-22, or set HIPCXX", *places)
    chips = tuple(arch for arch in archs if arch.startswith("gfx"))
    device = f"{clang} -x hip --offload-arch=$arch --cuda-device-only --no-gpu-bundle-output -nogpuinc -nogpulib"
    rules = {".hip": f"{device} -fms-extensions {COMMON}", ".cpp": host}
    return Toolchain(clang, rules, f"{cxx} -shared $in -ldl -o $out", chips)


def find(what: str, install: str, *places: str | None) -> str:
    """The first of these commands that exists."""
    for place in places:
        if place and shutil.which(shlex.split(place)[0]):
            return place
    raise Skip(f"there is no {what.removeprefix('a ')}", f"install {install}")


def gencode(arch: str) -> str:
    """nvcc's option for '90a', or for '120f+PTX', which carries code that later chips can still translate."""
    chip, plus, _ = arch.partition("+")
    forward = f" -gencode=arch=compute_{chip.rstrip('af')},code=compute_{chip.rstrip('af')}"
    return f"-gencode=arch=compute_{chip},code=sm_{chip}" + (forward if plus else "")


def sources(backend: str) -> list[Path]:
    return sorted(path for path in (ROOT / "csrc" / backend).glob("*") if path.suffix in (".cpp", ".cu", ".hip"))


def plan() -> dict[str, Toolchain | Skip]:
    """What to do about each native backend, by what was asked for, what lies in csrc/, and what compilers there are."""
    asked = NATIVE if MODE == "auto" else () if MODE == "none" else tuple(MODE.split(","))
    if unknown := set(asked) - set(NATIVE):
        raise SystemExit(f"LLMKERNELS_BUILD names {', '.join(unknown)}; use auto, none, or some of {','.join(NATIVE)}")
    steps: dict[str, Toolchain | Skip] = {}
    for name in NATIVE:
        try:
            if name not in asked:
                raise Skip(f"LLMKERNELS_BUILD={MODE}", f"install again with LLMKERNELS_BUILD=auto or {name}")
            if not sources(name):
                raise Skip(f"csrc/{name} holds no sources", "use another backend")
            steps[name] = toolchain(name)
        except Skip as skip:
            steps[name] = skip.unless(MODE != "auto" and name in asked, name)
    return steps


class BuildNative(Command):
    """Compiles what is planned, puts it beside the Python of its backend, and reports."""

    description = "compile csrc/ into llmkernels/backends/"
    user_options: ClassVar = [("editable-mode", "e", "put what is built into the source tree")]
    boolean_options: ClassVar = ["editable-mode"]

    def initialize_options(self) -> None:
        self.editable_mode = False
        self.build_lib: Any = None
        self.written: list[Path] = []

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        report = {name: self.attempt(name, step) for name, step in PLAN.items()}
        facts = {"python": platform.python_version(), "backends": report}
        self.write("llmkernels/_build.json", json.dumps(facts, indent=2).encode() + b"\n")
        for name, row in report.items():
            print(f"llmkernels: {name}:", "built" if row["built"] else f"skipped: {row['why']}; {row['fix']}")

    def attempt(self, name: str, step: Toolchain | Skip) -> dict[str, Any]:
        """Build one backend; where that fails it is skipped, unless it was asked for by name."""
        folder = f"llmkernels/backends/{name}"
        for old in [*self.place(folder).glob(MODULE), *self.place(folder).glob("*.co")]:
            old.unlink()
        start = time.monotonic()
        try:
            if isinstance(step, Skip):
                raise step
            for product in ninja(name, step):
                self.write(f"{folder}/{product.name}", product.read_bytes())
        except Skip as skip:
            skip.unless(isinstance(step, Toolchain) and MODE != "auto", name)
            return {"built": False, "why": skip.why, "fix": skip.fix}
        seconds = round(time.monotonic() - start, 1)
        return {"built": True, "compiler": step.compiler, "archs": list(step.archs), "seconds": seconds}

    def place(self, path: str) -> Path:
        """Where a file of the package goes: into the build, or for an editable install into the source tree."""
        return ROOT / path.replace("llmkernels/b", "b") if self.editable_mode else Path(self.build_lib, path)

    def write(self, path: str, content: bytes) -> None:
        self.place(path).parent.mkdir(parents=True, exist_ok=True)
        self.place(path).write_bytes(content)
        self.written.append(self.place(path))

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [str(path) for path in self.written]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]


def ninja(backend: str, tools: Toolchain) -> list[Path]:
    """Compile what changed in csrc/<backend>, and return what an install needs; Skip says what the compiler said."""
    try:
        import pybind11
        from ninja import BIN_DIR
    except ImportError as error:
        raise Skip(f"{error.name} is not installed", "install without --no-build-isolation") from None
    folder = ROOT / "build" / f"{backend}-{sysconfig.get_config_var('SOABI')}"
    folder.mkdir(parents=True, exist_ok=True)
    include = [ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
    lines = [
        "includes = " + " ".join(shlex.quote(f"-I{path}") for path in include),
        "rule link",
        f"  command = {tools.link}",
    ]
    for suffix, command in tools.rules.items():
        lines += [f"rule {suffix[1:]}", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]
        lines += ["  description = compile $in $arch"]
    objects: list[str] = []
    code: list[Path] = []
    for path in sources(backend):
        if path.suffix not in tools.rules:
            raise Skip(f"csrc/{backend}/{path.name}: no compiler for {path.suffix} here", "move it")
        for arch in tools.archs if path.suffix == ".hip" else ("",):
            out = folder / (f"{path.stem}.{arch}.co" if arch else f"{path.name}.o")
            code += [out] if arch else []
            objects += [] if arch else [escaped(out)]
            lines += [
                f"build {escaped(out)}: {path.suffix[1:]} {escaped(path)}",
                f"  flags = {flags(path)}",
                f"  arch = {arch}",
            ]
    module = folder / MODULE
    lines += [f"build {escaped(module)}: link {' '.join(objects)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command_line = [os.path.join(BIN_DIR, "ninja"), "-C", str(folder), *jobs]
    said = []
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            said.append(line.strip())
    if process.returncode:
        why = next((line for line in said if "error" in line), said[-1])
        raise Skip(f"{tools.compiler} failed: {why}", "install with pip -v to read all it says")
    return [module, *code]


def escaped(path: Path) -> str:
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def flags(path: Path) -> str:
    """What the `// flags` lines at the top of a source ask for on this machine."""
    lines = re.findall(r"^// flags ?(\w*): *(.+)$", path.read_text()[:4000], re.MULTILINE)
    return " ".join(options for machine, options in lines if machine in ("", platform.machine()))


def packages(name: str, folder: str) -> list[str]:
    inner = find_namespace_packages(str(ROOT / folder), exclude=["*__pycache__*", "*-*"])  # models/*-* hold data only
    return [name, *(f"{name}.{package}" for package in inner)]


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class Platform(Distribution):
    def has_ext_modules(self) -> bool:  # decides whether a wheel is named after this platform
        return any(isinstance(step, Toolchain) for step in PLAN.values())


PLAN = plan()

if __name__ == "__main__":
    setup(
        distclass=Platform,
        cmdclass={"build": Build, "build_native": BuildNative},
        packages=packages("llmkernels", "llmkernels") + packages("llmkernels.backends", "backends"),
        package_dir={"llmkernels": "llmkernels", "llmkernels.backends": "backends"},
    )
