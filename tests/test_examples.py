"""What examples/ shows runs, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkernels.engine import LLM, SamplingParams

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name, *arguments):
    """What the example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def test_torch_compile():
    said = example("torch_compile.py").splitlines()
    assert len(said) == 3
    assert all("'paged_attention': [" in line and "'write_kv': [" in line for line in said)


def test_torch_export():
    said = example("torch_export.py")
    assert "llmkernels.norm_linear_activation.default" in said
    assert said.count("exported, saved, loaded") == 3


def test_ahead_of_time():
    assert example("torch_export.py", "--aot").count("compiled by AOTInductor") == 3


def test_jax_decodes_what_the_engine_decodes():
    pytest.importorskip("jax")
    prompt = "The read() system call"
    llm = LLM(dtype="float32", device="cpu")
    (want,) = llm.generate(prompt, SamplingParams(max_tokens=32))
    assert example("jax_decoder.py", prompt).strip() == want.text.strip()
    assert len(want.tokens) == 32
