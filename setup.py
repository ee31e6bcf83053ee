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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
NATIVE = ("cpu", "cuda", "hip")
ARCHS = "80;89;90a;100f;120f+PTX;gfx90a;gfx942;gfx950"  # 80 covers 86, 100f covers 103
HOST = "-std=c++17 -O3 -fPIC -fvisibility=hidden"


class Skip(Exception):
    """Why a backend is not built (the first argument), and what would change that (the second)."""


@dataclass(frozen=True)
class Toolchain:
    """How one backend is compiled: suffix -> command for one source, the command that links, and the chips."""

    compiler: str
    rules: dict[str, str]
    link: str
    archs: tuple[str, ...] = ()


def toolchain(backend: str) -> Toolchain:
    """The compilers of `backend`; Skip where one of them is missing."""
    archs = [arch for arch in re.split(r"[;, ]+", os.environ.get("LLMKERNELS_ARCHS", ARCHS)) if arch]
    cxx = _find("a C++ compiler", "g++, or set CXX", os.environ.get("CXX"), "g++", "clang++", "c++")
    host = f"{cxx} {HOST} $include $flags -MD -MF $out.d -c $in -o $out"
    if backend == "cpu":
        return Toolchain(cxx, {".cpp": f"{host} -fopenmp"}, f"{cxx} -shared -fopenmp $in -o $out")
    if backend == "cuda":
        home = os.environ.get("CUDA_HOME")
        nvcc = _find(
            "nvcc",
            "the CUDA toolkit, or set CUDA_HOME",
            home and f"{home}/bin/nvcc",
            "nvcc",
            "/usr/local/cuda/bin/nvcc",
        )
        archs = [arch for arch in archs if not arch.startswith("gfx")]
        device = (
            f"{nvcc} -std=c++17 -O3 --expt-relaxed-constexpr --compress-mode=size -Xcompiler -fPIC,-fvisibility=hidden"
        )
        device += f" {' '.join(_gencodes(archs))} $include $flags -MD -MF $out.d -c $in -o $out"
        bind = (
            f"{nvcc} -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden $include $flags -MD -MF $out.d -c $in -o $out"
        )
        return Toolchain(
            nvcc, {".cu": device, ".cpp": bind}, f"{nvcc} -shared -cudart static $in -o $out", tuple(archs)
        )
    places = (os.environ.get("HIPCXX"), "clang++-22", "amdclang++", "/opt/rocm/llvm/bin/clang++")
    clang = _find("clang with AMD targets", "clang-22 and lld-22, or set HIPCXX", *places)
    device = f"{clang} -x hip --offload-arch=$arch --cuda-device-only --no-gpu-bundle-output -nogpuinc -nogpulib"
    device += " -fms-extensions -std=c++17 -O3 $include $flags -MD -MF $out.d -c $in -o $out"
    chips = tuple(arch for arch in archs if arch.startswith("gfx"))
    return Toolchain(clang, {".hip": device, ".cpp": host}, f"{cxx} -shared $in -ldl -o $out", chips)


def sources(backend: str) -> list[Path]:
    return sorted(path for path in (ROOT / "csrc" / backend).glob("*") if path.suffix in (".cpp", ".cu", ".hip"))


def plan() -> dict[str, Toolchain | Skip]:
    """What to do about each native backend, by what was asked for, what lies in csrc/, and what compilers there are."""
    mode = os.environ.get("LLMKERNELS_BUILD", "auto").lower()
    asked = set(NATIVE) if mode == "auto" else set() if mode == "none" else {name.strip() for name in mode.split(",")}
    if unknown := asked - set(NATIVE):
        raise SystemExit(
            f"LLMKERNELS_BUILD names {', '.join(sorted(unknown))}; use auto, none, or some of {','.join(NATIVE)}"
        )
    steps: dict[str, Toolchain | Skip] = {}
    for name in NATIVE:
        try:
            if name not in asked:
                raise Skip(f"LLMKERNELS_BUILD={mode}", f"install again with LLMKERNELS_BUILD=auto or {name}")
            if not sources(name):
                raise Skip(f"csrc/{name} holds no sources", "use another backend")
            steps[name] = toolchain(name)
        except Skip as skip:
            if mode != "auto" and name in asked:
                raise SystemExit(f"LLMKERNELS_BUILD={mode}: {name}: {skip.args[0]}; {skip.args[1]}") from None
            steps[name] = skip
    return steps


