"""The matrix: what is refused before any work, and which cells a change touches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sweeping

from porter.errors import OptionError, SpecError
from porter.sweep.matrix import Cell, Matrix, Options, cells
from porter.sweep.shared import Shared

SHARED = Shared(Path("model.onnx"), "5" * 64, "texts.json", "7" * 64, {}, "", 64, {"porter": "1"})
WIDE = Matrix(("host", "maia-200", "h100"), ("fp32", "int8"), ("fp32", "int8"))


def named(matrix: Matrix = WIDE, shared: Shared = SHARED, **options: object) -> dict[str, str]:
    """Cell to the name of its record."""
    return {str(c): c.task["name"] for c in cells(matrix, Options(**options), shared) if c.task}


def test_axes_are_read() -> None:
    matrix = Matrix.of(targets="h100, host,h100,", weights="fp8", kv="kivi2 recent=64,fp32")
    assert matrix == Matrix(("h100", "host"), ("fp8",), ("kivi2 recent=64", "fp32"), ("fp32",))
    assert {"host", "maia-200"} < set(Matrix.of(targets="all").targets)
    with pytest.raises(OptionError, match="PORT-0641") as error:
        Matrix.of(targets="host", weights=" ,")
    assert "--weights" in str(error.value)


def test_what_a_target_does_not_offer_is_a_row_that_says_so() -> None:
    found = cells(Matrix(("host",), ("int8", "fp7"), ("int8", "nothing")), Options(), SHARED)
    assert {str(c): c.refused.code if c.refused else "" for c in found} == {
        "host int8 int8": "", "host int8 nothing": "PORT-0830", "host fp7 int8": "PORT-0830",
        "host fp7 nothing": "PORT-0830",
    }  # fmt: skip
    assert all((c.task is None) == (c.refused is not None) for c in found)


def test_a_matrix_of_nothing_but_refusals_is_a_mistake() -> None:
    with pytest.raises(OptionError, match="PORT-0830"):
        cells(Matrix(("host", "h100"), ("fp7",)), Options(), SHARED)
    with pytest.raises(SpecError, match="PORT-0301"):
        cells(Matrix(("host", "h900")), Options(), SHARED)


def test_names_differ_and_say_what_they_are() -> None:
    names = named()
    assert len(set(names.values())) == len(names) == 12
    assert names["maia-200 int8 fp32"].startswith("maia-200_int8_fp32-")
    slashes = named(Matrix(("host",), ("int8",), ("kivi2 recent=64",)))
    assert all("/" not in n and " " not in n for n in slashes.values())


def test_a_short_name_and_the_flavour_that_it_stands_for_are_one_cell() -> None:
    names = named(Matrix(("h100",), ("fp8", "fp8-e4m3fn")))
    assert len(names) == 2
    assert len(set(names.values())) == 1


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"seed": 1}, "all"),
        ({"context": 32}, "all"),
        ({"prompt": 32}, "all"),
        ({"batch": 2}, "all"),
        ({"method": "hqq"}, "int8 weights"),
        ({"budget": "kl=1"}, ""),  # held against what was measured
        ({"workers": 7}, ""),
        ({"ray": "local"}, ""),
        ({"keep": True}, ""),
        ({"repeat": "porter"}, ""),
    ],
    ids=lambda x: str(x),
)
def test_an_option_touches_what_depends_on_it(change: dict, touched: str) -> None:
    before, after = named(), named(**change)
    assert before.keys() == after.keys()
    changed = {cell for cell in before if before[cell] != after[cell]}
    wanted = {"all": set(before), "": set(), "int8 weights": {c for c in before if c.split()[1] == "int8"}}
    assert changed == wanted[touched]


@pytest.mark.parametrize("field", ["sha256", "data_sha256", "versions"])
def test_another_model_text_or_version_touches_all(field: str) -> None:
    other = replace(SHARED, **{field: {"porter": "2"} if field == "versions" else "9" * 64})
    assert not set(named().values()) & set(named(shared=other).values())


def test_a_target_s_file_touches_its_own_cells(tmp_path: Path) -> None:
    matrix = Matrix((*(str(sweeping.chip(tmp_path, name)) for name in "ab"),), ("fp32", "int8"))
    before = named(matrix)
    sweeping.chip(tmp_path, "a", dollars=3)
    after = named(matrix)
    assert {c for c in before if before[c] != after[c]} == {"a fp32 fp32", "a int8 fp32"}


def test_calibration_goes_to_those_that_look_at_it(tmp_path: Path) -> None:
    matrix, shared = Matrix(("host",), ("fp32", "int4")), replace(SHARED, calibration_sha256="1" * 64)
    found = cells(matrix, Options(method="gptq", calibration="random"), shared)
    asked = {c.weights: c.task["options"].get("calibration") for c in found}
    assert asked == {"fp32": None, "int4": "random"}
    assert named(matrix, method="gptq")["host fp32 fp32"] == found[0].task["name"]
    with pytest.raises(OptionError, match="PORT-0296"):
        cells(matrix, Options(calibration="random"), shared)


def test_the_command_of_one_cell_is_given() -> None:
    cell: Cell = cells(Matrix(("host",), ("int8",), ("kivi2 recent=64",)), Options(seed=3), SHARED)[0]
    assert cell.task["repeat"] == (
        "porter convert model.onnx --target host --weights int8 --kv 'kivi2 recent=64' --data texts.json"
        " --seed 3 -o BUNDLE"
    )
