"""Fixtures that several tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite what the golden tests expect")


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of trained models: $PORTER_MODELS, or shared/models beside the checkout."""
    folder = Path(os.environ.get("PORTER_MODELS", ROOT.parent / "shared" / "models"))
    if not folder.is_dir():
        pytest.skip("no trained models: set PORTER_MODELS")
    return folder
