"""What every test starts from: no wishes in the environment, nothing remembered, a cache folder of its own."""

import os

import pytest
from hypothesis import HealthCheck, settings

for name in [name for name in os.environ if name.startswith("LLMKERNELS_")]:
    del os.environ[name]  # what the developer's shell asks for must not decide what is tested
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small arrays: on a busy machine a second thread is mostly waited for
os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """First-use verdicts and measured limits of this run, not of the developer's home."""
    os.environ["LLMKERNELS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Every test chooses its backends anew and counts from zero."""
    from llmkernels import discovery, ledger
    from llmkernels import settings as wishes

    wishes.environment.cache_clear()
    discovery.forget_all()
    ledger.reset()
