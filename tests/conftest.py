"""Fixtures that several tests share, and the rule that in CI a skipped test is a failure."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under CI=true, tests that did not run fail the suite, but those that need a GPU."""
    if session.exitstatus == pytest.ExitCode.OK and _wrongly_skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name them; pytest's own summary line comes after this."""
    for report in _wrongly_skipped(config):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"CI: {report.nodeid} must run: {reason}", red=True)


def _wrongly_skipped(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.getplugin("terminalreporter")  # none in a worker of pytest-xdist
    if os.environ.get("CI") != "true" or reporter is None:
        return []
    return [report for report in reporter.stats.get("skipped", []) if "gpu" not in report.keywords]


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of trained models: $PORTER_MODELS, or shared/models beside the checkout."""
    folder = Path(os.environ.get("PORTER_MODELS", ROOT.parent / "shared" / "models"))
    if not folder.is_dir():
        pytest.skip("no trained models: set PORTER_MODELS")
    return folder


@pytest.fixture(scope="session")
def stories_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """samples/stories260k, a trained Llama, exported once, its tokenizer beside it. Read only."""
    pytest.importorskip("transformers", reason="needs the extra porter[export]")
    from porter.export import export

    path = tmp_path_factory.mktemp("stories") / "model.onnx"
    export(str(ROOT / "samples" / "stories260k"), path)
    return path
