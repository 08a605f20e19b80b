"""Bundle: the folder that a conversion makes. Write it whole or not at all, open it, verify it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter.decoder import CacheTensor, Decoder
from porter.errors import BundleError, EnvironmentFailure

if TYPE_CHECKING:
    from porter.run.protocol import Runner
    from porter.tokenizer import Tokenizer

FORMAT = 1
MANIFEST, MODEL, REPORT = "manifest.json", "model.onnx", "report"
# Reports tell how long things took, so they differ from run to run; all else is a function of the input.
UNLISTED = ("manifest.json", "report.json", "report.html", "report.junit.xml")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `manifest` holds digests, pipeline text, target, versions, seed and decoder."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Read the manifest and see that every file is there in its full size.

        Raises BundleError PORT-0510 when it is no bundle, PORT-0511 when it is of another format version,
        PORT-0512 when a file is missing or cut short. `verify` also reads and digests every file.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            version, files = manifest["format"], manifest["files"]
            inside = all(not Path(f).is_absolute() and ".." not in Path(f).parts for f in files)
            if not (inside and isinstance(manifest["decoder"], dict)):
                raise ValueError(MANIFEST)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError("PORT-0510", "this is not a porter bundle", where=str(path)) from error
        if version != FORMAT:
            what = f"the bundle is of format {version}; this porter reads {FORMAT}"
            raise BundleError("PORT-0511", what, where=str(path), hint="convert again")
        for name, entry in files.items():
            file = path / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise BundleError("PORT-0512", "a file is missing or has another size", where=str(file))
        return cls(path, manifest)

    def verify(self) -> int:
        """Digest every listed file, and count them. Raises BundleError PORT-0513 at the first wrong one."""
        for name, entry in self.manifest["files"].items():
            if _sha256(self.path / name) != entry["sha256"]:
                raise BundleError(
                    "PORT-0513", "the file is not what was written", where=str(self.path / name)
                )
        return len(self.manifest["files"])

    @property
    def model(self) -> Path:
        """The model after its passes."""
        return self.path / MODEL

    @property
    def decoder(self) -> Decoder:
        """What the lowered program's inputs and outputs mean."""
        entry = dict(self.manifest["decoder"])
        caches = tuple(CacheTensor(**c) for c in entry.pop("caches"))
        return Decoder(caches=caches, **{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})

    def runner(self) -> Runner:
        """The lowered program, ready to run."""
        from porter.run.opening import opened

        return opened(self.path)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was beside the model, if one was."""
        from porter import tokenizer

        folder = self.path / "tokenizer"
        return tokenizer.load(folder) if folder.is_dir() else None


def write_manifest(folder: Path, decoder: Decoder, facts: dict[str, Any]) -> None:
    """List and digest every file of `folder` but the reports; `facts` are the caller's entries."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in UNLISTED)
    listed = {
        f.relative_to(folder).as_posix(): {"sha256": _sha256(f), "bytes": f.stat().st_size} for f in files
    }
    manifest = {"format": FORMAT, **facts, "decoder": asdict(decoder), "files": listed}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    A bundle that stands at `out` is replaced; anything else there is left alone. Folders that killed
    conversions left beside `out` are removed. Raises BundleError PORT-0514 when `out` cannot be replaced,
    EnvironmentFailure PORT-0901 when the disk is full, PORT-0903 when the folder cannot be written.
    """
    out = out.absolute()
    _check_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out)
        folder = out.parent / f".{out.name}.porter-{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise EnvironmentFailure(
            "PORT-0903", f"cannot write there: {error.strerror}", where=str(out)
        ) from error
    try:
        yield folder
        _swap(folder, out)
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise EnvironmentFailure("PORT-0901", "the disk is full", where=str(out.parent)) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_replaceable(out: Path) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise BundleError("PORT-0514", "there is something else with this name", where=str(out))
    if not any(out.iterdir()):
        return
    try:
        Bundle.open(out)
    except BundleError as error:
        if error.code == "PORT-0510":  # a damaged or older bundle is still one, and may be replaced
            what = "the folder is not empty and not a bundle"
            raise BundleError("PORT-0514", what, where=str(out), hint="choose another -o") from error


def remove_stale(out: Path) -> None:
    """Folders of conversions to `out` whose process is gone, and of a swap that was cut off."""
    for folder in out.parent.glob(f".{out.name}.porter-*"):
        pid = folder.name.rsplit("-", 1)[-1]
        if pid.isdigit() and not _alive(int(pid)):
            old = folder / "replaced"
            if old.is_dir() and not out.exists():
                old.rename(out)  # killed between the two renames of a swap: the old bundle is still good
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(folder: Path, out: Path) -> None:
    """`folder` becomes `out`; what stood there goes last."""
    if not out.exists():
        folder.rename(out)
        return
    aside = folder.with_name(folder.name.replace(f"-{os.getpid()}", f"-old-{os.getpid()}"))
    aside.mkdir()
    try:
        out.rename(aside / "replaced")
        folder.rename(out)
    finally:
        if not out.exists() and (aside / "replaced").exists():
            (aside / "replaced").rename(out)
        shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
