"""`llmkernels tune`: the search, with times that are made up, and a small real one in the interpreter."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmkernels import bench, registry
from llmkernels.bench import tune

ROOT = Path(__file__).parents[1]
OWN = {"BLOCK": 256, "num_warps": 4, "num_stages": 2, "FAST": False}
needs_triton = pytest.mark.skipif(not util.find_spec("triton"), reason="triton is not installed")


@pytest.fixture
def tiles(monkeypatch):
    """A backend whose two kernels ask for tiles as the Triton backend's do.  It notes what the first was told."""
    state = SimpleNamespace(asked=None, told=None)
    state.subjects = list(bench.subjects("cpu", "silu_and_mul", "float32", quick=True))

    @contextmanager
    def answered_by(function):
        state.asked, before = function, state.asked
        yield
        state.asked = before

    def run(x):
        for key in ("kernel | a", "kernel | b"):
            told = state.asked(key, OWN)
            state.told = told if key.endswith("a") else state.told
        return reference(x)

    reference = registry.get("silu_and_mul").contract.reference
    module = SimpleNamespace(answered_by=answered_by, sound=lambda entry, own: entry["BLOCK"] <= 2048)
    monkeypatch.setattr(tune, "module", lambda backend: module)
    chosen = SimpleNamespace(run=run)
    monkeypatch.setattr(tune.registry, "get", lambda op: SimpleNamespace(choose=lambda call, backend: chosen))
    return state


def choices(tiles, seconds, most=40):
    """What the search decides where tiles take `seconds(tiles)`."""

    def clock(subject, run):
        run(subject.call["x"])
        return seconds(tiles.told)

    return {choice.key: choice for choice in tune.tune("fake", tiles.subjects, clock=clock, most=most)}


def test_the_search_walks_to_the_fastest(tiles):
    """Each step changes one parameter; the best lies three steps away."""

    def seconds(t):
        return 1 + abs(t["BLOCK"] - 1024) / 1024 + abs(t["num_warps"] - 8) / 8 + (not t["FAST"])

    found = choices(tiles, seconds)["kernel | a"]
    assert found.best == {"BLOCK": 1024, "num_warps": 8, "num_stages": 2, "FAST": True}
    assert found.gained
    assert found.best_seconds == 1
    assert found.own == OWN


def test_what_answers_wrongly_or_is_unsound_is_never_chosen(tiles):
    def seconds(t):
        return "too large" if t["BLOCK"] > 512 else 1 / t["BLOCK"]

    found = choices(tiles, seconds)["kernel | a"]
    assert found.best["BLOCK"] == 512
    assert found.refused > 0


def test_a_gain_within_the_noise_changes_nothing(tiles):
    found = choices(tiles, lambda t: 1.0 if t == OWN else 0.98)["kernel | a"]
    assert found.best == OWN
    assert not found.gained


def test_a_gain_that_does_not_repeat_changes_nothing(tiles):
    """The first time of a candidate was lucky."""
    times = iter([1.0, 0.5])
    found = choices(tiles, lambda t: next(times, 1.0))["kernel | a"]
    assert not found.gained


def test_the_number_of_candidates_is_bounded(tiles):
    seen = []
    choices(tiles, lambda t: seen.append(t) or 1 / len(seen), most=5)
    assert len(seen) <= 2 * (5 + 2 * tune.REPEATS)


def test_a_kind_of_call_is_tuned_once(tiles):
    assert list(choices(tiles, lambda t: 1.0)) == ["kernel | a", "kernel | b"]


def test_a_wrong_heuristic_is_told_and_not_tuned(tiles):
    assert {one.why for one in choices(tiles, lambda t: "fails parity: y").values()} == {"fails parity: y"}


def test_what_is_wrong_now_and_then_is_wrong(tiles):
    times = iter([1.0, 0.5])
    (found, *_) = choices(tiles, lambda t: next(times, "fails parity: y")).values()
    assert found.why == "not always right: fails parity: y"


def test_tables_merge_and_survive_their_file(tmp_path):
    a, b = {"k1": {"BLOCK": 1}, "k2": {"BLOCK": 2}}, {"k2": {"BLOCK": 4}}
    file = tmp_path / "new" / "table.json"
    tune.write(file, tune.merge([a, b]))
    assert tune.read(file) == {"k1": {"BLOCK": 1}, "k2": {"BLOCK": 4}}
    for text, words in (("{", "is no JSON"), ("[]", "is no table"), ('{"k": 3}', "is no table")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            tune.read(file)


def test_backends_without_tiles_are_named():
    for name in ("vendor", "reference"):
        with pytest.raises(ValueError, match=f"--backend is '{name}', whose kernels have nothing to tune"):
            tune.module(name)


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "llmkernels", "tune", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_triton
def test_a_small_real_run_in_the_interpreter(tmp_path):
    file = tmp_path / "table.json"
    arguments = ("--emulated", "--op", "silu_and_mul", "--dtype", "float32", "--quick", "--most", "3", "--json")
    done = command(*arguments, "--table", str(file))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (choice,) = told["choices"]
    assert choice["key"].startswith("interpreter | triton ")
    assert set(choice["best"]) == set(choice["own"])
    assert 2 <= choice["tried"] <= 3
    kept = tune.read(file) if file.exists() else {}
    assert told["entries"] == len(kept) == int(choice["gained"])


@needs_triton
def test_merging_two_tables_measures_nothing(tmp_path):
    for name in "ab":
        tune.write(tmp_path / f"{name}.json", {name: {"BLOCK": 1}})
    out = tmp_path / "out.json"
    done = command("--merge", str(tmp_path / "a.json"), "--merge", str(tmp_path / "b.json"), "--table", str(out))
    assert done.returncode == 0, done.stderr
    assert set(tune.read(out)) == {"a", "b"}


@needs_triton
def test_a_device_that_the_kernels_cannot_use_is_one_line():
    done = command("--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.startswith("llmkernels: triton cannot be tuned here: ")
    assert len(done.stderr.splitlines()) == 1


LOOKUP = """
import json, os, sys, warnings
from pathlib import Path
from llmkernels.backends.triton import _tuned
own, file = {"BLOCK": 8, "num_warps": 4}, Path(os.environ["LLMKERNELS_TUNED"])
_tuned.INTERPRETED, _tuned._name = False, lambda index: "a chip"
device = type("device", (), {"index": 0})
def ask(text):
    file.write_text(text)
    _tuned.table.cache_clear(), _tuned._merged.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return [_tuned.choose("k", device, own, rows=4) for _ in range(3)][-1], [str(w.message) for w in said]
key = _tuned.key("k", "a chip", rows=4)
assert ask(json.dumps({key: {"BLOCK": 16}})) == ({"BLOCK": 16, "num_warps": 4}, [])
assert ask(json.dumps({key.replace("a chip", "another"): {"BLOCK": 16}})) == (own, [])
for foreign in ({"BLOCK": 3}, {"BLOCK": "16"}, {"TILE": 16}, {"BLOCK": True}, [], 7):
    assert ask(json.dumps({key: foreign})) == (own, []), foreign
for broken in ("{", "[]", "\\0"):
    chosen, said = ask(broken)
    assert chosen == own and len(said) == 1 and "is no table of tuned tiles" in said[0], said
"""


@needs_triton
def test_a_miss_and_a_broken_entry_mean_the_heuristic(tmp_path):
    environment = os.environ | {"LLMKERNELS_TUNED": str(tmp_path / "table.json"), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", LOOKUP], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
