"""Who may import whom.  Every file of the package belongs to exactly one layer; a file that belongs to none fails."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ANYTHING = "*"


@dataclass(frozen=True)
class Layer:
    """Files, the layers below them, and what they may import from outside: at import, and inside functions."""

    files: str
    below: str = ""
    outside: str = ""
    lazily: str = ""


LAYERS = {
    "core": Layer(  # in this order: each file knows only those before it
        "shapes settings cache_folder discovery contract ledger arrays dispatch registry", lazily="torch jax ml_dtypes"
    ),
    "quant": Layer("quant/*", "core", "torch numpy"),
    "ops": Layer("ops/*", "core quant", "torch numpy"),
    "frameworks": Layer("torch_library jax_api", "core quant ops", "torch jax numpy"),
    "kit": Layer("memory inputs comparison testing selfcheck", "core quant ops", "torch numpy", "jax"),
    "structured": Layer("structured/*", "", "torch numpy tokenizers", "xgrammar"),
    "models": Layer("models/*", "core quant ops frameworks", "torch safetensors tokenizers"),
    "engine": Layer("engine/*", "core quant ops frameworks structured models", "torch tokenizers"),
    "server": Layer(
        "server/*",
        "core quant ops frameworks structured models engine",
        "fastapi jinja2 prometheus_client pydantic starlette tokenizers uvicorn",
    ),
    "measuring": Layer(
        "roofline status bench/* crosscompile/*", "core quant ops frameworks kit", "torch numpy", ANYTHING
    ),
    "doors": Layer(
        "cli/* __main__",
        "core quant ops frameworks kit structured models engine measuring server",
        "typer rich",
        ANYTHING,
    ),
    "adapters": Layer(
        "integrations/*",
        "core quant ops frameworks",
        "torch jax torchax torch_tpu torch_xla transformers safetensors vllm sglang",
        ANYTHING,
    ),
    "backends": Layer("backends/*", "", "torch jax triton numpy", "flashinfer"),
    "package": Layer("__init__"),  # the public list: loads everything, and only when it is asked for
}
# What the core reaches for by name, late, because it lies above.
UPWARD = {
    "llmkernels.discovery": {"llmkernels.backends"},
    "llmkernels.dispatch": {"llmkernels.torch_library"},
    "llmkernels.registry": {"llmkernels.ops", "llmkernels.selfcheck"},
}
FILES = sorted([*(ROOT / "llmkernels").rglob("*.py"), *(ROOT / "backends").rglob("*.py")])
CODE = sorted(
    path
    for folder in ("llmkernels", "backends", "csrc", "tests", "bench", "docs", "examples", "tools", ".ci", ".")
    for path in (ROOT / folder).glob("*" if folder == "." else "**/*")
    if path.is_file()
    and path.suffix in (".py", ".cpp", ".cu", ".hip", ".h", ".md", ".toml", ".txt", ".yaml", ".json", "")
    if path.name not in ("tokenizer.json", "_build.json", ".git") and "__pycache__" not in path.parts
)


@dataclass(frozen=True)
class Import:
    module: str  # absolute; for an import of a name from a package, the submodule if there is one of that name
    line: int
    when: str  # 'import', 'late' inside a function, or 'types' for a type checker only


def label(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


def layers_of(path: Path) -> list[str]:
    name = str(path.relative_to(ROOT).with_suffix("")).removeprefix("llmkernels/")
    return [layer for layer, what in LAYERS.items() if any(fnmatch(name, pattern) for pattern in what.files.split())]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__").replace("backends", "llmkernels.backends", 1)


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, by statement or by import_module("...")."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]

    def walk(node: ast.AST, when: str) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = "late"
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when = "types"
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in modules() else base, node.lineno, when)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (Import(name.value, node.lineno, "late") for name in node.args if isinstance(name, ast.Constant))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, when)

    return walk(ast.parse(path.read_text()), "import")


@pytest.mark.parametrize("path", FILES, ids=label)
def test_every_file_belongs_to_one_layer(path):
    assert len(layers_of(path)) == 1, f"{label(path)} belongs to {layers_of(path) or 'no layer'}; see LAYERS"


@pytest.mark.parametrize("path", [path for path in FILES if module_of(path) != "llmkernels"], ids=label)
def test_imports(path):
    (name,) = layers_of(path)
    layer, me = LAYERS[name], module_of(path)
    for found in imports(path):
        where = f"{label(path)}:{found.line} imports {found.module}"
        top = found.module.partition(".")[0]
        if top != "llmkernels":
            allowed = layer.outside.split() if found.when == "import" else f"{layer.outside} {layer.lazily}".split()
            assert top in sys.stdlib_module_names or top in allowed or ANYTHING in allowed, f"{where}; {name} may not"
        elif found.module == "llmkernels":  # the public list
            assert name in ("models", "engine", "measuring", "doors", "adapters", "kit", "frameworks"), (
                f"{where}, from below it"
            )
        elif name == "backends":
            own = ".".join(me.split(".")[:3])
            assert f"{found.module}.".startswith(f"{own}."), f"{where}; a backend knows itself and its arrays only"
        elif found.module not in UPWARD.get(me, ()):
            (other,) = layers_of(modules()[found.module])
            assert other == name or other in layer.below.split(), f"{where}; {name} may not know {other}"
            if name == other == "core":
                order = layer.files.split()
                assert order.index(found.module.split(".")[1]) < order.index(me.split(".")[1]), f"{where}, a later one"


def test_no_circles():
    """Modules import each other in one direction: a circle works until somebody imports its other end first.

    A file naming the package it lies in does not count: Python has loaded that one before it.
    """
    edges = {
        name: {i.module for i in imports(path) if i.when == "import" and i.module in modules()} - {name, *parents(name)}
        for name, path in modules().items()
    }
    while leaves := {name for name, needs in edges.items() if not needs}:
        edges = {name: needs - leaves for name, needs in edges.items() if name not in leaves}
    circle = {name: sorted(needs & set(edges)) for name, needs in edges.items()}
    assert not circle, f"these import each other: {circle}"


def parents(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def test_the_core_loads_no_array_library():
    core = ["llmkernels", *(f"llmkernels.{name}" for name in LAYERS["core"].files.split()), "llmkernels.backends"]
    program = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    program += "    heavy = {'torch', 'jax', 'numpy', 'triton'} & set(sys.modules)\n"
    program += "    assert not heavy, f'{name} imports {heavy}'\n"
    done = subprocess.run([sys.executable, "-c", program, *core], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_the_scheduler_knows_no_tensors():
    """Plain data in, plain data out: so its rules can be tested a thousand times a second."""
    for name in ("scheduler", "prefix", "pages"):
        found = {i.module for i in imports(ROOT / "llmkernels" / "engine" / f"{name}.py")}
        assert found  # the file was read
        assert not {module for module in found if module.split(".")[0] in ("torch", "numpy", "jax")}


def test_the_path_is_the_registration():
    """A backend's public files are named after ops: another name is never found."""
    import llmkernels.ops  # noqa: F401  declares them
    from llmkernels.registry import OPS

    for path in (ROOT / "backends").glob("*/[!_]*.py"):
        assert path.stem in OPS, f"{label(path)} is named after no op; begin a helper's name with _"


