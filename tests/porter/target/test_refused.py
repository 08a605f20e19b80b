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


def changed(keys: Any, path: Path_, value: Any) -> Any:
    """A copy with another value at `path`; None takes the key out."""
    new = copy.copy(keys)
    if len(path) > 1:
        new[path[0]] = changed(keys[path[0]], path[1:], value)
    elif value is None:
        del new[path[0]]
    else:
        new[path[0]] = value
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


def impossible(value: Any, unit: str, key: str) -> Iterator[Any]:
    """Values that the figure cannot have, by what kind it is."""
    if key == "overlap":
        yield from (0, 0.99, -4, 65, math.nan, math.inf, True, "4", [4])
    elif key == "points":
        yield from ([], value[:1], [*value, value[0]], [["2 KiB"], *value], [value[0], value[0]], value[0], 3)
        yield [value[0], ["1 TB", "1 ns"]]  # more in less time
    elif unit:
        written = value.split()[1]
        yield from (f"{n} {written}" for n in ("0", "-1", "-0.5", "nan", "inf", "-inf", "many"))
    elif isinstance(value, bool):
        yield from ("yes", 1, 0)
    elif isinstance(value, int):
        yield from (0, -1, 1.5, math.nan, math.inf, True, "3", [3], 1 << 41)
    elif isinstance(value, float):
        yield from (0, 0.0, -0.1, 1.01, math.nan, math.inf, True, "half")
    elif isinstance(value, list) and isinstance(value[0], int):
        yield from (
            [],
            value[:-1],
            [*value, 1],
            [0, *value[1:]],
            [*value[:-1], -1],
            [*value[:-1], 0.5],
            value[0],
        )
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
        for value in impossible(figure["value"], found[dotted(path)].unit, str(path[-1])):
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


def _tried(keys: dict[str, Any]) -> SpecError | None:
    try:
        checked(keys, "my.toml")
    except SpecError as error:
        return error
    return None


@pytest.mark.parametrize("name", CHIPS)
def test_a_key_that_is_taken_out_is_missed_or_may_be_absent(name: str) -> None:
    """The error names what was taken out; where there is none, the target still loads without it."""
    keys, missed = raw(name), 0
    for path, value in walk(keys):
        if isinstance(path[-1], int):
            continue
        table = isinstance(value, dict) and "value" not in value  # without it its own table may be at fault
        if (error := _tried(changed(keys, path, None))) is None:
            continue
        assert error.code in ("PORT-0302", "PORT-0305", "PORT-0306", "PORT-0307"), path
        assert any(str(key) in error.what for key in (path if table else path[-1:])), (path, error.what)
        missed += 1
    assert missed >= 10


def so(value: Any) -> dict[str, Any]:
    """A figure."""
    return {"value": value, "assumed": "so"}


