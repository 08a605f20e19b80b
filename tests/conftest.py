"""Fixtures that several tests share, and the rule that in CI a skipped test is a failure."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import porter  # noqa: F401  (before ONNX Runtime, whose telemetry it forbids)

ROOT = Path(__file__).parent.parent
GRAPHS = Path(__file__).parent / "graphs"
Feeds = dict[str, np.ndarray]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite what the golden tests expect")


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


@pytest.fixture(scope="session")
def run_onnx() -> Callable[..., Feeds]:
    """run_onnx(model, feeds): all outputs by name, from ONNX Runtime without its own graph optimizations."""

    def run(model: ir.Model, feeds: Feeds) -> Feeds:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


@pytest.fixture(scope="session")
def make_feeds() -> Callable[..., Feeds]:
    """make_feeds(model, seed, batch=…, …): seeded noise for each input, its named dimensions as given.

    Integers are tokens or positions of 0 to 2; an `attention_mask` hides the first token of every row but the
    first when there is a past (padding on the left), and the last one of such rows otherwise; never the only
    one.
    """

    def make(model: ir.Model, seed: int, **sizes: int) -> Feeds:
        rng = np.random.default_rng(seed)
        feeds = {}
        for value in model.graph.inputs:
            shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
            if value.name == "attention_mask":
                mask = np.ones(shape, np.int64)
                if shape[1] > 1:
                    mask[1:, 0 if shape[1] > sizes["sequence"] else -1] = 0
                feeds[value.name] = mask
            elif value.dtype == ir.DataType.BOOL:
                feeds[value.name] = rng.random(shape) < 0.7
            elif value.dtype.is_integer():
                feeds[value.name] = rng.integers(0, 3, shape).astype(value.dtype.numpy())
            else:
                feeds[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
        return feeds

    return make


@pytest.fixture
def decoder() -> Callable[[str], ir.Model]:
    """decoder(name): an exported decoder of tests/graphs with seeded random weights.

    Two layers, hidden 32, four heads of 8 on two key heads, vocabulary 64. The texts are torch.onnx exports
    without their weights, which stand as inputs there.
    """

    def build(name: str) -> ir.Model:
        model = ir.from_onnx_text((GRAPHS / f"{name}.onnxtxt").read_text(encoding="utf-8"))
        rng = np.random.default_rng(7)
        graph = model.graph
        weights = [v for v in graph.inputs if all(isinstance(d, int) for d in v.shape)]
        for value in weights:
            noise = rng.standard_normal([int(d) for d in value.shape]) * (0.3 if len(value.shape) == 2 else 1)
            value.const_value = ir.tensor(noise.astype(np.float32), name=value.name)
            graph.inputs.remove(value)
            graph.register_initializer(value)
        return model

    return build


@pytest.fixture(scope="session")
def worst() -> Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], float]:
    """worst(a, b): the largest difference of any two elements; the names, shapes and types have to agree."""

    def compare(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
        assert a.keys() == b.keys()
        assert all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)
        parts = [np.abs(a[k].astype(np.float64) - b[k].astype(np.float64)).max() for k in a if a[k].size]
        return float(max(parts))

    return compare
