"""The README does what it says: its commands run and print what it shows, and what it names is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shown

from porter import cli, target
from porter.convert import MAX_BATCH, MAX_CONTEXT, MAX_STEP

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
MARK = "@@ end of command "


def test_every_command_prints_what_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra porter[export]")
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    consoles = [text for kind, text in BLOCKS if kind == "console"]
    assert len(consoles) >= 8
    for block in consoles:
        commands = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
        printed = _bash([command for command, _ in commands], tmp_path)
        for i, (command, page) in enumerate(commands):
            text, status = printed[i]
            may_fail = "porter: PORT-" in page or "cannot access" in page or command == "echo $?"
            assert status == 0 or may_fail, f"{command}\n{text}"
            shown.check(_plain(page), _plain(text))
            if command == "echo $?":  # exit codes are figures that must be right
                assert page.strip() == text.strip()
    _python_blocks_run(tmp_path)


def _plain(text: str) -> str:
    """Without what ls adds in other languages' quotes."""
    return text.replace("‘", "'").replace("’", "'")


def _bash(commands: list[str], folder: Path) -> list[tuple[str, int]]:
    """Run them in one shell; what each printed on both streams, and its status."""
    script = "".join(f"{c}\ns=$?; echo; echo '{MARK}'$s; (exit $s)\n" for c in commands)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"exec 2>&1\n{script}"],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "80", "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        text=True,
    )
    parts = re.split(rf"^{MARK}(\d+)\n", done.stdout, flags=re.MULTILINE)
    return [(parts[i], int(parts[i + 1])) for i in range(0, 2 * len(commands), 2)]


def _python_blocks_run(folder: Path) -> None:
    (program,) = (text for kind, text in BLOCKS if kind == "python" and "import" in text)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"mean KL 0\.0\d+ nats, same top token 9\d\.\d%\n", done.stdout)


def test_the_excerpt_is_the_sample() -> None:
    (excerpt,) = (text for kind, text in BLOCKS if kind == "python" and text.startswith("class "))
    assert excerpt in (ROOT / "samples" / "03-own-pass" / "hard_swish.py").read_text("utf-8")


def test_blocks_that_do_not_run_only_install_and_test() -> None:
    assert {kind for kind, _ in BLOCKS} == {"sh", "console", "python"}
    lines = (line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines())
    commands = [line.split("#")[0].strip() for line in lines]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for command in commands:
        assert command == "pip install '.[export]'" or command.removeprefix("make ") in targets, command


def test_every_command_format_and_scheme_is_named() -> None:
    for command in cli.app.registered_commands:
        assert f"porter {command.name or command.callback.__name__}" in README
    for name in target.names():
        spec = target.load(name)
        for word in (name, *spec.weights, *spec.kv, *spec.aliases):
            assert f"`{word}`" in README or f"`porter targets {word}`" in README, word


def test_limits_are_those_of_the_code() -> None:
    said = f"at most {MAX_BATCH} sequences, {MAX_STEP} tokens a step and {MAX_CONTEXT} cached tokens"
    assert said in README


PAGES = [p for p in ROOT.rglob("*.md") if not {".venv", "build"} & set(p.parts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("#"):
            assert re.search(rf"^#+ {link[1:].replace('-', ' ')}$", text, re.MULTILINE | re.IGNORECASE), link
        elif not link.startswith("http"):
            assert (page.parent / link.partition("#")[0]).exists(), link