MACHINE = [
    ("h100", "memory.l2.count", so(2), "the chip's own is there once"),
    ("h100", "memory.l2.size", so("90 GB"), "larger than hbm, which stands outside it"),
    ("trainium1", "memory.sbuf.size", so("64 GiB"), "larger than hbm"),
    ("maia-200", "memory.tsram.count", so(2), "fewer than of csram"),
    ("trainium1", "matrix.reads", "sram", "there is no level 'sram' in [memory]"),
    ("trainium1", "matrix.accumulates", "sram", "there is no level 'sram' in [memory]"),
    ("trainium1", "dma.hbm.to", "cache", "there is no level 'cache' in [memory]"),
    ("trainium1", "dma.hbm.to", "hbm", "hbm does not stand inside hbm"),
    ("trainium1", "dma.hbm.from", "psum", "sbuf does not stand inside psum"),
    (
        "trainium1",
        "matrix.formats.bf16.rate",
        so("19 TFLOP/s"),
        "19 TFLOP/s, but units, clock, step and cycles make 183.5 TFLOP/s",
    ),
    ("trainium1", "matrix.formats.bf16.step", so([128, 512, 256]), "make 367 TFLOP/s"),
    ("h100", "matrix.formats.int8.accumulator", so("fp16"), "sums of integers do not fit fp16"),
    ("h100", "matrix.formats.bf16.accumulator", so("int32"), "floats do not add up in int32"),
    ("maia-200", "matrix.mixed.0.weights", "int4", "'int4' is not in matrix.formats"),
    ("webgpu", "limits.binding-size", so("1 GiB"), "more than limits.buffer-size"),
    ("h100", "limits.resident", so(512), "a core does not hold one full workgroup"),
    ("h100", "efficiency.gemm.bf16", {}, "it says nothing: give compute, memory or fixed"),
    (
        "h100",
        "links.nvlink.collectives.all-reduce.nccl",
        {},
        "it says nothing: give latency, bandwidth or points",
    ),
]
FORMATS = [
    (
        "numerics.widened.int",
        so("fp8-e4m3fn"),
        "not every number of int8 is one of fp8-e4m3fn: it is emulated",
    ),
    ("numerics.widened.int", so("int4"), "'int4' is in neither matrix.formats nor vector.formats"),
    ("numerics.widened.int5", so("bf16"), "'int5' is neither a number format nor a class"),
    ("numerics.emulated.fp8", so("bf16"), "it is widened too"),
    ("numerics.widened.fp32", so("bf16"), "not every number of fp32 is one of bf16"),
    ("vector.formats", so(["fp99"]), "there is no number format 'fp99'"),
    ("aliases.fp8", "fp8-e9m9", "the kernels do not read 'fp8-e9m9'"),
    ("weights", ["fp32", "float7"], "there is no number format 'float7'"),
    ("efficiency.gemm.bf99", {"memory": so(0.5)}, "there is no number format 'bf99'"),
]
OTHERS = [
    ("webgpu", "limits.offset-alignment", so("200 B"), "PORT-0304", "'200 B' is not a power of two"),
    ("trainium1", "limits.alignment", so("48 B"), "PORT-0304", "'48 B' is not a power of two"),
    ("webgpu", "limits.invocations", so(128), "PORT-0306", "limits.workgroup: one dimension alone"),
    ("trainium1", "matrix.units", so(1), "PORT-0306", "matrix.formats.fp32.rate: 47.5 TFLOP/s, but"),
    ("h100", "links.nvlink.topology", "torus-2d", "PORT-0306", "links.nvlink.ports: the key is missing"),
    ("h100", "links.nvlink.topology", "star", "PORT-0302", "links.nvlink.topology"),
    ("h100", "matrix.formats.fp99", "as bf16", "PORT-0302", "matrix.formats.fp99"),
    ("h100", "price.date", "2026-11-22", "PORT-0302", "price.date"),
    ("h100", "price.basis", "", "PORT-0302", "price.basis"),
    ("h100", "price.terms", "stolen", "PORT-0302", "price.terms"),
    ("h100", "price.per-hour", so("6.88 /h"), "PORT-0303", "price.per-hour"),
    ("h100", "sources.G2", " ", "PORT-0305", "sources.G2"),
    ("h100", "family", "gpu", "PORT-0302", "family"),
    ("h100", "family", "tile", "PORT-0306", "dma: a target of family tile must have it"),
    ("trainium1", "family", "simt", "PORT-0306", "limits.workgroup: a target of family simt must have it"),
    ("h100", "tvm.arch", 1.5, "PORT-0302", "tvm.arch"),
    ("h100", "tvm", {"arch": "sm_90a"}, "PORT-0306", "tvm.kind: the key is missing"),
]
CASES = [
    *((name, p, v, "PORT-0306", what) for name, p, v, what in MACHINE),
    *(("h100", p, v, "PORT-0307", f"{p}: {what}") for p, v, what in FORMATS),
    *OTHERS,
]


@pytest.mark.parametrize(("name", "path", "value", "code", "what"), CASES)
def test_parts_that_disagree(name: str, path: str, value: Any, code: str, what: str) -> None:
    keys = [int(key) if key.isdigit() else key for key in path.split(".")]
    error = refusal(changed(raw(name), tuple(keys), value))
    assert error.code == code, error
    assert what in error.what
    assert path.split(".")[0] in error.what or path == "family"


def test_a_misspelt_key_is_told_its_neighbour() -> None:
    error = refusal(
        changed(raw("h100"), ("memory", "hbm", "bandwith"), {"value": "1 TB/s", "published": "G2"})
    )
    assert (error.code, error.hint) == ("PORT-0302", "is bandwidth meant?")
    assert error.what == "not a target description: memory.hbm.bandwith: there is no such key"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"name = ",
        b"\xff\xfe",
        b"name = 3",
        b"[[name]]",
        b"a = " + b"[" * 5000,
        b"x = 1\nx = 2",
        b'family = "simt"',
    ],
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
