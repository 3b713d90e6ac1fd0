"""What every test shares: Triton in its interpreter where there is no GPU, one thread, and one failure rate."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import jaxtyping
import ledger
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

# Shapes and types are checked at every call. Triton compiles a kernel from its source, so those files are left out.
(_FOUND,) = find_spec("discdiff").submodule_search_locations  # the checkout's, or an installed wheel's
jaxtyping.install_import_hook(
    [
        ".".join(("discdiff", *file.relative_to(_FOUND).with_suffix("").parts))
        for folder in (Path(_FOUND), *Path(_FOUND).iterdir())
        for file in folder.glob("*.py")
        if file.stem != "__init__" and not file.stem.startswith("triton_")
    ],
    "beartype.beartype",
)

# Every statistical check draws from a fixed seed and fails a correct program with this probability; with fewer than a
# hundred of them the suite as a whole does so with less than 1e-4.
FAILURE_RATE = 1e-6

hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ledger", help="write the largest error of every identity to this JSON file (run with -n 0)")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--ledger"):
        record = {"errors": ledger.WORST, "controls": ledger.CONTROLS}
        Path(session.config.getoption("--ledger")).write_text(json.dumps(record))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def failure_rate() -> float:
    return FAILURE_RATE


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' own shape checker, so that bad input meets the errors that users see."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
