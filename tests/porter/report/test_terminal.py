"""What the terminal shows: figures, their kinds, and never a success that is none."""

import io
import math

import pytest
from rich.console import Console

from porter.drift.attribution import Attribution
from porter.drift.measures import Drift
from porter.report.report import DriftReport
from porter.report.terminal import show
from porter.report.words import amount, clean, title, value
from porter.weights.select import Kept


def shown(report, width=80):
    out = io.StringIO()
    show(report, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_all_that_matters_is_there(make_report):
    text = shown(make_report())
    for wanted in (
        "stories260k on maia-200",
        "0.0011",
        "97.53 %",
        "27.5 dB",
        "quantize.rtn",
        "∞",
        "2064",
    ):
        assert wanted in text
    assert text.rstrip().endswith("Within budget: kl_mean 0.0123, top1 0.9753")
    assert max(map(len, text.splitlines())) <= 80


def test_every_block_says_how_its_figures_came_about(make_report):
    text = shown(make_report())
    assert text.count("simulated") >= 4  # total, lowering, context, decode step
    assert "47,000" in text
    assert "decode at 512" in text
    assert "counting (1)" in text
    lines = [
        line for line in text.splitlines() if any(w in line for w in ("weights ", "convert", "decode step"))
    ]
    assert all(any(k in line for k in ("measured", "simulated", "estimated")) for line in lines[-3:])


@pytest.mark.parametrize("budget", [{"kl_mean": 0.01}, {"top1": 0.99}, {"cosine": 0.9}])
def test_over_budget_never_reads_as_success(make_report, budget):
    text = shown(make_report(budget=budget))
    assert text.rstrip().splitlines()[-1].startswith("Over budget: ")
    assert "Within budget" not in text


def test_broken_outputs_without_a_budget(make_report):
    text = shown(make_report(drift={"total": Drift(kl_mean=math.inf, max_abs=math.inf, tokens=1)}, budget={}))
    assert "Over budget: kl_mean is inf" in text


def test_no_budget_is_no_praise(make_report):
    assert "No budget was given" in shown(make_report(budget={}))
    assert "Drift was not measured" in shown(DriftReport({"name": "m"}, "host", "", {}, {}))


def test_weights_that_stay_floats_are_named(make_report):
    kept = [
        Kept(("embedding", "head"), 1, 131072, "fp32"),
        Kept(("mlp",), 4, 2 << 20, "fp32"),
        Kept(("attention",), 2, 1 << 10, "bf16"),
    ]
    text = "embedding, lm head (1 weight, 128 KiB), mlp (4 weights, 2 MiB) kept in fp32; "
    text += "attention (2 weights, 1 KiB) kept in bf16"
    assert text in " ".join(shown(make_report(kept=kept)).split())
    assert "kept in" not in shown(make_report())


def test_feeds_that_mean_little_are_named(make_report):
    text = shown(
        make_report(feeds={"kind": "random", "source": "x", "sequences": 1, "tokens": 2, "short": 1})
    )
    assert "random tokens, which say little about real use" in text
    assert "too short" in text


def test_hostile_names_are_shown_not_obeyed(make_report):
    evil = "[red]x[/red]\x1b[2J\u202egnp.exe\r\n"
    text = shown(make_report(model={"name": evil}, target=evil, nodes=[{"name": evil}]), width=200)
    assert "[red]x[/red]\\x1b[2J\\u202egnp.exe\\r\\n" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_encoder(make_report):
    total = Drift(max_abs=0.1, sqnr_db=30.0, cosine=0.99, tokens=3)
    text = shown(
        make_report(
            drift={"total": total}, phases={}, context=[], stages=[], attribution=Attribution(), plain=None
        )
    )
    assert "cosine" in text
    assert "perplexity" not in text
    assert "KL" not in text


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0, "bytes", "0 bytes"),
        (1023, "bytes", "1023 bytes"),
        (1024, "bytes", "1 KiB"),
        (3 * 2**30, "bytes", "3 GiB"),
        (2**60, "bytes", "1,048,576 TiB"),
        (0, "s", "0 s"),
        (0.00002, "s", "20 µs"),
        (0.25, "s", "250 ms"),
        (12.3456, "s", "12.35 s"),
        (1.5, "1", "1.5"),
        (math.inf, "s", "∞"),
    ],
)
def test_amounts(number, unit, text):
    assert amount(number, unit) == text


def test_values():
    assert [value(None), value(math.nan), value(-math.inf), value(0.5, "top1")] == [
        "–",
        "not a number",
        "−∞",
        "50 %",
    ]
    assert clean("a\tb\ud800") == "a\\tb\\ud800"


def test_a_comparison_names_both_models() -> None:
    """Without a target there is no port: one model is measured against another."""
    report = DriftReport(
        model={"name": "b", "reference": "a"}, target="", pipeline="", feeds={}, drift={"total": Drift()}
    )
    assert title(report) == "b against a"


def test_calibration_is_said(make_report):
    fed = {"kind": "random", "source": "uniform\x1b[2J", "sequences": 4, "tokens": 77}
    text = " ".join(shown(make_report(calibration=fed)).split())
    assert (
        "calibrated on random tokens, which say little about real use (uniform\\x1b[2J): 4 sequences, 77"
        in text
    )
    assert "calibrated" not in shown(make_report())


def test_attention_by_context_length_and_the_worst_heads(make_report):
    text = shown(make_report())
    assert "worst head: layer 0 head 2: TV 0.12 at 256 tokens (simulated)" in text
    assert text.count("worst head: ") == 3
    rows = [line.split() for line in text.splitlines()]
    assert ["256", "1.5", "0.06", "0.12", "0.97"] in rows  # largest logit change, mean and worst TV, cosine
    assert ["decoded"] in rows
    plain = shown(make_report(attention=(), context=[]))
    assert "worst head" not in plain
    assert "decoded" not in plain
