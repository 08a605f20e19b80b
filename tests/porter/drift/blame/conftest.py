"""The trained decoders, exported once."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="session")
def exported(models: Path, tmp_path_factory: pytest.TempPathFactory) -> "Exported":
    """exported[name]: the ONNX file of a trained decoder."""
    pytest.importorskip("transformers", reason="needs the extra porter[export]")
    return Exported(models, tmp_path_factory.mktemp("decoders"))


class Exported(dict):
    """Exports a model when it is first asked for."""

    def __init__(self, models: Path, folder: Path) -> None:
        self._models, self._folder = models, folder

    def __missing__(self, name: str) -> Path:
        from porter.export import export

        self[name] = self._folder / name / "model.onnx"
        self[name].parent.mkdir()
        os.environ["BITLLAMA"] = str(self._models / "bitllama-3m")
        own = ROOT / "samples" / "02-own-model" / "bitllama.py"  # Hugging Face has no such model
        export(f"{own}:bitllama" if name == "bitllama-3m" else str(self._models / name), self[name])
        return self[name]
