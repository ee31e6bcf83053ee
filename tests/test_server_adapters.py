"""Adapters as models of the server: chosen by name, loaded and unloaded by clients where that is allowed."""

import json

import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient

import llmkernels
from llmkernels.engine import LLM, SamplingParams
from llmkernels.server.app import create_app

NAME, PROMPT = "manual", "The read() system call"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """adapters/one, adapters/two, and one that lies outside."""
    root = tmp_path_factory.mktemp("server")
    for number, path in enumerate(("adapters/one", "adapters/two", "outside")):
        (root / path).mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(6):
            at = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_"
            tensors[f"{at}A.weight"] = 0.2 * torch.randn(2, 768, generator=generator)
            tensors[f"{at}B.weight"] = 0.2 * torch.randn(256, 2, generator=generator)
        save_file(tensors, root / path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (root / path / "adapter_config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def client(folder):
    with llmkernels.use(policy="silent"):
        llm = LLM(dtype="float32", max_length=128)
        llm.load_adapter("one", folder / "adapters" / "one")
        with TestClient(create_app(llm, NAME, adapter_folder=folder / "adapters")) as client:
            yield client


def say(client, model, **more):
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | more
    return client.post("/v1/completions", json=body)


def test_the_model_of_a_request_is_its_adapter(client, folder):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [NAME, "one"]
    assert client.get("/v1/models/one").json()["id"] == "one"
    direct = LLM(dtype="float32", max_length=128)
    direct.load_adapter("one", folder / "adapters" / "one")
    for model, adapter in ((NAME, None), ("one", "one")):
        want = direct.generate(PROMPT, SamplingParams(max_tokens=12), adapter=adapter)[0].text
        answer = say(client, model).json()
        assert (answer["model"], answer["choices"][0]["text"]) == (model, want)
    refused = say(client, "three")
    assert refused.status_code == 404
    assert "there is no model 'three'; this server has 'manual', 'one'" in refused.json()["error"]["message"]


def test_clients_load_and_unload(client):
    assert say(client, "two").status_code == 404
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "two", "lora_path": "two"})
    assert loaded.status_code == 200, loaded.text
    assert say(client, "two").json()["choices"][0]["text"] != say(client, NAME).json()["choices"][0]["text"]
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 200
    assert say(client, "two").status_code == 404


@pytest.mark.parametrize(
    ("route", "body", "words"),
    [
        ("load", {"lora_name": "x", "lora_path": "../outside"}, "leads out of the server's adapter folder"),
        ("load", {"lora_name": "x", "lora_path": "/"}, "leads out of"),
        ("load", {"lora_name": "x", "lora_path": "a\0b"}, "leads out of"),
        ("load", {"lora_name": "x", "lora_path": "nowhere"}, "nowhere is not a directory"),
        ("load", {"lora_name": "one", "lora_path": "one"}, "adapter 'one' is loaded already"),
        ("load", {"lora_name": NAME, "lora_path": "one"}, "the model's own name"),
        ("load", {"lora_name": "", "lora_path": "one"}, "lora_name"),
        ("unload", {"lora_name": "x"}, "there is no adapter 'x'"),
        ("unload", {"lora_name": "x", "force": True}, "force: unknown field"),
    ],
)
def test_what_is_refused(client, folder, route, body, words):
    answer = client.post(f"/v1/{route}_lora_adapter", json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert str(folder) not in answer.text


def test_without_a_folder_there_are_no_routes():
    app = create_app(LLM(dtype="float32", max_length=64), NAME)
    with TestClient(app) as client:
        body = {"lora_name": "x", "lora_path": "one"}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 404
