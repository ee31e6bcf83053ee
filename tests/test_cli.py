"""The command line: what each command prints, that its JSON keeps its shape, and that mistakes end in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmkernels import discovery, status, testing
from llmkernels.cli import app
from llmkernels.cli.doctor import PREFIXES
from llmkernels.models import shipped_model

ROOT = Path(__file__).parent.parent
COMMANDS = ("ops", "explain", "doctor", "status", "conformance", "compile", "tune", "bench", "generate")
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from llmkernels.cli import main
sys.argv[1:] = {arguments}
main()
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKERNELS_CACHE", str(tmp_path / "cache"))


def run(*arguments):
    """(exit code, stdout, stderr) of a command, in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def answer(*arguments):
    """The JSON a command prints."""
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def process(code, **environment):
    """A Python process of its own."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | own, timeout=200, check=False
    )


def command(*arguments, missing=(), **environment):
    """The command line in a process of its own, where some packages cannot be imported."""
    return process(WITHOUT.format(missing=list(missing), arguments=[str(a) for a in arguments]), **environment)


def test_help_names_every_command():
    code, out, _ = run("--help")
    assert code == 0
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", out)] == []


def test_version():
    code, out, _ = run("--version")
    assert (code, out) == (0, f"{__import__('llmkernels').__version__}\n")


def test_nothing_heavy_is_loaded_before_a_command_asks_for_it():
    loaded = process(
        "import sys, llmkernels.cli; print([m for m in ('torch', 'jax', 'numpy', 'rich') if m in sys.modules])"
    )
    assert loaded.stdout == "[]\n", loaded.stderr


def test_ops():
    rows = answer("ops")["ops"]
    assert {"op", "summary", "shapes", "dtypes", "options", "cases", "backends"} == set(rows[0])
    assert "paged_attention" in {row["op"] for row in rows}
    assert all(row["backends"][-1] == "reference" and row["cases"] and row["summary"] for row in rows)
    code, out, _ = run("ops", "rms_norm")
    assert code == 0
    assert "x[*rows hidden]:T" in out
    assert "Args:" in out


def test_explain():
    told = answer("explain", "paged_attention")
    assert set(told) == {"op", "call", "candidates", "chosen"}
    assert told["call"]["q"].startswith("float32 (")
    assert [c["backend"] for c in told["candidates"]] == [*discovery.backends(), "reference"]
    for candidate in told["candidates"]:
        assert set(candidate) - {"notes"} == {"backend", "verdict", "reasons"}
        assert candidate["verdict"] in ("chosen", "takes", "refuses")
        assert (candidate["verdict"] == "refuses") == bool(candidate["reasons"])
        for reason in candidate["reasons"]:
            assert set(reason) == {"code", "reason", "fix"}
            assert reason["code"] in discovery.CODES
            assert reason["reason"]
            assert reason["fix"]
    assert [c["backend"] for c in told["candidates"] if c["verdict"] == "chosen"] == [told["chosen"]]


def test_explain_a_changed_case_in_words():
    code, out, _ = run("explain", "rms_norm", "--dtype", "bfloat16", "--set", "hidden=72", "--set", "rows=3")
    assert code == 0
    assert "bfloat16 (3, 72)" in out
    assert re.search(r"^reference +(chosen|takes)$", out, re.MULTILINE)


def test_doctor():
    facts = answer("doctor")
    assert set(facts) == {
        *("version", "python", "versions", "cpu", "gpus", "backends", "plugins"),
        *("build", "cache", "environment", "problems"),
    }
    assert facts["versions"]["torch"]
    assert facts["cpu"]["cores"] >= 1
    assert [b["backend"] for b in facts["backends"]][-1] == "reference"
    for backend in facts["backends"]:
        assert backend["available"] == (backend["reason"] is None)
        assert backend["available"] or set(backend["reason"]) == {"code", "reason", "fix"}
    assert all(name.startswith(PREFIXES) for name in facts["environment"])
    code, out, _ = run("doctor")
    assert code == 0
    assert "reference" in out


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os\nos._exit(3)", "the import ended with code 3"),
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("ARRAYS = ('torch',)\ndef absent():\n    return None", None),
    ],
    ids=["crashes", "raises", "loads"],
)
def test_doctor_lists_plugins_that_fail(tmp_path, monkeypatch, source, words):
    package = tmp_path / "doctored"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    about = tmp_path / "doctored-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: doctored\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[llmkernels.backends]\ndoctored = doctored\n")
    monkeypatch.syspath_prepend(tmp_path)
    discovery.forget_all()
    try:
        facts = answer("doctor")
    finally:
        monkeypatch.undo()
        discovery.forget_all()
    (plugin,) = (p for p in facts["plugins"] if p["backend"] == "doctored")
    assert plugin["distribution"] == "doctored"
    assert plugin["problem"] is None if words is None else words in plugin["problem"]
    assert any("the plug-in doctored" in problem for problem in facts["problems"]) == (words is not None)


@pytest.mark.parametrize("asked", ["doctor", "status"])
def test_answers_where_nothing_optional_is_installed(asked):
    missing = ("torch", "jax", "triton", "matplotlib", "safetensors", "tokenizers", "transformers", "numpy")
    told = command(asked, "--json", missing=missing)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)


def test_a_missing_package_is_named():
    told = command("explain", "rms_norm", missing=("torch",))
    assert told.returncode == 2
    assert told.stderr == "llmkernels: this command needs torch, which is not installed; run: pip install torch\n"


def test_conformance(tmp_path):
    file = tmp_path / "records" / "here.json"
    code, out, err = run("conformance", "--backend", "reference", "--op", "rms_norm", "--json", "--record", file)
    assert code == 0, err
    told = json.loads(out)
    assert {"backend", "mode", "passed", "failed", "refused", "cases"} <= set(told)
    assert (told["backend"], told["mode"], told["failed"]) == ("reference", "ran", 0)
    assert told["passed"] == len(told["cases"]) > 0
    assert all(
        set(case) == {"op", "dtype", "case", "verdict", "error", "tolerance", "reasons"} for case in told["cases"]
    )

    rows = answer("status", "--records", file.parent, "--op", "rms_norm", "--backend", "reference")["rows"]
    assert {"op", "backend", "dtype", "evidence", "device", "recorded"} <= set(rows[0])
    assert {row["evidence"] for row in rows} == {"ran"}
    assert sum(row["passed"] for row in rows) == told["passed"]
    _, table, _ = run("status", "--records", file.parent, "--markdown")
    assert f"ran on {rows[0]['device']}" in table
    assert "no record" in table


def test_conformance_shows_what_failed(monkeypatch):
    wrong = testing.Result("rms_norm", "reference", "float32", "a case", "failed", float("inf"), 1e-6, ["y is nan"])
    monkeypatch.setattr(testing, "conform", lambda *args: iter([wrong]))
    code, out, _ = run("conformance", "--backend", "reference", "--op", "rms_norm")
    assert code == 1
    assert "a case" in out
    assert "y is nan" in out
    code, out, _ = run("conformance", "--backend", "reference", "--op", "rms_norm", "--json")
    assert code == 1
    assert json.loads(out)["cases"][0]["error"] is None  # JSON knows no infinity


def test_a_record_counts_no_forbidden_calls_and_replaces_older_ones(tmp_path):
    from llmkernels.registry import get

    forbidden = next(case.name for case in get("paged_attention").contract.cases if case.raises)
    results = [
        testing.Result("paged_attention", "reference", "float32", name, verdict)
        for name, verdict in (("decode", "passed"), ("prefill", "refused"), (forbidden, "passed"))
    ]
    for _ in range(2):
        status.write(tmp_path / "x.json", status.summarize(results, "ran", "a chip"))
    (record,) = status.read(tmp_path / "x.json")
    assert (record["passed"], record["failed"], record["refused"]) == (1, 0, 1)


def test_records_of_several_instruction_sets_are_kept_apart_and_told_in_one_line(tmp_path):
    dtypes = ("float32", "bfloat16", "float16")
    results = [testing.Result("rms_norm", "cpu", dtype, "x", "passed") for dtype in dtypes]
    for isa in ("avx512", "avx2", None):
        status.write(tmp_path / "x.json", status.summarize(results, "ran", "a chip", isa))
    rows = [row for row in status.rows(status.records(tmp_path)) if row["evidence"] == "ran"]
    assert sorted(str(row["isa"]) for row in rows) == sorted(3 * ["None", "avx2", "avx512"])
    assert "| `cpu` | ran on a chip: avx2, avx512 | `rms_norm` |" in status.markdown(
        status.rows(status.records(tmp_path))
    )


def test_targets_of_the_same_ops_share_a_line_and_tell_the_dtypes_of_all(tmp_path):
    for chip, dtypes in (("one", ("bfloat16", "float16")), ("other", ("bfloat16", "float32", "float16"))):
        results = [testing.Result("rms_norm", "xla", dtype, "x", "passed") for dtype in dtypes]
        status.write(tmp_path / "x.json", status.summarize(results, "compiled", chip))
    table = status.markdown(status.rows(status.records(tmp_path)))
    assert "compiled for other; one | `rms_norm` in bfloat16 float16 |" in table


def test_status_says_what_nobody_tried(tmp_path):
    rows = answer("status", "--records", tmp_path)["rows"]
    assert {row["evidence"] for row in rows} == {"no record", "no kernel"} - (
        set() if any(r["evidence"] == "no kernel" for r in rows) else {"no kernel"}
    )
    assert {row["backend"] for row in rows} == {*discovery.backends(), "reference"}


GENERATE = ("generate", "--max-tokens", 12, "--seed", 5, "--dtype", "float32", "--device", "cpu")


def test_generate():
    told = answer(*GENERATE, "--prompt", "The ls command")
    assert set(told) == {"text", "tokens", "prompt_tokens", "seconds", "tokens_per_second", "ledger"}
    assert 1 <= told["tokens"] <= 12
    assert told["prompt_tokens"] >= 1
    assert told["tokens_per_second"] == pytest.approx(told["tokens"] / told["seconds"])
    assert all(row["calls"] for backends in told["ledger"].values() for row in backends.values())
    code, out, err = run(*GENERATE, "--prompt", "The ls command")
    assert code == 0
    assert out == "The ls command" + told["text"] + "\n"
    assert "seed 5" in err


def test_generate_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("The ls command\n\nThe kill signal\n")
    told = answer(*GENERATE, "--file", file)
    assert [each["prompt"] for each in told["outputs"]] == ["The ls command", "The kill signal"]
    assert told["tokens"] == sum(each["tokens"] for each in told["outputs"])
    alone = answer(*GENERATE, "--prompt", "The ls command")["text"]
    assert told["outputs"][0]["text"] == alone


MISTAKES = {
    ("explain", "nope"): "'nope' is not an op; the ops are ",
    ("explain", "rms_norm", "--dtype", "int7"): "--dtype is 'int7'; rms_norm takes float32",
    ("explain", "rms_norm", "--case", "nope"): "rms_norm has no case 'nope'; its cases are ",
    ("explain", "rms_norm", "--set", "hide=3"): "--set hide: the cases of rms_norm take rows, hidden",
    ("explain", "rms_norm", "--set", "hidden"): "--set hidden: write NAME=VALUE",
    ("explain", "rms_norm", "--backend", "nope"): "asks for 'nope'; the backends are ",
    ("explain", "rms_norm", "--device", "tpu9"): "device is 'tpu9'; use 'cpu', 'cuda'",
    ("explain", "paged_attention", "--case", "page id past the end"): r"block_table\[0, 0\] is 1000000; the cache has",
    ("explain", "paged_attention", "--case", "heads not a multiple"): "heads=6 is not a multiple of kv_heads=4",
    ("conformance", "--backend", "nope"): "--backend asks for 'nope'; the backends are ",
    ("conformance", "--backend", "reference", "--op", "nope"): "'nope' is not an op",
    ("conformance", "--backend", "reference", "--case", "nope"): "no case fits",
    ("conformance", "--backend", "reference", "--case", "plain", "--op", "sample", "--record", "x"): "leave --case out",
    ("status", "--op", "nope"): "--op is 'nope'; the ops are",
    ("bench", "--op", "nope", "--dispatch"): "'nope' is not an op",
    ("bench", "--backend", "nope"): "--backend asks for 'nope'",
    ("generate", "/nowhere", "--prompt", "x"): "/nowhere is not a directory",
    ("generate", "--prompt", "x", "--temperature", "-1"): "temperature is -1",
    ("generate", "--prompt", "x", "--dtype", "int3"): "dtype is 'int3'",
    ("generate", "--prompt", ""): "the prompt is empty",
    ("generate", "somewhere"): "nothing to continue; give --prompt",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_that_says_what_to_do(arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("llmkernels: ")
    assert re.search(MISTAKES[arguments], err), err


def test_a_truncated_checkpoint_and_an_unknown_architecture(tmp_path):
    short, strange = (Path(shutil.copytree(shipped_model(), tmp_path / name)) for name in ("short", "strange"))
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    for path, words in (
        (short, "is not a whole safetensors file"),
        (strange, "MambaForCausalLM, which is not supported"),
    ):
        told = command("generate", path, "--prompt", "x")
        assert told.returncode == 2
        assert told.stderr.count("\n") == 1, told.stderr
        assert words in told.stderr


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("LLMKERNELS_BACKEND", "nope", "LLMKERNELS_BACKEND in the environment asks for 'nope'; the backends are "),
        ("LLMKERNELS_RMS_NORM", "nope", "LLMKERNELS_RMS_NORM in the environment asks for 'nope'"),
        ("LLMKERNELS_POLICY", "angry", "policy is 'angry'; use one of strict"),
    ],
)
def test_a_wrong_environment_is_refused_and_doctor_tells_why(variable, value, words):
    told = command("explain", "rms_norm", **{variable: value})
    assert told.returncode == 2
    assert told.stderr.startswith("llmkernels: ")
    assert told.stderr.count("\n") == 1
    assert words in told.stderr
    examined = command("doctor", "--json", **{variable: value})
    assert examined.returncode == 0
    assert any(words in problem for problem in json.loads(examined.stdout)["problems"])


def test_a_report_that_is_none_is_named(tmp_path):
    file = tmp_path / "broken.json"
    file.write_text("{}")
    code, _, err = run("bench", "--load", file)
    assert code == 2
    assert "broken.json is not a report of llmkernels bench" in err


def test_a_refused_call_is_told_in_one_line():
    from llmkernels.cli import _one_line

    why = {"vendor": [discovery.Refusal("SHAPE", "dim=7; takes multiples of 8", "pad it to 8")]}
    error = discovery.Unsupported("an_op: no backend took this call\n  x  float32 (1, 7)\n  vendor refused", why)
    assert (
        _one_line(error) == "an_op: no backend took this call: vendor: [SHAPE] dim=7; takes multiples of 8; pad it to 8"
    )


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"records": [{"op": "rms_norm"}]}')
    code, _, err = run("status", "--records", tmp_path)
    assert code == 2
    assert "x.json is not a file of records" in err
