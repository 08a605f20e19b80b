"""What is built is the tree: wheel, source archive and editable install carry every pass and target."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import onnx_ir as ir
import pytest
from decoders import tiny_decoder

ROOT = Path(__file__).parent.parent
PACKAGES = {"porter": "porter", "passes": "porter/passes", "targets": "porter/targets"}
MADE = shutil.ignore_patterns(
    ".git", ".venv", ".demo", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env=_clean())
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def _shipped(top: Path) -> set[str]:
    """Files of the three folders under their installed names."""
    return {
        f"{package}/{file.relative_to(top / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for file in (top / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, to build in."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "porter", ignore=MADE))


@pytest.fixture(scope="module")
def dist(tree: Path) -> Path:
    """The source archive, and the wheel that is built from it (and not from the tree)."""
    _run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of two layers."""
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    ir.save(tiny_decoder(), path)
    return path


def _environment(folder: Path) -> Path:
    """A fresh venv that sees the installed dependencies, but no porter; its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    # Lines of a .pth add folders without running the .pth files in them, so the editable porter stays unseen.
    lines = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(lines))
    return python


def _install(python: Path, *what: str | Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet")
    _run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has the wheel."""
    python = _environment(tmp_path_factory.mktemp("wheel") / "venv")
    _install(python, next(dist.glob("*.whl")))
    return python.parent


def test_the_wheel_holds_the_tree_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = {n for n in wheel.namelist() if not n.endswith("/")}
    shipped = {n for n in names if ".dist-info/" not in n}
    assert shipped == _shipped(ROOT)
    assert {"porter/py.typed", "porter/targets/host.toml", "porter/report/report.html.j2"} <= shipped
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)


def test_the_source_archive_holds_the_tree(dist: Path, tree: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    folders = ("porter", "passes", "targets", "tests", "samples", "docs", ".ci")
    wanted = {f.relative_to(tree).as_posix() for d in folders for f in (tree / d).rglob("*") if f.is_file()}
    wanted |= {"pyproject.toml", "README.md", "LICENSE", "Makefile", "MANIFEST.in"}
    assert wanted - names == set()


def test_the_wheel_works_elsewhere(installed: Path, model: Path, tmp_path: Path) -> None:
    where = _run(installed / "python", "-c", "import porter; print(porter.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent), "another porter was imported"
    porter = installed / "porter"
    passes = {row["name"] for row in json.loads(_run(porter, "passes", "--json", cwd=tmp_path))}
    assert passes == {
        ".".join(f.relative_to(ROOT / "passes").with_suffix("").parts)
        for f in (ROOT / "passes").rglob("[!_]*.py")
    }
    targets = {row["name"] for row in json.loads(_run(porter, "targets", "--json", cwd=tmp_path))}
    assert targets == {f.stem for f in (ROOT / "targets").glob("*.toml")}
    report = json.loads(_run(porter, "convert", model, "-o", "bundle", "--json", cwd=tmp_path))
    assert report["ok"] is True
    assert json.loads(_run(porter, "verify", "bundle", "--json", cwd=tmp_path))["ok"] is True


def test_the_core_converts_without_torch(installed: Path, model: Path, tmp_path: Path) -> None:
    program = f"""
import sys
for name in ("torch", "transformers", "safetensors"):
    sys.modules[name] = None  # importing it raises ImportError
from pathlib import Path
from porter.convert import Options, convert
report = convert(Path({str(model)!r}), Path("bundle"), Options(weights="int8", kv="int8"))
assert report.ok
assert not any(name.startswith("torch.") for name in sys.modules)
"""
    _run(installed / "python", "-c", program, cwd=tmp_path)


def test_an_editable_install_sees_passes_as_they_come(tree: Path, tmp_path: Path) -> None:
    python = _environment(tmp_path / "venv")
    _install(python, "--editable", tree)
    porter = python.with_name("porter")
    before = {row["name"] for row in json.loads(_run(porter, "passes", "--json", cwd=tmp_path))}
    assert "fuse.attention" in before
    new = tree / "passes" / "clean" / "nothing.py"
    new.write_text((tree / "passes" / "clean" / "dead.py").read_text("utf-8"))
    try:
        after = {row["name"] for row in json.loads(_run(porter, "passes", "--json", cwd=tmp_path))}
    finally:
        new.unlink()
    assert after - before == {"clean.nothing"}
    targets = {row["name"] for row in json.loads(_run(porter, "targets", "--json", cwd=tmp_path))}
    assert targets == {file.stem for file in (tree / "targets").glob("*.toml")}
