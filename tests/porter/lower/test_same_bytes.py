"""What is lowered for a chip, to the byte, from processes that hash strings differently."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[2] / "support"
CASES = (("maia-200", "fp8", "fp8", ""), ("webgpu", "int4", "", "int8"), ("h100", "fp8", "fp8", ""))
PROGRAMS = {"maia-200": "lib/program.txt", "webgpu": "lib/kernels/*.wgsl", "h100": "lib/kernels.cu"}
SCRIPT = """
import sys
from pathlib import Path
from decoders import tiny_decoder
from ported import ported
from porter import graph, target
for chip, weights, activations, kv in {cases}:
    folder, model = Path(sys.argv[1]) / chip, tiny_decoder(layers=1, tied=False)
    folder.mkdir(parents=True)
    ported(model, target.load(chip), folder, weights, activations, kv)
    graph.save(model, folder / "model.onnx")
"""


@pytest.mark.long
def test_the_same_model_gives_the_same_program(tmp_path: Path) -> None:
    """The manifest is digests of these files; that a whole conversion repeats is tested on the host."""
    made = []
    for seed, name in (("1", "a"), ("2", "another")):
        paths = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        made.append(tmp_path / name)
        command = [sys.executable, "-c", SCRIPT.format(cases=CASES), made[-1]]
        subprocess.run(command, env=env, check=True, cwd=tmp_path)
    for chip, *_ in CASES:
        one, other = (sorted(f.relative_to(m / chip) for f in (m / chip).rglob("*")) for m in made)
        assert one == other
        assert {Path("plan.json"), Path("model.onnx")} <= set(one)
        assert list((made[0] / chip).glob(PROGRAMS[chip]))
        for file in (f for f in one if (made[0] / chip / f).is_file()):
            assert (made[0] / chip / file).read_bytes() == (made[1] / chip / file).read_bytes(), (chip, file)
