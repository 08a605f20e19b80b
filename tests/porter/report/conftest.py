"""Reports that several tests look at."""

import json
import math
from pathlib import Path

import jsonschema
import pytest

from porter.drift.attention import Head
from porter.drift.attribution import Attribution, Part
from porter.drift.depth import Level
from porter.drift.measures import Drift
from porter.explain import Misses
from porter.report.report import DriftReport, Figure, Stage
from porter.target.placed import Placed

SCHEMA_FILE = Path(__file__).parents[3] / "docs" / "schemas" / "report.schema.json"


def drift(kl=0.0123, **other):
    values = {
        "kl_mean": kl,
        "kl_ci95": 0.0011,
        "kl_p999": 0.4,
        "top1": 0.9753,
        "rms_dp": 0.021,
        "ppl": 4.391,
        "ppl_ratio": 1.0111,
        "max_abs": 1.25,
        "sqnr_db": 27.5,
        "tokens": 2064,
    }
    return Drift(**(values | other))


def attribution():
    parts = [("export", 1e-12, 1e-12), ("fusion", 1e-12, 1e-12), ("weights", 0.011, 0.011)]
    parts += [("KV cache", 0.002, 0.0125), ("lowering", 0.0003, 0.0121), ("target numerics", 0.0001, 0.0123)]
    return Attribution(
        [
            Part(
                name,
                ["quantize.rtn{format=int4-g32}"] if name == "weights" else [],
                drift(own, kl_ci95=own / 10),
                drift(after),
                "simulated" if name == "target numerics" else "measured",
            )
            for name, own, after in parts
        ]
    )


def heads():
    return [
        Head(layer, head, n, 32, 0.5 + layer, 0.01 * (1 + head) * (n / 64) / (1 + layer), 0.99 - 0.01 * head)
        for n in (64, 256)
        for layer in (0, 1)
        for head in (0, 1, 2)
    ]


NODES = [
    {
        "name": "layers.3.mlp.down_proj",
        "op": "MatMul",
        "pass": "quantize.rtn",
        "kernel": "matmul_int4",
    }
    | {"sqnr_local_db": 21.2, "sqnr_db": 19.9},
    {"name": "lm_head", "op": "MatMul", "sqnr_local_db": None, "sqnr_db": 41.0},
]


BOUNDS = ("bandwidth of hbm", "latency", "matrix", "vector", "dma")


def step(tokens, *times):
    """A step of kernels that take so long, the first called once, the second twice …"""
    levels = [{"level": "hbm", "read_bytes": 900, "written_bytes": 20}]
    unit = {"unit": "matrix", "operations": 2, "busy_s": 1e-6, "utilisation": 0.1}
    kernel = {
        "kind": "simulated",
        "seconds": 1e-5,
        "cycles": 1e4,
        "cores": 4,
        "bound_by": "latency",
        "flop": 9,
    }
    kernels = [
        kernel
        | {"name": f"kernel_{i}", "units": [unit], "levels": levels, "calls": i + 1}
        | {"seconds": seconds, "bound_by": BOUNDS[i % 5]}
        for i, seconds in enumerate(times)
    ]
    return {
        "batch": 1,
        "tokens": tokens,
        "context": 512,
        "tokens_per_s": 47000.0 * tokens,
        "kind": "simulated",
        "seconds": 2.127e-5,
        "cycles": 2e4,
        "calls": 2,
        "bound_by": "bandwidth of hbm",
        "utilisation": {"dma cluster": 0.61, "dma tile": 0.3, "matrix": 0.071, "vector": 0.02},
        "levels": levels,
        "kernels": kernels,
        "not_simulated": [{"name": "counting", "calls": 1, "why": "the control processor's"}],
    }


def simulated():
    """The times of a bundle's program."""
    phases = {"prefill": step(512, 1e-4, 3e-4, 2e-5, 5e-6, 9e-4), "decode": step(1, 2e-6, 7e-6, 1e-6)}
    return {"kind": "simulated", "target": "maia-200", "rows": 8, **phases}


