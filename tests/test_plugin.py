"""examples/backend_template, really installed by pip, and its wrong, broken and buggy variants.

Each test runs in a process of its own: entry points are found when Python starts.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "llmkernels_template"
DTYPES = ("float32", "float16", "bfloat16")
NATIVE = (f"{PACKAGE}/__init__.py", "NATIVE = False", "NATIVE = True")
CALL = """
import json, warnings, torch, llmkernels
warnings.simplefilter("ignore")
torch.manual_seed(0)
x, weight = torch.randn(5, 64), torch.randn(64)
want = llmkernels.rms_norm(x, weight, backend="reference")
llmkernels.ledger.reset()
got = llmkernels.rms_norm(x, weight)
told = llmkernels.explain("rms_norm", x, weight)
print(json.dumps({
    "close": torch.allclose(got, want, rtol=1e-5, atol=1e-6),
    "ledger": llmkernels.ledger.read()["rms_norm"],
    "order": [c.backend for c in told.candidates],
    "verdicts": {c.backend: c.verdict for c in told.candidates},
    "reasons": {c.backend: [[r.code, r.reason] for r in c.reasons] for c in told.candidates},
}))
"""


class Installed:
    """A plug-in in a folder of its own, and processes that see it."""

    def __init__(self, site: Path, cache: Path):
        self.site, self.cache = site, cache

    def run(self, *command, **environment):
        keep = {name: value for name, value in os.environ.items() if not name.startswith("LLMKERNELS_")}
        paths = {"PYTHONPATH": f"{self.site}{os.pathsep}{ROOT}", "LLMKERNELS_CACHE": str(self.cache)}
        environment = keep | paths | {"OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, *command]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def call(self, **environment):
        """What CALL found."""
        done = self.run("-c", CALL, **environment)
        assert not done.returncode, done.stderr
        return json.loads(done.stdout)

    def json(self, *arguments, **environment):
        """What a command of the CLI prints with --json."""
        done = self.run("-m", "llmkernels", *arguments, "--json", **environment)
        assert not done.returncode, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example as pip installs it."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(ROOT / "examples" / "backend_template", folder / "source")  # pip builds inside it
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", folder / "site"]
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    return Installed(folder / "site", folder / "cache")


@pytest.fixture
def altered(example, tmp_path):
    """A function that makes a copy of the installed plug-in with some text replaced: altered((file, old, new))."""

    def alter(*edits):
        site = shutil.copytree(example.site, tmp_path / "site")
        for name, old, new in edits:
            (file,) = site.glob(name)
            assert old in file.read_text(), f"{name} no longer says {old!r}"
            file.write_text(file.read_text().replace(old, new))
        return Installed(site, tmp_path / "cache")

    return alter


def test_asked_first_answers_rightly_and_is_counted(example):
    found = example.call()
    assert found["order"][0] == "template"
    assert found["order"][-1] == "reference"
    assert found["verdicts"]["template"] == "chosen"
    assert found["close"]
    assert found["ledger"] == {"template": {"calls": 1, "why": {"first in order": 1}}}


def test_listed_by_doctor_and_explain(example):
    (plugin,) = example.json("doctor")["plugins"]
    assert (plugin["backend"], plugin["package"]) == ("template", "llmkernels_template")
    assert plugin["distribution"] == "llmkernels-template"
    assert plugin["problem"] is None
    candidates = example.json("explain", "silu_and_mul")["candidates"]
    assert candidates[0] == {"backend": "template", "verdict": "chosen", "reasons": []}


@pytest.mark.parametrize("op", ["rms_norm", "silu_and_mul"])
def test_conformance(example, op):
    report = example.json("conformance", "--backend", "template", "--op", op)
    assert report["failed"] == 0
    verdicts = {dtype: {case["verdict"] for case in report["cases"] if case["dtype"] == dtype} for dtype in DTYPES}
    assert verdicts["float32"] == verdicts["float16"] == {"passed"}
    assert "refused" in verdicts["bfloat16"]  # NumPy has none


def test_conformance_tells_what_is_left(example):
    """Right, wrong, refused, missing: the loop in which a new backend is written."""
    report = example.json("conformance", "--backend", "template", "--case", "rows=7")
    assert {"rms_norm", "silu_and_mul"}.isdisjoint(report["missing"])
    assert {"paged_attention", "quantized_gemm"} <= set(report["missing"])
    done = example.run("-m", "llmkernels", "conformance", "--backend", "template", "--case", "rows=7")
    assert not done.returncode, done.stderr
    said = done.stdout
    line = next(line for line in said.splitlines() if "paged_attention" in line)
    assert "missing" in line
    assert "write llmkernels_template/paged_attention.py" in said
    assert "such as [DTYPE] x is bfloat16; takes float32 and float16; cast x to float32" in said
    assert "ops missing" in said


def test_conformance_tells_what_is_wrong(altered):
    plugin = altered((f"{PACKAGE}/rms_norm.py", "np.square(s).mean(", "np.square(s).max("))
    done = plugin.run(
        "-m", "llmkernels", "conformance", "--backend", "template", "--op", "rms_norm", "--case", "rows=7"
    )
    assert done.returncode == 1
    assert "failed rms_norm float32 rows=7-hidden=64" in done.stdout


def test_named_in_the_environment(example):
    found = example.call(LLMKERNELS_BACKEND="template")
    assert found["ledger"] == {"template": {"calls": 1, "why": {"use() or LLMKERNELS_BACKEND": 1}}}
    only = "import torch, llmkernels; llmkernels.rms_norm(torch.ones(2, 8).bfloat16(), torch.ones(8).bfloat16())"
    done = example.run("-c", only, LLMKERNELS_BACKEND="template")
    assert "Unsupported: rms_norm" in done.stderr  # named, it does not give way to another one
    assert "[DTYPE] x is bfloat16; takes float32 and float16; cast x to float32" in done.stderr


def test_an_unknown_name_is_one_line(example):
    done = example.run("-m", "llmkernels", "explain", "rms_norm", LLMKERNELS_BACKEND="nunpy")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "LLMKERNELS_BACKEND" in line
    assert "'nunpy'; the backends are template," in line


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("import a_missing_library", "No module named 'a_missing_library'"),
        ("import ctypes; ctypes.CDLL('libmissing.so.1')", "libmissing.so.1: cannot open shared object file"),
    ],
)
def test_one_that_cannot_be_imported_is_listed_as_absent(altered, broken, says):
    plugin = altered((f"{PACKAGE}/__init__.py", "ARRAYS = (", f"{broken}\nARRAYS = ("))
    found = plugin.call()
    ((code, reason),) = found["reasons"]["template"]
    assert code == "ABSENT"
    assert says in reason
    assert found["close"]
    assert "template" not in found["ledger"]
    facts = plugin.json("doctor")
    assert says in facts["plugins"][0]["problem"]
    assert any(says in problem for problem in facts["problems"])


def test_a_wrong_kernel_is_never_chosen(altered):
    """It divides by the largest square instead of the mean one."""
    plugin = altered(NATIVE, (f"{PACKAGE}/rms_norm.py", "np.square(s).mean(", "np.square(s).max("))
    for _ in range(2):  # the second process finds the verdict of the first
        found = plugin.call()
        ((code, reason),) = found["reasons"]["template"]
        assert code == "PARITY"
        assert "first-use check" in reason
        assert found["close"]
        assert "template" not in found["ledger"]
        assert any(plugin.cache.iterdir())
    named = plugin.run("-c", CALL, LLMKERNELS_BACKEND="template")
    assert "Unsupported" in named.stderr
    assert "[PARITY]" in named.stderr
    assert plugin.call(LLMKERNELS_VERIFY="0")["verdicts"]["template"] == "chosen"  # who switches the check off gets it


def test_a_right_kernel_passes_the_first_use_check(altered):
    plugin = altered(NATIVE)
    assert plugin.call()["verdicts"]["template"] == "chosen"
    assert any(plugin.cache.iterdir())


def test_a_bug_in_refuse_is_an_error(altered):
    """Taken for a refusal, it would be a quiet slowdown."""
    plugin = altered((f"{PACKAGE}/rms_norm.py", "reasons(x=x)", "reasons(x=x.no_such_attribute)"))
    done = plugin.run("-c", CALL)
    assert done.returncode == 1
    assert "AttributeError: 'Tensor' object has no attribute 'no_such_attribute'" in done.stderr


def test_a_name_that_is_taken_is_an_error(altered):
    plugin = altered(("*.dist-info/entry_points.txt", "template = ", "vendor = "))
    done = plugin.run("-m", "llmkernels", "explain", "rms_norm")
    assert done.returncode == 2
    assert "calls itself 'vendor', which is taken; rename its entry point" in done.stderr
