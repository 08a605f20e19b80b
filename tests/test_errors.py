"""Every error code has a page, every page a code, and the index lists them all."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "errors"
HEAD = """# Errors

An error is one line: `porter: PORT-0123: what is wrong [where]; what to try`. A code keeps its meaning."""
HEADINGS = {
    "01": "The model",
    "02": "Passes and pipelines",
    "03": "Targets' files",
    "04": "What does not fit the target (exit code 4)",
    "05": "Bundles",
    "06": "Drift (exit code 3)",
    "07": "Export",
    "08": "Options, tokenizers and feeds",
    "09": "The machine, and porter itself",
}


def _codes() -> dict[str, str]:
    """Code to the place of its literal; docstrings that mention codes do not count."""
    found = {}
    for file in sorted([*(ROOT / "porter").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                match = re.fullmatch(r"(?:porter: )?(PORT-\d{4})(?:: .*)?", node.value)
                if match:
                    found[match[1]] = f"{file.relative_to(ROOT)}:{node.lineno}"
    return found


def test_codes_and_pages_are_the_same() -> None:
    codes, pages = _codes(), {p.stem for p in PAGES.glob("PORT-*.md")}
    assert len(codes) > 80, "the test looks in the wrong place"
    assert {code: where for code, where in codes.items() if code not in pages} == {}
    assert pages - codes.keys() == set()


def test_a_page_has_its_code_as_title_and_says_what_to_do() -> None:
    for page in PAGES.glob("PORT-*.md"):
        text = page.read_text("utf-8")
        title = text.splitlines()[0]
        assert re.fullmatch(rf"# {page.stem}: \S.*[^.]", title), f"{page.name}: {title}"
        assert re.search(r"^(## |\*\*)?What to do", text, re.MULTILINE), f"{page.name} gives no advice"


def test_the_index_lists_every_page_with_its_title(request: pytest.FixtureRequest) -> None:
    index = PAGES / "README.md"
    if request.config.getoption("--update-golden"):
        index.write_text(_index(), encoding="utf-8")
    assert index.read_text("utf-8") == _index(), "pytest --update-golden tests/test_errors.py writes it anew"


def _index() -> str:
    lines = [HEAD]
    for page in sorted(PAGES.glob("PORT-*.md")):
        if (heading := f"\n## {HEADINGS[page.stem[5:7]]}\n") not in lines:
            lines.append(heading)
        title = page.read_text("utf-8").splitlines()[0].removeprefix(f"# {page.stem}: ")
        lines.append(f"- [{page.stem}]({page.name}) {title}")
    return "\n".join(lines) + "\n"