def report(**changes):
    total = drift()
    context = [
        {**drift(kl).to_json(), "tokens": n, "positions": 516, "phase": "decode"}
        for n, kl in ((64, 0.009), (128, 0.012), (256, 0.0141), (512, 0.0187))
    ]
    fields = {
        "model": {"name": "stories260k", "sha256": "ab" * 32, "parameters": 260032},
        "target": "maia-200",
        "pipeline": "clean.opset,quantize.rtn{format=int4-g32},kv.static_cache{capacity=512}",
        "feeds": {"kind": "self-generated", "source": "sampled from the reference at temperature 0.8"}
        | {"sequences": 8, "tokens": 2064, "seed": 0, "decode_steps": [64, 64], "short": 0},
        "drift": {"total": total, "passes": drift(0.0121), "lowering": drift(0.0002, sqnr_db=math.inf)},
        "kinds": {"total": "simulated", "lowering": "simulated"},
        "phases": {"prefill": drift(0.011), "decode": drift(0.0163)},
        "stages": [
            Stage("clean.opset", "exact", 1, 0.0021),
            Stage("quantize.rtn{format=int4-g32}", "lossy", 36, 0.19, drift(0.0121)),
        ],
        "context": context,
        "attention": heads(),
        "attribution": attribution(),
        "plain": drift(0.0003, sqnr_db=44.0, max_abs=0.5),
        "near_misses": [
            Misses("fuse.rms_norm: rms_norm", "wanted Sqrt, found Tanh", 11, "node_1", "Mul", 4, "node_tanh")
        ],
        "depth": [Level(f"add_{i}", i // 2, 40.0 - 2 * i) for i in range(8)],
        "nodes": NODES,
        "placement": [
            Placed("weights", "int4-g32", 112, "widened", "bf16", "matrix"),
            Placed("activations", "fp32", 112, "emulated", "bf16", "matrix"),
            Placed("rest", "fp32", 0, "native", "fp32", "vector"),
        ],
        "memory": {
            "weights": Figure(183_000, "bytes", "measured"),
            "workspace": Figure(2.5e6, "bytes", "estimated"),
        },
        "seconds": {"convert": Figure(3.2, "s", "measured"), "decode step": Figure(2.1e-5, "s", "simulated")},
        "estimate": simulated(),
        "budget": {"kl_mean": 0.02, "top1": 0.97},
        "repeat": "porter convert stories260k.onnx --target maia-200 --weights int4 --budget kl=0.02 -o out",
        "versions": {"porter": "0.1.0"},
    }
    return DriftReport(**(fields | changes))


@pytest.fixture
def make_report():
    """A full report, with changes."""
    return report


@pytest.fixture
def make_drift():
    """A plain drift, with changes."""
    return drift


@pytest.fixture
def make_plan():
    """A plan of three storages and five launches, in its JSON form."""

    def plan(**changes):
        places = [(0, 4096), (4096, 8192), (12288, 1024)]
        lives = [(0, 4096, 0, 1), (1, 8192, 1, 3), (2, 512, 2, 2), (0, 2048, 3, 4), (2, 1024, 4, 4)]
        buffers = [
            {"name": f"alloc{i}", "kind": "workspace", "storage": s, "bytes": n, "first": a, "last": b}
            for i, (s, n, a, b) in enumerate(lives)
        ]
        buffers.append({"name": "w0", "kind": "weight", "storage": None, "bytes": 99, "first": 0, "last": 4})
        return {
            "storages": [{"offset": o, "bytes": n} for o, n in places],
            "buffers": buffers,
            "launches": [{"kernel": f"k{i}"} for i in range(5)],
            "workspace_bytes": 13312,
            "lower_bound_bytes": 12288,
        } | changes

    return plan


@pytest.fixture(scope="session")
def schema():
    """The published schema of a report."""
    found = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)
