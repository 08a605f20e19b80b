"""A decoder on WebGPU, in software where there is no GPU, and on CUDA, emulated: the host's tokens, with
caches that stay there."""

import os
from collections.abc import Iterator
from pathlib import Path

import emulated
import numpy as np
import onnx_ir as ir
import pytest
from decoders import tiny_decoder

from porter import decoder as decoders
from porter import target
from porter.context import Context
from porter.errors import EnvironmentFailure, OptionError
from porter.lower.lower import lower
from porter.pipeline import Pipeline
from porter.run import cuda, opening, webgpu
from porter.run.decode import Decode, generate
from porter.run.device import DeviceRunner, Resident
from porter.run.feeds import feeds
from porter.run.host import HostRunner

BOUNDS = {"batch": 3, "sequence": 8, "past": 32}
TOLERANCE = 2e-5  # of logits near 1: two layers of sums of 32 and 44 products, each in float32
PROMPT = [3, 17, 42, 5, 9]
CASES = ("webgpu concat", "webgpu static", pytest.param("cuda concat", marks=pytest.mark.long), "cuda static")


def static() -> ir.Model:
    model = tiny_decoder(positions="range", tied=False)
    Pipeline.parse("kv.static_cache{capacity=24},clean.dead").run(model, Context())
    return model


@pytest.fixture(scope="module", params=CASES)
def lowered(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path, object]]:
    """Folders for the host and the device, on which products are of float32 too."""
    kind, cache = request.param.split()
    model = static() if cache == "static" else tiny_decoder(positions="range", tied=False)
    folders = [tmp_path_factory.mktemp(name) for name in ("host", kind)]
    spec = target.load("webgpu") if kind == "webgpu" else emulated.spec()
    with pytest.MonkeyPatch.context() as patch:
        if kind == "cuda":
            emulated.install(patch, tmp_path_factory.mktemp("emulated"))
        for folder, chip in zip(folders, (target.load("host"), spec), strict=True):
            lower(model, chip, folder, dict(BOUNDS))
        yield (*folders, decoders.recognise(model))


@pytest.fixture(scope="module")
def runners(lowered: tuple[Path, Path, object]) -> tuple[HostRunner, DeviceRunner, object]:
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    try:
        return HostRunner(lowered[0]), opening.on_device(lowered[1]), lowered[2]
    except EnvironmentFailure as error:
        pytest.skip(str(error))


def test_prefill_and_decode_give_the_host_s_tokens(runners: tuple[HostRunner, DeviceRunner, object]) -> None:
    host, device, known = runners
    want = list(generate(Decode(host, known), PROMPT, 16))
    assert list(generate(Decode(device, known), PROMPT, 16)) == want
    assert len(set(want)) > 1


def test_rows_and_sessions_do_not_disturb_each_other(
    runners: tuple[HostRunner, DeviceRunner, object],
) -> None:
    host, device, known = runners
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 61, (2, 3, 6))
    sessions = [[Decode(r, known, 3) for r in (host, device)] for _ in texts]
    for at in (slice(0, 4), slice(4, 5), slice(5, 6)):  # in turn
        for text, (ours, theirs) in zip(texts, sessions, strict=True):
            a, b = ours.step(text[:, at]), theirs.step(text[:, at])
            np.testing.assert_allclose(b, a, rtol=0, atol=TOLERANCE)


def test_a_cache_stays_on_the_device_and_can_be_read(
    lowered: tuple[Path, Path, object], runners: tuple[HostRunner, DeviceRunner, object]
) -> None:
    host, device, known = runners
    if not device.in_place:  # a cache that grows is another each step
        return
    ours, theirs = Decode(host, known), Decode(device, known)
    for tokens in ([PROMPT], [[7]]):
        ours.step(np.array(tokens))
        theirs.step(np.array(tokens))
    for name, held in theirs.caches.items():
        assert isinstance(held, Resident)
        np.testing.assert_allclose(np.asarray(held), ours.caches[name], rtol=0, atol=TOLERANCE)


def test_feeds_that_do_not_fit_are_refused(runners: tuple[HostRunner, DeviceRunner, object]) -> None:
    _, device, known = runners
    with pytest.raises(OptionError) as caught:
        Decode(device, known, 4).step(np.zeros((4, 2), np.int64))
    assert caught.value.code == "PORT-0502"


@pytest.mark.parametrize("wrong", [61, -62])
def test_a_token_that_is_none_is_refused_as_on_the_host(
    runners: tuple[HostRunner, DeviceRunner, object], wrong: int
) -> None:
    """No kernel is launched: it would read what lies beside the table."""
    *both, known = runners
    for runner in both:
        session = Decode(runner, known)
        fed = feeds(known, np.array([[3, wrong]]), 0, session.caches, runner.inputs)
        with pytest.raises(OptionError, match=f"{wrong} lies outside of a table of 61 rows") as caught:
            runner.run(fed)
        assert caught.value.code == "PORT-0502"
        with pytest.raises(OptionError) as caught:
            session.step(np.array([[3, wrong]]))
        assert caught.value.code == "PORT-0141"


def test_a_bundle_opens_on_its_device_or_in_its_numerics(
    lowered: tuple[Path, Path, object],
    runners: tuple[HostRunner, DeviceRunner, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert opening.executes(opening.opened(lowered[1]))
    monkeypatch.setenv(opening.DEVICE, "host")
    simulated = opening.opened(lowered[1])
    assert isinstance(simulated, HostRunner)
    known = lowered[2]
    want = Decode(runners[0], known).step(np.array([PROMPT]))
    np.testing.assert_allclose(
        Decode(simulated, known).step(np.array([PROMPT])), want, rtol=0, atol=TOLERANCE
    )


def test_no_device_means_the_host(
    lowered: tuple[Path, Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    wgpu = pytest.importorskip("wgpu")
    monkeypatch.setattr(wgpu.gpu, "enumerate_adapters_sync", list)
    monkeypatch.setattr(cuda, "DRIVER", "no-driver.so")
    for machine in (webgpu.adapter, cuda.Cuda):
        with pytest.raises(EnvironmentFailure) as caught:
            machine()
        assert caught.value.code == "PORT-0908"
    assert isinstance(opening.opened(lowered[1]), HostRunner)


@pytest.mark.gpu
def test_a_decoder_on_a_gpu(tmp_path: Path) -> None:
    """Tensor Float 32 in both: what the GPU sums in another order is all that differs."""
    model = static()
    lower(model, target.load("h100"), tmp_path, dict(BOUNDS))
    try:
        device = cuda.runner(tmp_path)
    except EnvironmentFailure as error:
        pytest.skip(str(error))
    known = decoders.recognise(model)
    want = Decode(HostRunner(tmp_path), known).step(np.array([PROMPT]))
    np.testing.assert_allclose(Decode(device, known).step(np.array([PROMPT])), want, rtol=0, atol=TOLERANCE)
