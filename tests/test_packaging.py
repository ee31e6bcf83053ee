"""The build, in a scratch copy of this tree with small native sources: what it makes, what it skips and says."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
NO_CUDA = {"CUDA_HOME": "/nonexistent", "HIPCXX": "/nonexistent/clang++"}
KEEP = (
    "setup.py",
    "pyproject.toml",
    "constraints.txt",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "llmkernels",
    "backends",
)
IGNORE = shutil.ignore_patterns("__pycache__", "*.so", "*.co", "_build.json", "models")

CPU = {
    "bind.cpp": """
        #include <pybind11/pybind11.h>
        int twice_portable(int x);
        int twice_wide(int x);
        PYBIND11_MODULE(_native, m) { m.def("portable", &twice_portable); m.def("wide", &twice_wide); }
    """,
    "portable.cpp": """
        #ifdef __AVX2__
        #error flags of another source
        #endif
        int twice_portable(int x) { return 2 * x; }
    """,
    "wide.cpp": """
        // flags x86_64: -mavx2
        // flags: -DSIZE=2
        #if defined(__x86_64__) && !defined(__AVX2__)
        #error flags were not read
        #endif
        int twice_wide(int x) { return SIZE * x; }
    """,
}
CUDA = {
    "bind.cpp": """
        #include <pybind11/pybind11.h>
        int fill();
        PYBIND11_MODULE(_native, m) { m.def("fill", &fill); }
    """,
    "fill.cu": """
        __global__ void ones(float* p) { p[threadIdx.x] = 1.0f; }
        int fill() { float* p = nullptr; cudaMalloc(&p, 128); ones<<<1, 32>>>(p); return cudaGetLastError(); }
    """,
}


class Tree:
    """A copy of this project in a folder whose name has a space in it, and what is built from it."""

    def __init__(self, folder: Path):
        self.root, self.out = folder / "a project", folder / "out"
        self.root.mkdir()
        for name in KEEP:
            source, target = ROOT / name, self.root / name
            shutil.copytree(source, target, ignore=IGNORE) if source.is_dir() else shutil.copy(source, target)
        for backend in ("cpu", "cuda", "hip"):  # none but the scratch sources
            shutil.rmtree(self.root / "backends" / backend, ignore_errors=True)

    def add(self, backend: str, sources: dict[str, str]) -> None:
        (self.root / "backends" / backend).mkdir()
        (self.root / "backends" / backend / "__init__.py").touch()
        for name, text in sources.items():
            path = self.root / "csrc" / backend / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(re.sub(r"^ {8}", "", text.lstrip("\n"), flags=re.MULTILINE))

    def pip(self, *arguments: object, succeeds: bool = True, **environment: str) -> str:
        """Run pip, offline and without isolation: what builds is what is installed here."""
        command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "--no-build-isolation"]
        variables = {k: v for k, v in os.environ.items() if not k.startswith("LLMKERNELS_")} | environment
        done = subprocess.run([*command, "-v"], env=variables, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert (done.returncode == 0) is succeeds, said
        return said

    def wheel(self, source: Path | None = None, **environment: str) -> Path:
        shutil.rmtree(self.out, ignore_errors=True)
        self.pip("wheel", "-w", self.out, source or self.root, **environment)
        (wheel,) = self.out.glob("*.whl")
        return wheel

    def install(self, wheel: Path) -> Path:
        self.pip("install", "--target", site := self.out / "site", wheel)
        return site


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def report_of(wheel: Path) -> dict:
    return json.loads(zipfile.ZipFile(wheel).read("llmkernels/_build.json"))["backends"]


def run(program: str, site: Path, cwd: Path) -> str:
    """What a Python says that has this folder among its installed packages."""
    program = f"import site; site.addsitedir({str(site)!r})\n{program}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


USE_CPU = "from llmkernels.backends.cpu import _native as n; print(n.portable(2), n.wide(3))"


def test_no_compiler(tree, tmp_path):
    """Python alone makes a pure wheel, and the report says what was missing for each backend."""
    tree.add("cpu", CPU)
    tree.add("cuda", CUDA)
    wheel = tree.wheel(PATH=str(tmp_path / "empty"), CXX="", **NO_CUDA)
    assert wheel.name.endswith("-py3-none-any.whl")
    report = report_of(wheel)
    assert not any(row["built"] for row in report.values())
    for name in ("cpu", "cuda"):
        assert report[name] == {"built": False, "why": "there is no C++ compiler", "fix": "install g++, or set CXX"}
    assert report["hip"]["why"] == "csrc/hip holds no sources"
    site = tree.install(wheel)
    assert run("import llmkernels; print(llmkernels.__file__)", site, tmp_path).startswith(str(site))
    assert run("import llmkernels.backends as b; print(b.__file__)", site, tmp_path).startswith(str(site))


def test_a_host_compiler(tree, tmp_path):
    tree.add("cpu", CPU)
    tree.add("cuda", CUDA)
    without_nvcc = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "nvcc").exists()]
    wheel = tree.wheel(PATH=os.pathsep.join(without_nvcc), **NO_CUDA)
    assert "none-any" not in wheel.name
    report = report_of(wheel)
    assert report["cpu"]["built"]
    assert report["cuda"]["why"] == "there is no nvcc"
    assert "CUDA_HOME" in report["cuda"]["fix"]
    site = tree.install(wheel)
    assert run(USE_CPU, site, tmp_path) == "4 6"
    # In the source tree Python finds that first: its Python works, though nothing was built in it.
    where = run("import llmkernels.backends.cpu as b; print(b.__file__)", site, tree.root)
    assert where == str(tree.root / "backends" / "cpu" / "__init__.py")


@pytest.mark.skipif(not NVCC, reason="there is no nvcc here")
def test_nvcc(tree, tmp_path):
    tree.add("cuda", CUDA)
    wheel = tree.wheel(LLMKERNELS_ARCHS="90a;120f+PTX;gfx942")
    row = report_of(wheel)["cuda"]
    assert row["built"]
    assert row["archs"] == ["90a", "120f+PTX"]
    site = tree.install(wheel)  # without a driver it is imported all the same, and a call returns CUDA's error
    assert int(run("from llmkernels.backends.cuda import _native as n; print(n.fill())", site, tmp_path)) >= 0


def test_a_source_that_does_not_compile(tree):
    """It costs that backend, never the install; asked for by name, it is an error."""
    tree.add("cpu", CPU | {"broken.cpp": "int broken( { return 1; }\n"})
    row = report_of(tree.wheel(**NO_CUDA))["cpu"]
    assert not row["built"]
    assert "broken.cpp:1" in row["why"]
    assert "error" in row["why"]
    said = tree.pip("wheel", "-w", tree.out, tree.root, succeeds=False, LLMKERNELS_BUILD="cpu")
    assert "LLMKERNELS_BUILD=cpu asks for cpu, but" in said


def test_what_to_build_is_a_choice(tree):
    tree.add("cpu", CPU)
    wheel = tree.wheel(LLMKERNELS_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert report_of(wheel)["cpu"]["why"] == "LLMKERNELS_BUILD=none"
    said = tree.pip("wheel", "-w", tree.out, tree.root, succeeds=False, LLMKERNELS_BUILD="gpu")
    assert "LLMKERNELS_BUILD names gpu; use auto, none, or some of cpu,cuda,hip" in said
    said = tree.pip("wheel", "-w", tree.out, tree.root, succeeds=False, LLMKERNELS_BUILD="cpu,hip")
    assert "LLMKERNELS_BUILD=cpu,hip asks for hip, but csrc/hip holds no sources" in said


def test_editable(tree, tmp_path):
    tree.add("cpu", CPU)
    install = ("install", "--target", tmp_path / "site", "-e", tree.root)
    tree.pip(*install, **NO_CUDA)
    assert run("import llmkernels; print(llmkernels.__file__)", tmp_path / "site", tmp_path).startswith(str(tree.root))
    assert run(USE_CPU, tmp_path / "site", tmp_path) == "4 6"
    assert json.loads((tree.root / "llmkernels" / "_build.json").read_text())["backends"]["cpu"]["built"]
    (tree.root / "csrc" / "cpu" / "portable.cpp").write_text("int twice_portable(int x) { return 2 * x + 1; }\n")
    said = tree.pip(*install, "--upgrade", **NO_CUDA)
    assert "[1/2]" in said  # the source that changed, and the link: nothing else
    assert run(USE_CPU, tmp_path / "site", tmp_path) == "5 6"
    tree.pip(*install, "--upgrade", LLMKERNELS_BUILD="none")
    assert not list((tree.root / "backends" / "cpu").glob("_native*")), "what was not built must not be found"


def test_sdist(tree):
    """An sdist holds the sources and nothing built, and a wheel can be made from it."""
    tree.add("cpu", CPU)
    (tree.root / "backends" / "cpu" / "_native.so").touch()
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tree.out)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=tree.root, check=True, capture_output=True)
    (sdist,) = tree.out.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tree.out)
    (unpacked,) = (folder for folder in tree.out.iterdir() if folder.is_dir())
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {"setup.py", "LICENSE", "constraints.txt", "csrc/cpu/wide.cpp", "backends/__init__.py"} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc", "_build.json"))]
    shutil.move(sdist, tree.root.parent / sdist.name)
    assert report_of(tree.wheel(tree.root.parent / sdist.name, **NO_CUDA))["cpu"]["built"]


def test_the_wheel_holds_the_package(tree):
    """Every file under llmkernels/ and backends/, the license, the command; and nothing of the tests."""
    shutil.copytree(ROOT / "llmkernels" / "models", tree.root / "llmkernels" / "models", ignore=IGNORE)
    wheel = zipfile.ZipFile(tree.wheel(LLMKERNELS_BUILD="none"))
    names = set(wheel.namelist())
    files = {path for name in ("llmkernels", "backends") for path in (tree.root / name).rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(tree.root)).replace("backends/", "llmkernels/backends/", 1) for path in files}
    assert wanted - names == set()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"llmkernels"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (facts,) = (wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert message_from_string(facts)["License-Expression"] == "Apache-2.0"
    (points,) = (wheel.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "llmkernels = llmkernels.cli:main" in points


def requirements() -> dict[str, Requirement]:
    listed = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    return {r.name.lower(): r for r in map(Requirement, listed) if r.name != "llmkernels"}


def test_constraints_pin_every_requirement():
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert set(requirements()) <= set(pins)
    extras = PROJECT["optional-dependencies"]
    apart = {Requirement(line).name for line in extras["peers"] + extras["torch_tpu"]}  # in environments of their own
    for name, requirement in requirements().items():
        assert requirement.specifier.contains(pins[name]), f"{requirement}, pinned {pins[name]}"
        assert name in apart or metadata.version(name).partition("+")[0] == pins[name], (
            f"{name}: not what is pinned; run make venv"
        )


def test_what_is_imported_is_declared():
    """A module that the package imports when it is imported comes with a dependency; others only inside functions."""
    declared = {re.split(r"[<>=\[ ]", line)[0].replace("-", "_") for line in PROJECT["dependencies"]}
    extras, adapters = PROJECT["optional-dependencies"], ROOT / "llmkernels" / "integrations"
    for path in (ROOT / "llmkernels").rglob("*.py"):
        optional = {"jax"} if path.name == "jax_api.py" else set()
        if path.parent.name == "server":
            optional = {Requirement(line).name.replace("-", "_") for line in extras["serve"]}
        if adapters in path.parents:  # its engine loads it, and is there then: vllm_norms.py, torch_xla.py
            name = path.relative_to(adapters).parts[0].removesuffix(".py")
            optional = {name, name.partition("_")[0]} | {Requirement(line).name for line in extras.get(name, ())}
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                outside = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"llmkernels", ""}
                assert outside <= declared | optional, f"{path.name}: {outside}"
