"""The vLLM plug-in where there is no vLLM: its variable, with a FAKE registry.  `make test-vllm` has the real one."""

import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest
import torch

import llmkernels
from llmkernels.integrations import vllm as plugin


@pytest.fixture
def registered(monkeypatch):
    """What was registered with a fake of vllm.v1.attention.backends.registry."""
    found = []
    parts = ["vllm", "v1", "attention", "backends", "registry"]
    for end in range(1, len(parts) + 1):
        module = ModuleType(parts[end - 1])
        module.__path__ = []
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), module)
    module.AttentionBackendEnum = SimpleNamespace(CPU_ATTN="CPU_ATTN", CUSTOM="CUSTOM")
    module.register_backend = lambda name, path: found.append((name, path))
    return found


def test_vllm_finds_it():
    (point,) = (p for p in entry_points(group="vllm.general_plugins") if p.name == "llmkernels")
    assert point.load() is plugin.register
    (point,) = (p for p in entry_points(group="sglang.srt.plugins") if p.name == "llmkernels")
    assert point.value == "llmkernels.integrations.sglang:register"


@pytest.mark.parametrize("asked", [None, "", "0"])
def test_it_does_nothing_unless_asked(monkeypatch, registered, asked):
    if asked is not None:
        monkeypatch.setenv("LLMKERNELS_VLLM", asked)
    plugin.register()
    assert registered == []


@pytest.mark.parametrize("asked", ["1", "checked"])
def test_it_registers_as_often_as_it_is_called(monkeypatch, registered, asked):
    monkeypatch.setenv("LLMKERNELS_VLLM", asked)
    plugin.register()
    plugin.register()
    path = "llmkernels.integrations.vllm_attention.Backend"
    assert registered == [("CPU_ATTN", path), ("CUSTOM", path)] * 2


def test_another_wish_is_an_error(monkeypatch, registered):
    monkeypatch.setenv("LLMKERNELS_VLLM", "yes")
    with pytest.raises(ValueError, match="LLMKERNELS_VLLM is 'yes'; set it to 1, to checked, or not at all"):
        plugin.register()


def test_its_variable_is_no_op_for_the_dispatch(monkeypatch):
    """LLMKERNELS_<OP> names a backend for an op; this one does not."""
    monkeypatch.setenv("LLMKERNELS_VLLM", "1")
    llmkernels.rms_norm(torch.ones(2, 8), torch.ones(8))


def test_a_worker_tells_its_ledger():
    worker = plugin.WorkerLedger()
    llmkernels.rms_norm(torch.ones(2, 8), torch.ones(8))
    assert sum(row["calls"] for row in worker.llmkernels_ledger()["rms_norm"].values()) == 1
    worker.llmkernels_forget()
    assert worker.llmkernels_ledger() == {}
