"""HostRunner: what goes in and comes out, whose memory it is, and how feeds that do not fit are refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from lowering import model, with_weights

from porter import target
from porter.errors import BundleError, EnvironmentFailure, OptionError
from porter.lower.lower import lower
from porter.run.host import HostRunner

BOUNDS = {"b": 4, "s": 8, "past": 32}
Make = Callable[[ir.Model], HostRunner]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def run(source: ir.Model) -> HostRunner:
        lower(source, target.load("host"), tmp_path, BOUNDS)
        return HostRunner(tmp_path)

    return run


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> HostRunner:
    folder = tmp_path_factory.mktemp("adder")
    text = "g (float[b,3] x, float[b,s] z, float[2] two) => (float[b,3] y) { y = Add(x, x) }"
    lower(model(text), target.load("host"), folder, BOUNDS)
    return HostRunner(folder)


def fed(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    good = {"x": np.ones((2, 3), np.float32), "z": np.ones((2, 5), np.float32), "two": np.ones(2, np.float32)}
    return {**good, **arrays}


def test_an_unused_input_is_still_an_input(adder: HostRunner) -> None:
    assert list(adder.inputs) == ["x", "z", "two"]
    assert adder.inputs["z"].shape == ("b", "s")
    assert adder.bounds == {"b": 4, "s": 8}
    np.testing.assert_array_equal(adder.run(fed())["y"], np.full((2, 3), 2))


WRONG = {
    "missing": ({"x": np.ones((2, 3), np.float32)}, "missing"),
    "unknown": (fed(w=np.ones(1)), "no input 'w'"),
    "another type": (fed(x=np.ones((2, 3))), "wanted float32 of rank 2, got float64"),
    "another byte order": (fed(x=np.ones((2, 3), ">f4")), "wanted float32"),
    "another rank": (fed(x=np.ones((2, 3, 1), np.float32)), "rank 3"),
    "another size": (fed(two=np.ones(3, np.float32)), "wanted a dimension of 2, got 3"),
    "sizes that disagree": (fed(z=np.ones((3, 5), np.float32)), "b is 2 elsewhere, 3 here"),
    "beyond the plan": (fed(z=np.ones((2, 9), np.float32)), "s is 9, but memory was planned for at most 8"),
}


@pytest.mark.parametrize(("feeds", "message"), WRONG.values(), ids=WRONG)
def test_wrong_feeds(adder: HostRunner, feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        adder.run(feeds)
    assert caught.value.code == "PORT-0502"


@pytest.mark.parametrize(
    "x",
    [
        np.arange(12, dtype=np.float32).reshape(4, 3)[::2],
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.frombuffer(b"\0" * 4 + np.arange(6, dtype=np.float32).tobytes(), np.float32, offset=4).reshape(
            2, 3
        ),
        np.broadcast_to(np.float32(1), (2, 3)),
        [[1, 2, 3], [4, 5, 6]],
    ],
    ids=["strided", "columns first", "unaligned", "broadcast", "a list"],
)
def test_arrays_of_any_layout(adder: HostRunner, x: object) -> None:
    x = np.float32(x) if isinstance(x, list) else x
    np.testing.assert_array_equal(adder.run(fed(x=x))["y"], np.asarray(x) * 2)


def test_no_rows_at_all(adder: HostRunner) -> None:
    empty = fed(x=np.ones((0, 3), np.float32), z=np.ones((0, 5), np.float32))
    assert adder.run(empty)["y"].shape == (0, 3)


def test_outputs_have_memory_of_their_own(make: Make) -> None:
    """An input, a constant, a view of an input and one tensor under two names come out as separate arrays."""
    text = """g (float[b,3] x, float[20] big)
      => (float[b,3] x2, float[20] c, float[3] few, float[3,b] v, float[b,3] y, float[b,3] z, float n)
      <float[3] small = {1, 2, 3}, int64[2] k = {3, -1}, float one = {1}> {
      x2 = Identity(x) c = Identity(big) few = Identity(small) v = Reshape(x, k)
      y = Relu(x) z = Identity(y) n = Identity(one) }"""
    runner = make(with_weights(model(text), big=np.arange(20, dtype=np.float32)))
    x = np.ones((2, 3), np.float32)
    first = runner.run({"x": x})
    for array in first.values():
        array[...] = 7
    assert np.all(x == 1)
    again = runner.run({"x": x})
    assert np.all(again["x2"] == 1)
    assert again["c"].tolist() == list(range(20))
    assert again["few"].tolist() == [1, 2, 3]
    assert np.all(again["v"] == 1)
    assert again["n"] == 1
    assert np.all(again["y"] == 1)
    again["y"][...] = 9
    assert np.all(again["z"] == 1)


def test_a_graph_input_that_is_an_output(make: Make) -> None:
    source = model("g (float[b,3] x) => (float[b,3] y) { y = Relu(x) }")
    source.graph.outputs.append(source.graph.inputs[0])
    x = np.float32([[1, -2, 3]])
    got = make(source).run({"x": x})
    np.testing.assert_array_equal(got["x"], x)
    assert not np.shares_memory(got["x"], x)


def test_a_program_without_weights_or_kernels(make: Make) -> None:
    runner = make(model("g (float[b,3] x) => (int64[2] y) { y = Shape(x) }"))
    assert runner.run({"x": np.ones((2, 3), np.float32)})["y"].tolist() == [2, 3]


NAMES = ["/model/layers.0/x:0", "é ü", "x y", "main", "w0", "lv", "alloc", "storage", "1", "x-1", "x_1"]


def test_odd_names(make: Make) -> None:
    """Of inputs, outputs, nodes, weights and dimensions: all stay, and none is taken for another's."""
    source = model("g (float[b,30] x, float[30,3] big) => (float[b,3] y) { y = MatMul(x, big) }")
    source = with_weights(source, big=np.ones((30, 3), np.float32))
    graph = source.graph
    for i, name in enumerate(NAMES):
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 3]))
        graph.inputs.append(value)
        node = ir.node("Add", [graph.outputs[0], value], name=name)
        node.outputs[0].name = f"{name}/{i} sum"
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        graph.append(node)
        graph.outputs[0] = node.outputs[0]
    for value in [*graph.inputs, *graph.outputs]:
        value.shape = ir.Shape(["b", *list(value.shape)[1:]])
    runner = make(source)
    assert list(runner.inputs) == ["x", *NAMES]
    feeds = {n: np.full((2, 30 if n == "x" else 3), i, np.float32) for i, n in enumerate(runner.inputs)}
    (got,) = runner.run(feeds).values()
    assert list(runner.outputs) == [graph.outputs[0].name]
    assert np.all(got == sum(range(len(NAMES) + 1)))


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int32", "int64", "float16", "float64", "bfloat16"]
)
def test_every_type_goes_in_and_out(make: Make, dtype: str) -> None:
    kind = {"float64": "double"}.get(dtype, dtype)
    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    runner = make(model(f"g ({kind}[b,3] x) => ({kind}[3,b] y) {{ y = Transpose(x) }}"))
    x = np.array([[0, 1, 1], [1, 0, 1]]).astype(wanted)
    (got,) = runner.run({"x": x}).values()
    assert got.dtype == wanted == runner.inputs["x"].dtype
    np.testing.assert_array_equal(got, x.T)


