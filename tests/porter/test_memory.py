"""The memory limit: read, predicted, kept; what is mapped is dropped."""

from __future__ import annotations

import json
import mmap
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from porter import graph, memory, needs
from porter.convert import Options, convert
from porter.drift import measure as measuring
from porter.errors import EnvironmentFailure, OptionError

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", 0),
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("7B", 7),
        (" 2TiB ", 2 << 40),
        ("1kb", 1000),
    ],
)
def test_amounts(text: str, size: int) -> None:
    assert memory.parse(text) == size


@pytest.mark.parametrize("text", [" ", "4", "4G", "GiB", "-1GiB", "0MiB", "1,5GiB", "4GiB!", "1e3MB"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(OptionError, match="PORT-0904"):
        memory.parse(text)


def test_the_watch_sees_memory_come_and_go() -> None:
    with memory.Watch() as watch:
        watch.enter("small")
        time.sleep(0.05)
        watch.enter("large")
        before, block = memory.usage().anonymous, np.ones(80 * MIB, np.uint8)
        time.sleep(0.1)
        del block
        watch.enter("after")
    assert watch.peaks["large"].anonymous - before >= 78 * MIB  # the kernel counts in batches of pages
    assert watch.peaks["small"].anonymous < before + 2 * MIB
    assert watch.peak.anonymous == watch.peaks["large"].anonymous


def test_a_limit_that_was_not_kept_is_an_error_of_the_stage_before() -> None:
    with memory.Watch(memory.usage().anonymous + 20 * MIB) as watch:
        watch.enter("fine")
        block = np.ones(60 * MIB, np.uint8)
        with pytest.raises(EnvironmentFailure, match="PORT-0906: fine took"):
            watch.enter("next")
        del block


def test_mapped_pages_are_dropped_and_stay_readable(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 16) * 1600)  # 100 MiB
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    memory.mapped.add(mapping)
    view = np.frombuffer(mapping, np.uint8)
    before = memory.usage().resident  # whatever else this process holds: a limit 20 MiB above it
    with memory.Watch(before + 20 * MIB):
        sums = []
        for at in range(0, view.size, MIB):
            sums.append(int(view[at : at + MIB].sum()))
            time.sleep(0.002)
        # From 80 % of the limit on pages are dropped at each look, and a few MiB come in between two.
        assert memory.usage().resident < before + 50 * MIB
    assert len(set(sums)) == 1  # every MiB holds the same, whatever was dropped in between
    resident = memory.usage().resident
    int(view.sum())
    assert memory.usage().resident > resident + 50 * MIB  # without a limit pages stay
    memory.drop()
    assert memory.usage().resident < resident + 20 * MIB


def sizes(**changes: int) -> needs.Sizes:
    given = {"weights": 4 << 30, "largest": 256 << 20, "nodes": 700, "rows": 1, "tokens": 64}
    given |= {"cached": 1 << 15, "wide": 8192, "vocabulary": 32000}
    return needs.Sizes(**(given | changes))


def test_whole_models_are_opened_where_there_is_room() -> None:
    assert needs.plan(sizes(), 16 << 30).piece == 0
    streamed = needs.plan(sizes(), 3 << 30)
    assert needs.PIECES[0] <= streamed.piece <= needs.PIECES[1]
    assert streamed.peak <= 3 << 30 < needs.plan(sizes(), 16 << 30).peak


def test_a_limit_that_is_too_small_says_what_would_do() -> None:
    with pytest.raises(
        EnvironmentFailure, match=r"PORT-0905: the stage lower would take .* allows 900 MiB"
    ) as caught:
        needs.plan(sizes(), 900 << 20)
    least = max(needs.stages(sizes(), needs.PIECES[0]).values())
    assert memory.shown(least) in str(caught.value)
    assert needs.plan(sizes(), least).peak <= least


def test_more_of_anything_never_takes_less() -> None:
    for name in ("weights", "largest", "nodes", "rows", "tokens", "cached", "wide", "vocabulary"):
        for piece in (0, 64 << 20):
            more = needs.stages(sizes(**{name: 2 * getattr(sizes(), name)}), piece)
            assert all(more[stage] >= size for stage, size in needs.stages(sizes(), piece).items()), name


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of 300 MB in float32, written to disk without ever being in memory."""
    from decoders import Builder, tiny_decoder

    folder = tmp_path_factory.mktemp("wide")
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)

    def noise(b: Builder, name: str, *shape: int, scale: float | None = None) -> ir.Value:
        def make() -> ir.Tensor:
            factor = np.float32(shape[-1] ** -0.5 if scale is None else scale)
            return ir.Tensor(np.resize(block * factor, shape), name=name)

        lazy = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
        kind = ir.TensorType(lazy.dtype)
        return b.weights.setdefault(name, ir.Value(name=name, const_value=lazy, type=kind, shape=lazy.shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "noise", noise)
        size = {
            "layers": 6,
            "hidden": 1024,
            "heads": 16,
            "kv_heads": 4,
            "head_size": 64,
            "ffn": 2816,
            "vocab": 4000,
        }
        model = tiny_decoder(**size, tied=False, fused=False)
    graph.save(model, folder / "model.onnx")
    (folder / "feeds.json").write_text(json.dumps(list(range(3, 28))))
    return folder / "model.onnx"


def command(model: Path, out: Path, limit: str) -> list[str]:
    feeds = str(model.parent / "feeds.json")
    options = ["--weights", "int4-g32", "--data", feeds, "--max-memory", limit, "--json"]
    return [sys.executable, "-m", "porter", "convert", str(model), "-o", str(out), *options]


def test_the_promise_holds(wide: Path, tmp_path: Path) -> None:
    """300 MB of weights convert within 560 MiB: predicted, enforced from outside, and reported.

    RLIMIT_DATA refuses any private memory beyond it, touched or not, so it is set 512 MiB above the limit:
    threads reserve stacks of 8 MiB, and the loader and the allocator arenas that stay untouched.
    """
    limit = 560 << 20
    done = subprocess.run(
        command(wide, tmp_path / "out", "560MiB"),
        capture_output=True,
        text=True,
        env={**os.environ, "PORTER_THREADS": "2", "MALLOC_ARENA_MAX": "2"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit + (512 << 20),) * 2),
    )
    assert done.returncode == 0, done.stderr
    found = {name: f["value"] for name, f in json.loads(done.stdout)["memory"].items()}
    assert found["peak memory"] <= found["peak memory, predicted"] <= found["peak memory, limit"] == limit
    assert found["peak memory, mapped files included"] <= 1.2 * limit  # pages come in while others go
    assert found["peak memory"] > 100 << 20  # it counts something


def test_a_limit_that_is_too_small_refuses_before_anything_is_written(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = subprocess.run(command(wide, out, "300MiB"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "PORT-0905" in done.stderr
    assert not out.parent.exists()


def test_streamed_and_opened_measure_the_same(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bundle, and the same logits from the pieces as from the whole: ONNX Runtime computes each
    operator by itself either way, so not a bit may differ when the port decodes as many tokens."""
    monkeypatch.setattr(measuring, "FEW_STEPS", measuring.STEPS)
    share = {"streamed": 0.0, "opened": 1.0}  # of free memory that models may be opened in
    feeds = str(wide.parent / "feeds.json")
    reports = []
    for name, part in share.items():
        monkeypatch.setattr(needs, "SHARE", part)
        reports.append(convert(wide, tmp_path / name, Options(weights="int4-g32", data=feeds)))
    assert reports[0].drift == reports[1].drift
    assert reports[0].phases == reports[1].phases
    for name in ("model.onnx", "model.onnx.data", "manifest.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "opened" / name).read_bytes(), name
