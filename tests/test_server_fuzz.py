"""Schemathesis over the server's own OpenAPI file: whatever the file allows, and much that it forbids, is answered as
the file says, and never with a failure of ours."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import llmkernels
from llmkernels.engine import LLM
from llmkernels.server.app import create_app
from llmkernels.server.chat import ChatTemplate

KEY = "key"
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
# of routes that take arguments
EXAMPLES = {"/v1/completions": 40, "/v1/chat/completions": 40, "/v1/embeddings": 20, "/v1/models/{model}": 20}


@pytest.fixture(scope="module")
def llm():
    with llmkernels.use(policy="silent"):
        return LLM(dtype="float32", page_size=4, kv_cache_pages=64, max_length=64)


@pytest.fixture(scope="module")
def api(llm):
    app = create_app(llm, "manual", template=ChatTemplate(TEMPLATE, {}), api_key=KEY)
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
def test_the_server_keeps_to_its_openapi_file(api, llm, mode):
    tried = 0
    for found in api.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES.get(operation.path, 2),
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case):
            nonlocal tried
            tried += 1
            case.headers["Authorization"] = f"Bearer {KEY}"
            case.call_and_validate(checks=CHECKS)

        if mode is GenerationMode.POSITIVE or operation.path in EXAMPLES:
            one()
    assert tried > 90
    llm.check()
