"""The trained decoders, exported once."""

from pathlib import Path

import pytest


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
        export(str(self._models / name), self[name])
        return self[name]
