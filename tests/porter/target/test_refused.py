"""What a target's file may not be: mutations of every key of every built-in file, and parts that disagree."""

from __future__ import annotations

import copy
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from porter import target
from porter.errors import SpecError
from porter.target import units
from porter.target.figure import KINDS
from porter.target.reading import checked

ROOT = Path(__file__).parents[3]
CHIPS = [n for n in target.names() if n != "host"]
Path_ = tuple[str | int, ...]


def raw(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / "targets" / f"{name}.toml").read_text("utf-8"))


def walk(part: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every table and value below `part`; figures are not entered."""
    entries = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in entries:
        yield (*path, key), value
        if not (isinstance(value, dict) and "value" in value):
            yield from walk(value, (*path, key))


def figures(keys: dict[str, Any]) -> list[tuple[Path_, dict[str, Any]]]:
    return [(p, v) for p, v in walk(keys) if isinstance(v, dict) and "value" in v]


def changed(keys: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """A copy with another value at `path`; None takes the key out."""
    new = copy.deepcopy(keys)
    part = new
    for key in path[:-1]:
        part = part[key]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return new


def refusal(keys: dict[str, Any]) -> SpecError:
    with pytest.raises(SpecError) as error:
        checked(keys, "my.toml")
    assert error.value.where == "my.toml"
    assert "\n" not in str(error.value)
    return error.value


def dotted(path: Path_) -> str:
    return ".".join(map(str, path))


def wrong_units(figure: dict[str, Any], unit: str) -> Iterator[Any]:
    """The same figure with its unit dropped, misspelt, or that of every other kind of quantity."""
    number = figure["value"].split()[0]
    yield number
    yield float(number.replace(",", ""))
    yield f"{number} parsec"
    yield f"{number}{figure['value'].split()[1]}"  # no space
    yield from (f"{number} {other}" for other in units.UNITS if other != unit)


def impossible(value: Any, unit: str) -> Iterator[Any]:
    """Values that the figure cannot have, by what kind it is."""
    if unit:
        written = value.split()[1]
        yield from (f"{n} {written}" for n in ("0", "-1", "-0.5", "nan", "inf", "-inf", "many"))
    elif isinstance(value, bool):
        yield from ("yes", 1, 0)
    elif isinstance(value, int):
        yield from (0, -1, 1.5, math.nan, math.inf, True, "3", [3], 1 << 41)
    elif isinstance(value, float):
        yield from (0, 0.0, -0.1, 1.01, math.nan, math.inf, True, "half")
    elif isinstance(value, list) and isinstance(value[0], int):
        yield from ([], value[:-1], [*value, 1], [0, *value[1:]], [*value[:-1], -1], [*value[:-1], 0.5], value[0])
    elif isinstance(value, list):
        yield from ([], [""], [3], "fp32", 3)
    else:
        yield from ("", 3, True, ["fp32"])


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_of_every_file_is_mutated(name: str) -> None:
    """The tests below walk the file; this holds them to what the code calls figures."""
    spec = target.load(name)
    assert {dotted(p) for p, _ in figures(raw(name))} == {p for p, _ in target.figures(spec)}
    assert len(figures(raw(name))) >= (15 if name == "webgpu" else 45)


@pytest.mark.parametrize("name", CHIPS)
def test_a_unit_that_is_dropped_or_of_another_kind_is_refused(name: str) -> None:
    keys, found, tried = raw(name), dict(target.figures(target.load(name))), 0
    for path, figure in figures(keys):
        unit = found[dotted(path)].unit
        if not unit:
            continue
        for value in wrong_units(figure, unit):
            error = refusal(changed(keys, (*path, "value"), value))
            glued = isinstance(value, str) and value == figure["value"].replace(" ", "")
            assert error.code == ("PORT-0304" if glued else "PORT-0303"), (path, value)
            assert error.what.startswith(f"{dotted(path)}: "), (path, value)
            tried += 1
    assert tried >= 5 * 10


@pytest.mark.parametrize("name", CHIPS)
def test_an_impossible_value_is_refused(name: str) -> None:
    keys, found, tried = raw(name), dict(target.figures(target.load(name))), 0
    for path, figure in figures(keys):
        for value in impossible(figure["value"], found[dotted(path)].unit):
            error = refusal(changed(keys, (*path, "value"), value))
            assert error.code == "PORT-0304", (path, value)
            assert error.what.startswith(f"{dotted(path)}: "), (path, value)
            tried += 1
    assert tried >= 3 * len(figures(keys))


@pytest.mark.parametrize("name", CHIPS)
def test_a_figure_says_once_how_it_is_known(name: str) -> None:
    keys = raw(name)
    for path, figure in figures(keys):
        kind = next(k for k in KINDS if k in figure)
        other = next(k for k in KINDS if k not in figure)
        mutants = [
            {"value": figure["value"]},
            figure | {other: "so it is said"},
            figure | {kind: ""},
            figure | {kind: "  "},
            figure | {kind: 3},
            {"value": figure["value"], "published": "NOBODY"},
            {"value": figure["value"], "derived": "twice the other [NOBODY]"},
            {"value": figure["value"], "derived": "it follows"},
            {"value": figure["value"], "assumed": "as elsewhere [NOBODY]"},
            figure["value"],
        ]
        for mutant in mutants:
            error = refusal(changed(keys, path, mutant))
            assert error.code == "PORT-0305", (path, mutant)
            assert error.what.startswith(f"{dotted(path)}: "), (path, mutant)
        for mutant in (figure | {"unit": "B"}, {k: v for k, v in figure.items() if k != "value"}):
            error = refusal(changed(keys, path, mutant))
            assert error.code == "PORT-0302", (path, mutant)
            assert f"{dotted(path)}: " in error.what


@pytest.mark.parametrize("name", CHIPS)
def test_an_unknown_key_is_refused_wherever_it_stands(name: str) -> None:
    keys, tried = raw(name), 0
    tables = [((), keys), *((p, v) for p, v in walk(keys) if isinstance(v, dict) and "value" not in v)]
    for path, _ in tables:
        error = refusal(changed(keys, (*path, "bandwith"), {"nonsense": 1}))
        assert error.code == "PORT-0302", path
        assert dotted((*path, "bandwith")) in error.what, path
        tried += 1
    assert tried >= 5


@pytest.mark.parametrize("name", CHIPS)
def test_a_key_that_is_taken_out_is_missed_or_may_be_absent(name: str) -> None:
    """The error names what was taken out; where there is none, the target still loads without it."""
    keys, missed = raw(name), 0
    for path, _ in walk(keys):
        if isinstance(path[-1], int):
            continue
        try:
            checked(changed(keys, path, None), "my.toml")
        except SpecError as error:
            assert error.code in ("PORT-0302", "PORT-0305", "PORT-0306", "PORT-0307"), path
            assert str(path[-1]) in error.what, (path, error.what)
            missed += 1
    assert missed >= 10


@pytest.mark.parametrize(
    ("name", "path", "value", "code", "what"),
    [
        ("h100", ("memory", "l2", "count"), {"value": 2, "published": "G2"}, "PORT-0306", "memory.l2.count: the chip"),
        ("h100", ("memory", "l2", "size"), {"value": "90 GB", "published": "G2"}, "PORT-0306", "memory.l2.size: larger"),
        ("trainium1", ("memory", "sbuf", "size"), {"value": "64 GiB", "published": "N4"}, "PORT-0306", "memory.sbuf.size"),
        ("maia-200", ("memory", "tsram", "count"), {"value": 2, "published": "M2b"}, "PORT-0306", "memory.tsram.count"),
        ("trainium1", ("matrix", "reads"), "sram", "PORT-0306", "matrix.reads: there is no level 'sram'"),
        ("trainium1", ("matrix", "accumulates"), "sram", "PORT-0306", "matrix.accumulates"),
        ("trainium1", ("dma", "hbm", "to"), "cache", "PORT-0306", "dma.hbm.to: there is no level 'cache'"),
        ("trainium1", ("dma", "hbm", "to"), "hbm", "PORT-0306", "dma.hbm.to: hbm does not stand inside hbm"),
        ("trainium1", ("matrix", "formats", "bf16", "rate"), {"value": "19 TFLOP/s", "published": "N1"}, "PORT-0306",
         "matrix.formats.bf16.rate: 19 TFLOP/s, but units, clock, step and cycles make 183.5 TFLOP/s"),
        ("trainium1", ("matrix", "units"), {"value": 1, "published": "N1"}, "PORT-0306", "matrix.formats.fp32.rate"),
        ("h100", ("matrix", "formats", "int8", "accumulator"), {"value": "fp16", "published": "G2"}, "PORT-0306",
         "matrix.formats.int8.accumulator: sums of integers do not fit fp16"),
        ("h100", ("matrix", "formats", "bf16", "accumulator"), {"value": "int32", "published": "G2"}, "PORT-0306",
         "matrix.formats.bf16.accumulator"),
        ("maia-200", ("matrix", "mixed", 0, "weights"), "int4", "PORT-0306", "matrix.mixed.0.weights"),
        ("webgpu", ("limits", "binding-size"), {"value": "1 GiB", "published": "W1"}, "PORT-0306", "limits.binding-size"),
        ("webgpu", ("limits", "offset-alignment"), {"value": "200 B", "published": "W1"}, "PORT-0304",
         "limits.offset-alignment: '200 B' is not a power of two"),
        ("trainium1", ("limits", "alignment"), {"value": "48 B", "published": "N4"}, "PORT-0304", "limits.alignment"),
        ("webgpu", ("limits", "invocations"), {"value": 128, "published": "W1"}, "PORT-0306", "limits.workgroup"),
        ("h100", ("limits", "resident"), {"value": 512, "published": "CUDA"}, "PORT-0306", "limits.resident"),
        ("h100", ("links", "nvlink", "topology"), "torus-2d", "PORT-0306", "links.nvlink.ports: the key is missing"),
        ("h100", ("links", "nvlink", "topology"), "star", "PORT-0302", "links.nvlink.topology"),
        ("h100", ("numerics", "widened", "int"), {"value": "fp8-e4m3fn", "published": "G2"}, "PORT-0307",
         "numerics.widened.int: not every number of int8 is one of fp8-e4m3fn: it is emulated"),
        ("h100", ("numerics", "widened", "int"), {"value": "int4", "published": "G2"}, "PORT-0307", "'int4' is not native"),
        ("h100", ("numerics", "widened", "int5"), {"value": "bf16", "published": "G2"}, "PORT-0307",
         "numerics.widened.int5: 'int5' is neither a number format nor a class"),
        ("h100", ("numerics", "emulated", "fp8"), {"value": "bf16", "published": "G2"}, "PORT-0307",
         "numerics.emulated.fp8: it is widened too"),
        ("tpu-v5e", ("numerics", "widened", "fp32"), {"value": "bf16", "published": "J1"}, "PORT-0307",
         "numerics.widened.fp32: not every number of fp32"),
        ("h100", ("vector", "formats"), {"value": ["fp99"], "published": "SB"}, "PORT-0307", "vector.formats"),
        ("h100", ("matrix", "formats", "fp99"), "as bf16", "PORT-0302", "matrix.formats.fp99"),
        ("h100", ("aliases", "fp8"), "fp8-e9m9", "PORT-0307", "aliases.fp8: the kernels do not read 'fp8-e9m9'"),
        ("h100", ("weights",), ["fp32", "float7"], "PORT-0307", "weights: there is no number format 'float7'"),
        ("h100", ("efficiency", "gemm", "bf16"), {}, "PORT-0306", "efficiency.gemm.bf16: it says nothing"),
        ("h100", ("efficiency", "gemm", "bf99"), {"memory": {"value": 0.5, "assumed": "so"}}, "PORT-0307",
         "efficiency.gemm.bf99"),
        ("h100", ("price", "date"), "2026-11-22", "PORT-0302", "price.date"),
        ("h100", ("price", "basis"), "", "PORT-0302", "price.basis"),
        ("h100", ("price", "terms"), "stolen", "PORT-0302", "price.terms"),
        ("h100", ("price", "per-hour"), {"value": "6.88 /h", "published": "P1"}, "PORT-0303", "price.per-hour"),
        ("h100", ("sources", "G2"), " ", "PORT-0305", "sources.G2"),
        ("h100", ("family",), "gpu", "PORT-0302", "family"),
        ("h100", ("family",), "tile", "PORT-0306", "dma: a target of family tile must have it"),
        ("trainium1", ("family",), "simt", "PORT-0306", "limits.workgroup: a target of family simt must have it"),
        ("h100", ("tvm", "arch"), 1.5, "PORT-0302", "tvm.arch"),
    ],
)  # fmt: skip
def test_parts_that_disagree(name: str, path: Path_, value: Any, code: str, what: str) -> None:
    error = refusal(changed(raw(name), path, value))
    assert error.code == code, error
    assert what in error.what


def test_a_misspelt_key_is_told_its_neighbour() -> None:
    error = refusal(changed(raw("h100"), ("memory", "hbm", "bandwith"), {"value": "1 TB/s", "published": "G2"}))
    assert (error.code, error.hint) == ("PORT-0302", "is bandwidth meant?")
    assert error.what == "not a target description: memory.hbm.bandwith: there is no such key"


@pytest.mark.parametrize(
    "text",
    [b"", b"name = ", b"\xff\xfe", b"name = 3", b"[[name]]", b"a = " + b"[" * 5000, b"x = 1\nx = 2", b'family = "simt"'],
)
def test_files_that_are_no_targets(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "chip.toml"
    path.write_bytes(text)
    with pytest.raises(SpecError) as error:
        target.load(str(path))
    assert error.value.code == "PORT-0302"


@pytest.mark.parametrize("name", ["nowhere", "missing.toml", "", "../h100", "h100.TOML"])
def test_targets_that_are_not_there(name: str) -> None:
    with pytest.raises(SpecError) as error:
        target.load(name)
    assert error.value.code == "PORT-0301"