@pytest.mark.parametrize("path", [path for path in CODE if "csrc" in path.parts], ids=label)
def test_kernels_know_no_framework(path):
    text = path.read_text()
    assert not re.search(r'#include\s*[<"](torch|ATen|c10|jaxlib|xla)/', text), "raw pointers, sizes, strides only"
    assert path.name == "bind.cpp" or "pybind11" not in text, "only bind.cpp knows Python"


@pytest.mark.parametrize(
    "path", [path for path in CODE if path.suffix in (".py", ".cpp", ".cu", ".hip", ".h")], ids=label
)
def test_a_file_is_short_and_tidy(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "split it: files stay near 300 lines"
    assert not re.search(r"^\s*(#|//) ?([-=#*])\2{4,}", text, re.MULTILINE), "a banner says nothing"


@pytest.mark.parametrize("path", [path for path in CODE if path.suffix == ".py"], ids=label)
def test_no_error_is_swallowed(path):
    if path == ROOT / "llmkernels" / "testing.py":
        return  # whatever an implementation under test raises is a finding, and is reported
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException") or "raise" in ast.unparse(node), (
                f"{label(path)}:{node.lineno} catches {caught}; name the errors that are expected"
            )


@pytest.mark.parametrize("path", CODE, ids=label)
def test_nothing_of_one_machine(path):
    """No absolute path and no registry's address: both are true on one machine only."""
    found = re.search(
        r"(?<![\w.])/(work|root|home|Users)/\w+|\b(pypi[.]org|pythonhosted[.]|download[.]pytorch)", path.read_text()
    )
    assert not found, f"{label(path)} names {found[0]}"