@pytest.fixture(scope="module")
def scatter(tmp_path_factory: pytest.TempPathFactory) -> HostRunner:
    text = """g (float[b,2,8,4] c, float[b,2,s,4] u, int64[b] i, float[b,2,8,4] other) => (float[b,2,8,4] y,
    float[b,2,8,4] z) {
      y = TensorScatter(c, u, i) z = Neg(other) }"""
    folder = tmp_path_factory.mktemp("scatter")
    lower(model(text), target.load("host"), folder, BOUNDS)
    return HostRunner(folder)


def scattered(c: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "c": c,
        "u": np.ones((1, 2, 1, 4), np.float32),
        "i": np.array([3]),
        "other": np.zeros((1, 2, 8, 4), np.float32),
    }


def aligned(offset: int) -> np.ndarray:
    """A cache that begins `offset` bytes after a cache line."""
    raw = np.zeros(1024, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + 256].view(np.float32).reshape(1, 2, 8, 4)


@pytest.mark.parametrize("offset", [0, 4, 16])
def test_an_overwritten_input_is_the_callers_array(scatter: HostRunner, offset: int) -> None:
    """Also when it does not begin on a cache line, and has to be copied in and out."""
    cache = aligned(offset)
    got = scatter.run(scattered(cache))
    assert got["y"] is cache
    assert np.all(cache[0, :, 3] == 1)
    assert cache.sum() == 8