class BuildNative(Command):
    """Runs ninja for each planned backend, and reports."""

    description = "compile csrc/ into llmkernels/backends/"
    user_options: list[tuple[str, str | None, str]] = []
    editable_mode: bool
    build_lib: str

    def initialize_options(self) -> None:
        self.editable_mode, self.build_lib, self.written = False, "", []

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        report = {name: self.attempt(name, step) for name, step in PLAN.items()}
        path = self.place("llmkernels/_build.json")
        path.write_text(json.dumps({"python": platform.python_version(), "backends": report}, indent=2) + "\n")
        for name, row in report.items():
            print(
                f"llmkernels: {name} "
                + (f"built in {row['seconds']} s" if row["built"] else f"skipped: {row['why']}; {row['fix']}")
            )

    def attempt(self, name: str, step: Toolchain | Skip) -> dict[str, Any]:
        """Build one backend; a failure is a row of the report, and an error only where the backend was asked for by name."""
        package = f"llmkernels/backends/{name}"
        for stale in [*self.place(package).glob("_native*.so"), *self.place(package).glob("*.co")]:
            stale.unlink()
        start = time.monotonic()
        try:
            if isinstance(step, Skip):
                raise step
            ninja(name, step, self.place(f"{package}/_native{sysconfig.get_config_var('EXT_SUFFIX')}"))
        except Skip as skip:
            if isinstance(step, Toolchain) and os.environ.get("LLMKERNELS_BUILD", "auto") != "auto":
                raise SystemExit(f"{name} was asked for and not built: {skip.args[0]}") from None
            return {"built": False, "why": skip.args[0], "fix": skip.args[1]}
        self.written += [path for path in self.place(package).iterdir() if path.suffix in (".so", ".co")]
        seconds = round(time.monotonic() - start, 1)
        return {"built": True, "compiler": step.compiler, "archs": list(step.archs), "seconds": seconds}

    def place(self, path: str) -> Path:
        """Where a file of the package goes: into the build folder, or, for an editable install, into the source tree."""
        if self.editable_mode:
            return ROOT / path.replace("llmkernels/backends", "backends", 1)
        place = Path(self.build_lib, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def get_outputs(self) -> list[str]:
        return (
            [] if self.editable_mode else [str(path) for path in (*self.written, self.place("llmkernels/_build.json"))]
        )

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]


def ninja(backend: str, tools: Toolchain, target: Path) -> None:
    """Compile csrc/<backend> into `target`, again only what changed; Skip with the compiler's complaint where it fails."""
    import pybind11
    from ninja import BIN_DIR, Writer

    folder = ROOT / "build" / f"{backend}-{sysconfig.get_config_var('SOABI')}"
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    include = [ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
    with open(folder / "build.ninja", "w") as file:
        script = Writer(file, width=10**6)
        script.variable("include", " ".join(shlex.quote(f"-I{path}") for path in include))
        for suffix, command in tools.rules.items():
            script.rule(suffix[1:], command, description="compile $in $arch", depfile="$out.d", deps="gcc")
        script.rule("link", tools.link, description="link $out")
        objects = []
        for path in sources(backend):
            if path.suffix not in tools.rules:
                raise Skip(f"{path.relative_to(ROOT)}: {backend} has no compiler for {path.suffix}", "move it")
            for arch in tools.archs if path.suffix == ".hip" else ("",):
                out = target.with_name(f"{path.stem}.{arch}.co") if arch else folder / f"{path.name}.o"
                objects += [] if arch else [str(out)]
                script.build(
                    str(out), path.suffix[1:], str(path), variables={"flags": " ".join(_flags(path)), "arch": arch}
                )
        script.build(str(target), "link", objects)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [Path(BIN_DIR, "ninja"), "-C", folder, *jobs]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            said.append(line.strip())
    if process.returncode:
        why = next((line for line in said if "error" in line.lower()), said[-1] if said else "ninja said nothing")
        raise Skip(f"{tools.compiler} failed: {why}", "install with pip -v and read what it says")


def _find(what: str, fix: str, *places: str | None) -> str:
    for place in places:
        if place and shutil.which(shlex.split(place)[0]):
            return place
    raise Skip(f"no {what.removeprefix('a ')} was found", f"install {fix}")


def _gencodes(archs: list[str]) -> Iterator[str]:
    for arch in archs:
        name = arch.removesuffix("+PTX")
        yield f"-gencode=arch=compute_{name},code=sm_{name}"
        if arch.endswith("+PTX"):
            yield f"-gencode=arch=compute_{name.rstrip('af')},code=compute_{name.rstrip('af')}"


def _flags(path: Path) -> list[str]:
    """What the `// flags` lines at the top of a source ask for on this machine."""
    lines = re.findall(r"^// flags ?(\w*): *(.+)$", path.read_text()[:4000], re.MULTILINE)
    return [flags for machine, flags in lines if machine in ("", platform.machine())]


PLAN: dict[str, Toolchain | Skip] = plan()


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class Platform(Distribution):
    def has_ext_modules(self) -> bool:  # decides whether a wheel is named after this platform
        return any(isinstance(step, Toolchain) for step in PLAN.values())


if __name__ == "__main__":
    setup(
        distclass=Platform,
        cmdclass={"build": Build, "build_native": BuildNative},
        packages=[
            *("llmkernels", *(f"llmkernels.{name}" for name in find_packages(str(ROOT / "llmkernels")))),
            *(
                "llmkernels.backends",
                *(f"llmkernels.backends.{name}" for name in find_packages(str(ROOT / "backends"))),
            ),
        ],
        package_dir={"llmkernels": "llmkernels", "llmkernels.backends": "backends"},
    )
