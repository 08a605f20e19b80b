"""Reports that several tests look at."""

import math

import pytest

from porter.drift.attention import Head
from porter.drift.measures import Drift
from porter.report.report import DriftReport, Figure, Stage
from porter.target.placed import Placed


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


def step(tokens):
    """A step of two kernels, as `porter.estimate.lowered.Lowered.told` has it."""
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
    kernels = [kernel | {"name": n, "units": [unit], "levels": levels, "calls": 1} for n in ("norm", "gemm")]
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
        "attention": [
            Head(
                layer,
                head,
                n,
                32,
                0.5 + layer,
                0.01 * (1 + head) * (n / 64) / (1 + layer),
                0.99 - 0.01 * head,
            )
            for n in (64, 256)
            for layer in (0, 1)
            for head in (0, 1, 2)
        ],
        "nodes": [
            {
                "name": "layers.3.mlp.down_proj",
                "op": "MatMul",
                "pass": "quantize.rtn",
                "kernel": "matmul_int4",
            }
            | {"sqnr_local_db": 21.2, "sqnr_db": 19.9},
            {"name": "lm_head", "op": "MatMul", "sqnr_local_db": None, "sqnr_db": 41.0},
        ],
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
        "estimate": {
            "kind": "simulated",
            "target": "maia-200",
            "rows": 8,
            "prefill": step(tokens=512),
            "decode": step(tokens=1),
        },
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