def test_an_overwritten_input_that_must_not_be_written_to_stays(scatter: HostRunner) -> None:
    cache = aligned(0)
    cache.flags.writeable = False
    got = scatter.run(scattered(cache))["y"]
    assert not cache.any()
    assert got.sum() == 8


def test_an_overwritten_input_must_not_be_another_one_too(scatter: HostRunner) -> None:
    cache = aligned(0)
    with pytest.raises(OptionError, match=r"PORT-0502.*same array"):
        scatter.run({**scattered(cache), "other": cache})


@pytest.mark.parametrize("by", ["feeds", "program"])
def test_an_index_outside_is_refused(make: Make, by: str) -> None:
    """What a number comes to in the program, only the program can refuse."""
    numbers = "x" if by == "feeds" else "n"
    text = f"g (int64[b] x, float[20,3] w) => (float[b,3] y) {{ n = Abs(x) y = Gather(w, {numbers}) }}"
    source = model(text)
    runner = make(with_weights(source, w=np.ones((20, 3), np.float32)))
    assert runner.run({"x": np.array([-19, 19])})["y"].shape == (2, 3)
    for wrong in (20, -21):  # Abs of both is outside as well
        with pytest.raises(OptionError, match=r"PORT-0502.*outside"):
            runner.run({"x": np.array([0, wrong])})
    assert runner.run({"x": np.array([1])})["y"].shape == (1, 3)


@pytest.mark.parametrize("damage", ["lib/model-*.so", "lib/weights.bin", "plan.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_program(tmp_path: Path, damage: str, how: str) -> None:
    source = model("g (float[b,20] x, float[20,3] w) => (float[b,3] y) { y = MatMul(x, w) }")
    lower(with_weights(source, w=np.ones((20, 3), np.float32)), target.load("host"), tmp_path, BOUNDS)
    (file,) = tmp_path.glob(damage)
    data = file.read_bytes()
    file.unlink()
    if how == "cut":
        file.write_bytes(data[:100])
    with pytest.raises(BundleError) as caught:
        HostRunner(tmp_path)
    assert caught.value.code == "PORT-0501"
    assert caught.value.where == str(tmp_path)


SCRIPT = """
import sys, decoders
from pathlib import Path
from porter import target
from porter.context import Context
from porter.lower.lower import lower
from porter.pipeline import Pipeline
model = decoders.tiny_decoder()
passes = "quantize.rtn{format=int4-g32},kv.static_cache{capacity=32},kv.quantize"
Pipeline.parse(passes).run(model, Context())
lower(model, target.load("host"), Path(sys.argv[1]), {"batch": 4, "sequence": 8, "past": 16})
"""


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    """In two processes that hash strings differently, in folders of different names."""
    digests = []
    for seed, name in (("1", "a"), ("2", "another")):
        folder = tmp_path / name
        folder.mkdir()
        paths = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], env=env, check=True)
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        digests.append({f.relative_to(folder): hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert len(digests[0]) == 3
    assert digests[0] == digests[1]


def test_without_a_compiler_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm.support import cc

    monkeypatch.setattr(cc, "get_cc", lambda: None)
    with pytest.raises(EnvironmentFailure, match="PORT-0902"):
        lower(
            model("g (float[b,3] x) => (float[b,3] y) { y = Neg(x) }"), target.load("host"), tmp_path, BOUNDS
        )
    assert list(tmp_path.iterdir()) == []
