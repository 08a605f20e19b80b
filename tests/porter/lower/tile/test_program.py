"""Whole decoders on chips: the scheduled program gives the logits of the kernels that it was made of."""

from pathlib import Path

import decoders
import numpy as np
import pytest
from tiles import CHIPS, assert_annotated, chip

from porter import target
from porter.context import Context
from porter.lower import lower as lowering
from porter.lower.tile.nests import without_checks
from porter.lower.tile.schedule import Program, program
from porter.pipeline import Pipeline
from porter.run.host import HostRunner

BOUNDS = {"batch": 4, "sequence": 16, "past": 64}
PASSES = {
    "maia-200": "quantize.rtn{format=int4-g32},kv.static_cache{capacity=100},kv.quantize{scheme=int8}",
    "tpu-v6e": "",
    "trainium2": "quantize.rtn{format=fp8-e4m3},kv.static_cache{capacity=100}",
}


@pytest.mark.parametrize("name", CHIPS)
def test_logits_and_caches_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoders.tiny_decoder(context=256)
    if PASSES[name]:
        Pipeline.parse(PASSES[name]).run(model, Context(target.load(name)))
    folders, programs = (tmp_path / "as it is", tmp_path / "scheduled"), []

    def recorded(*given: object) -> Program:
        programs.append(program(*given))
        return programs[-1]

    for folder, make in zip(folders, (lambda module, *_: Program(module), recorded), strict=True):
        folder.mkdir()
        monkeypatch.setattr(lowering.tile, "program", make)
        lowering.lower(model, target.load(name), folder, BOUNDS)
    runners = [HostRunner(folder) for folder in folders]
    caches = [decoders.empty_cache(model, 3) for _ in folders]
    static, lengths = any(v.name == "past_lengths" for v in model.graph.inputs), np.array([0, 3, 11])
    rng = np.random.default_rng(0)
    for count in (11, 1, 1):  # 33 rows, more than the smallest tiles have, and 3
        feeds = {"input_ids": rng.integers(0, 61, (3, count))} | (
            {"past_lengths": lengths.copy()} if static else {}
        )
        results = [r.run({**feeds, **cache}) for r, cache in zip(runners, caches, strict=True)]
        for key in results[0]:
            np.testing.assert_array_equal(results[1][key], results[0][key], err_msg=key)
        assert np.ptp(results[1]["logits"]) > 0
        caches = [
            {n: r[n.replace("past_key_values", "present")] for n in c}
            for r, c in zip(results, caches, strict=True)
        ]
        lengths += count
    text = (folders[1] / lowering.PROGRAM).read_text("utf-8")
    assert text == programs[0].text()
    assert "porter.matrix" in text
    assert len(programs[0].held) > 10
    assert set(programs[0].control) <= {
        "counting",
        *[c for c in programs[0].control if c.startswith("sizes")],
    }
    for kernel in programs[0].held:
        assert_annotated(without_checks(programs[0].module[kernel])[0], chip(name))
