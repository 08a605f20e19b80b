"""Fixtures that several tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of trained models: $PORTER_MODELS, or shared/models beside the checkout."""
    folder = Path(os.environ.get("PORTER_MODELS", ROOT.parent / "shared" / "models"))
    if not folder.is_dir():
        pytest.skip("no trained models: set PORTER_MODELS")
    return folder


@pytest.fixture(scope="session")
def stories_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """samples/stories260k, a trained Llama, exported once, its tokenizer beside it. Read only."""
    pytest.importorskip("transformers", reason="needs the extra porter[export]")
    from porter.export import export

    path = tmp_path_factory.mktemp("stories") / "model.onnx"
    export(str(ROOT / "samples" / "stories260k"), path)
    return path
