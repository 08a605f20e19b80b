"""How targets are shown: the table, one in full, JSON and its schemas, the page of keys, one's own file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jsonschema
import pytest
from target_keys import keys

from porter import cli, target
from porter.errors import SpecError
from porter.target import TargetSpec, showing
from porter.target.reading import SHARED

ROOT = Path(__file__).parents[3]
SCHEMAS = ROOT / "docs" / "schemas"
PAGE = (ROOT / "docs" / "targets.md").read_text("utf-8")
(SAMPLE,) = (
    block for block in re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S) if block.startswith("name")
)


def porter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["porter", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    try:
        cli.main()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *arguments: porter(capsys, monkeypatch, *arguments)


def schema(name: str) -> jsonschema.Draft202012Validator:
    found = json.loads((SCHEMAS / name).read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


# ---- the page


def test_the_page_lists_the_keys_of_the_code_and_no_other() -> None:
    listed = re.findall(r"^\| (\*?)`([a-zA-Z.-]+)`\*? \|", PAGE[PAGE.index("## Keys") :], re.M)
    wanted = dict(keys())
    assert [key for _, key in listed] == list(wanted)
    for star, key in listed:
        may_be_absent = not wanted[key] or key in SHARED
        assert bool(star) == may_be_absent, key


def test_the_page_lists_the_units_of_the_code() -> None:
    table = PAGE[PAGE.index("| quantity |") : PAGE.index("## A chip of one's own")]
    words = set(re.findall(r"`([^`]+)`", table))
    assert {
        "B",
        "B/s",
        "bit/s",
        "FLOP/s",
        "OP/s",
        "s",
        "ms",
        "us",
        "ns",
        "Hz",
        "cycles",
        "W",
        "kW",
        "USD/h",
    } <= words


def test_the_small_chip_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run) -> None:
    (tmp_path / "mychip.toml").write_text(SAMPLE, "utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("mychip.toml", "./mychip.toml"):
        code, out, err = run("targets", name)
        assert (code, err) == (0, "")
        assert "family: tile" in out
        assert re.search(r"^ {4}size: 8 MiB +published MINE$", out, re.M)
        assert re.search(r"^ {4}bandwidth: 4 TB/s +assumed: what the matrix unit takes$", out, re.M)
    code, out, err = run("targets", "mychip.toml", "--json")
    assert (code, err) == (0, "")
    schema("target.schema.json").validate(json.loads(out))


def test_the_small_chip_is_the_least_that_the_family_needs(tmp_path: Path) -> None:
    """Each of its tables is needed, so the page shows no more than it says."""
    for table in ("matrix", "vector", "dma.sram", "limits", "numerics.widened", "memory.hbm", "memory.sram"):
        without = re.sub(rf"^\[{re.escape(table)}\]\n(?:(?!\[).*\n)*", "", SAMPLE, flags=re.M)
        assert without != SAMPLE
        path = tmp_path / "chip.toml"
        path.write_text(without, "utf-8")
        with pytest.raises(SpecError):
            target.load(str(path))


# ---- JSON


def test_the_schema_of_a_target_is_that_of_the_code(request: pytest.FixtureRequest) -> None:
    found = TargetSpec.model_json_schema(by_alias=True, mode="serialization")
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A target, as porter targets NAME --json prints it",
    }
    text = json.dumps(head | {key: value for key, value in found.items() if key != "title"}, indent=1) + "\n"
    path = SCHEMAS / "target.schema.json"
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text("utf-8") == text, "pytest --update-golden tests/porter/target writes it anew"


@pytest.mark.parametrize("name", target.names())
def test_a_target_as_json(name: str, run) -> None:
    code, out, err = run("targets", name, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    schema("target.schema.json").validate(document)
    for path, figure in target.figures(target.load(name)):
        part = document
        for key in path.split("."):
            part = part[int(key)] if isinstance(part, list) else part[key]
        value = json.loads(json.dumps(figure.value))  # tuples as lists
        assert part == {"value": value, "unit": figure.unit, "text": figure.text, "kind": figure.kind,
                        "source": figure.source}  # fmt: skip


def test_the_table_as_json(run) -> None:
    code, out, err = run("targets", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    schema("targets.schema.json").validate(rows)
    assert [r["name"] for r in rows] == target.names()
    (h100,) = (r for r in rows if r["name"] == "h100")
    assert h100["flop_per_s"] == {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12, "fp4": None}
    assert (h100["memory_bytes"], h100["bandwidth_bytes_per_s"]) == (80_000_000_000, 3.35e12)
    assert (h100["usd_per_hour"], h100["price_terms"], h100["price_date"]) == (
        6.88,
        "on-demand",
        "2026-11-22",
    )


# ---- text


def test_the_table(run) -> None:
    code, out, err = run("targets")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line[:1].isalpha()}
    assert rows["name"] == list(showing.COLUMNS)
    assert rows["h100"][:10] == ["h100", "simt", "80", "GB", "3.35", "989", "1,979", "1,979", "–", "6.88"]
    assert rows["maia-200"][:10] == [
        "maia-200",
        "tile",
        "216",
        "GB",
        "7",
        "1,268",
        "5,072",
        "–",
        "10,145",
        "–",
    ]
    assert rows["trainium2"][8:10] == ["–", "1.44*"]
    assert rows["tpu-v5e"][5:9] == ["197", "–", "393", "–"]  # takes FP8 at the rate of BF16, so not as it is
    assert set(target.names()) <= rows.keys()


@pytest.mark.parametrize("name", target.names())
def test_in_full_shows_every_figure_and_source(name: str, run) -> None:
    code, out, err = run("targets", name)
    assert (code, err) == (0, "")
    spec = target.load(name)
    lines = [line.strip() for line in out.splitlines()]
    for path, figure in target.figures(spec):
        said = f"{figure.kind}{'' if figure.kind == 'published' else ':'} {figure.source}"
        start = f"{path.split('.')[-1]}: {figure.text} "
        assert any(line.startswith(start) and line.endswith(said) for line in lines), path
    for key, text in spec.sources.items():
        assert f"{key}: {text}" in lines


def test_escape_codes_of_a_file_are_spelled_out(tmp_path: Path, run) -> None:
    path = tmp_path / "chip.toml"
    path.write_text(SAMPLE.replace("a made-up chip", r"a \u001b[31mred\u001b[0m chip"), "utf-8")
    code, out, _ = run("targets", path)
    assert code == 0
    assert "\x1b" not in out
    assert r"a \x1b[31mred" in out


# ---- what cannot be


def test_a_mistake_in_ones_own_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mychip.toml").write_text(SAMPLE.replace('"2 TB/s"', '"2 TB"'), "utf-8")
    code, out, err = run("targets", "mychip.toml")
    assert (code, out) == (1, "")
    assert err.startswith(
        "porter: PORT-0303: memory.hbm.bandwidth: '2 TB' is a number of B; write it with one of B/s"
    )
    assert err.endswith("[mychip.toml]\n")
