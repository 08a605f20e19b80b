"""Whole decoders as porter lowers them, kernel by kernel against the simulator without closed forms."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import decoders
import pytest
from decoders import tiny_decoder
from timed import Made, Unmade, made

from porter import target
from porter.errors import TargetError
from porter.lower import scheduled
from porter.simulate import Buffer, Program, Step, simulate
from porter.simulate.program import Loop
from tests.support import stepped

CHIPS = ("maia-200", "tpu-v6e", "trainium2")  # clusters; blocks of 8 x 128; partitions and weights that stay
SIZES = ((1, 1, 9), (3, 7, 0))  # a step of one row, and prompts of three; 7 is no multiple of a tile
KINDS = ("attention", "append", "rotary", "rms_norm", "rows", "product", "pairs", "split", "add", "transpose")


@cache
def decoder(name: str) -> Made:
    """Two layers with heads in groups, a head of 61 rows and a cache of 40 tokens: nothing fits its tile."""
    sizes = {"hidden": 48, "heads": 6, "kv_heads": 2, "head_size": 8, "ffn": 44, "context": 40}
    return made(tiny_decoder(layers=2, **sizes), target.load(name))


def programs(found: Made, batch: int, tokens: int, past: int) -> Counter[Program]:
    """What is called how often, one for each launch that has a time."""
    dimensions = found.lowered._dimensions(batch, tokens, past)
    step = found.lowered.step
    timed = [call for call in step.calls if call.kernel not in step.untimed]
    return Counter(step.kernels[call.kernel].at(call.at(dimensions)) for call in timed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CHIPS)
def test_every_kernel_of_a_decoder_is_equal_to_the_cycle(name: str, size: tuple[int, int, int]) -> None:
    found, spec = decoder(name), target.load(name)
    called = programs(found, *size)
    for kind in KINDS:
        assert any(kind in program.name for program in called), f"no kernel is a {kind}"
    total = 0
    for program, number in called.items():
        expected, took = stepped.simulate(program, spec), simulate(program, spec)
        assert took.seconds == expected.seconds, program.name
        assert {t.level: [t.read, t.written] for t in took.traffic} == expected.moved, program.name
        total += number * expected.seconds
    step = found.lowered.step.simulate(found.lowered._dimensions(*size), spec)
    assert step.seconds == total


@pytest.mark.parametrize("name", CHIPS)
def test_every_launch_has_a_time_or_is_named(name: str) -> None:
    found = decoder(name)
    step = found.lowered.decode(2, 12)
    assert sum(n for _, n in step.calls) + sum(n for n, _ in step.untimed.values()) == found.launches
    assert set(step.untimed) == {"counting", "sizes_1_1"}  # they count positions: the control processor's
    assert {why for _, why in step.untimed.values()} == {"the control processor's"}


def test_layers_alike_are_simulated_once() -> None:
    calls = programs(decoder("tpu-v6e"), 2, 1, 5)
    attention = [number for program, number in calls.items() if "attention" in program.name]
    assert attention == [2], "both layers are one"


def test_a_product_sees_the_view_that_it_is_called_with() -> None:
    """Its rows are batch x sequence, though the buffer behind them has both."""
    found = decoder("tpu-v6e").lowered
    call = next(call for call in found.step.calls if "product" in call.kernel)
    assert call.at({"batch": 3, "sequence": 7}) == {"m": 21}
    with pytest.raises(TargetError) as error:
        call.at({"batch": 3})
    assert error.value.code == "PORT-0447"


def test_another_schedule_takes_another_time() -> None:
    """Without second slots nothing is loaded ahead; where loops are not dealt out, one core does all."""

    def slower(name: str, change: Callable[[Program], Program]) -> bool:
        spec, called = target.load(name), programs(decoder(name), 3, 40, 0)
        before, after = (sum(simulate(f(p), spec).seconds for p in called) for f in (lambda p: p, change))
        return after > before

    assert slower("tpu-v6e", lambda p: replace(p, buffers=tuple(map(_single, p.buffers))))
    assert slower("maia-200", lambda p: replace(p, body=tuple(map(_alone, p.body))))


def _single(buffer: Buffer) -> Buffer:
    return replace(buffer, slots=min(buffer.slots, 1))


def _alone(node: object) -> object:
    if not isinstance(node, Loop):
        return node
    return replace(node, over="", body=tuple(map(_alone, node.body)))


@pytest.mark.parametrize("name", CHIPS)
def test_a_program_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    found = decoder(name)
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        scheduled.step(found.module, target.load(name), list(found.lowered.step.untimed)).write(file)
    assert Step.load(files[0]) == found.lowered.step
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.pop("calls"),
        lambda told: told.update(schema="porter.program/0"),
        lambda told: told["kernels"].update(odd={"name": "odd"}),
        lambda told: told["calls"].append({"kernel": "x", "sizes": [["m", ["^", 1, 2]]]}),
    ],
)
def test_a_file_that_is_no_program_is_refused(change, tmp_path: Path) -> None:
    file = tmp_path / "program.json"
    Step({}, {"counting": "why"}, ()).write(file)
    assert Step.load(file).untimed == {"counting": "why"}
    told = json.loads(file.read_text("utf-8"))
    changed = change(told)
    file.write_text(
        json.dumps(changed if isinstance(changed, dict) and "schema" in changed else told), "utf-8"
    )
    with pytest.raises(TargetError) as error:
        Step.load(file)
    assert error.value.code == "PORT-0440"


@pytest.mark.long
def test_eighty_layers_take_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3-70B's sizes; its weights are never made."""
    monkeypatch.setattr(decoders, "Builder", Unmade)
    sizes = {"hidden": 8192, "heads": 64, "kv_heads": 8, "head_size": 128, "ffn": 28672, "vocab": 128256}
    model = tiny_decoder(layers=80, context=4096, tied=False, **sizes)
    found = made(model, target.load("tpu-v6e"))
    started = time.process_time()
    step = found.lowered.decode(1, 4096)
    assert time.process_time() - started < 10  # seen: 0.5 s
    assert [calls for kernel, calls in step.calls if "attention" in kernel.name] == [80]
    assert sum(calls for _, calls in step.calls) > 1500
