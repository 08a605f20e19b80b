"""The page: complete, self-contained, well-formed, and deaf to what a model's strings say."""

import math
from html.parser import HTMLParser

import pytest

from porter.drift.measures import Drift
from porter.report.chart import chart
from porter.report.html import to_html
from porter.report.report import DriftReport
from porter.target.placed import Placed

VOID = {"meta", "line", "circle", "polyline", "link", "img", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_all_that_matters_is_there(make_report):
    page = Page(to_html(make_report()))
    for wanted in (
        *(
            "stories260k on maia-200",
            "Within budget",
            "0.0123 ± 0.0011",
            "97.53 %",
            "lowering",
            "decode",
            "∞",
        ),
        *(
            "quantize.rtn{format=int4-g32}",
            "layers.3.mlp.down_proj",
            "porter convert stories260k.onnx",
            "ab" * 32,
        ),
        *(
            "simulated",
            "measured",
            "estimated",
            "178.7 KiB",
            "21 µs",
            "47,000 tokens/s",
            "counting (1)",
            "kl_mean = 0.02",
        ),
    ):
        assert wanted in page.text, wanted
    assert page.tags.count("circle") == 4
    assert page.text.index("Within budget") < page.text.index("Where the drift comes from")


def test_nothing_is_fetched_or_run(make_report):
    source = to_html(make_report())
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "action", "xlink:href"} & names
    assert not any(name.startswith("on") for name in names)
    assert "url(" not in source
    assert "@import" not in source
    assert "default-src 'none'" in source
    assert "://" not in source


EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(1)>{{ 7*7 }}'`\x00\u202e</pre></style>&lt;"""


def test_hostile_strings_stay_text(make_report):
    stage = make_report().stages[0].__class__(EVIL, EVIL, 1, 0.1)
    honest = Page(to_html(make_report(stages=[make_report().stages[0]])))
    hostile = to_html(
        make_report(
            model={"name": EVIL, EVIL: EVIL},
            target=EVIL,
            pipeline=EVIL,
            repeat=EVIL,
            stages=[stage],
            feeds={"kind": EVIL, "source": EVIL, "sequences": EVIL, "tokens": EVIL, "short": EVIL},
            nodes=[dict.fromkeys(("name", "op", "pass", "kernel"), EVIL), {"name": "b"}],
            placement=[Placed("weights", EVIL, 1, "native", EVIL, "matrix", EVIL)],
            versions={EVIL: EVIL},
            estimate={"kind": EVIL, EVIL: EVIL},
            drift=make_report().drift | {EVIL: Drift(kl_mean=0.1)},
        )
    )
    page = Page(hostile)
    assert set(page.tags) == set(honest.tags)
    assert "<script>alert(1)</script>" in page.text  # shown as text
    assert "{{ 7*7 }}" in page.text  # and not evaluated
    assert "\x00" not in hostile
    assert "\u202e" not in hostile


def test_over_budget_is_first_and_red(make_report):
    source = to_html(make_report(budget={"kl_mean": 0.001}))
    assert 'class="verdict bad"' in source
    assert "Over budget: kl_mean 0.0123 is above 0.001" in Page(source).text
    assert "Within budget" not in source
    assert "<title>Over budget: " in source


def test_no_budget_is_no_praise(make_report):
    source = to_html(make_report(budget={}))
    assert 'class="verdict good"' not in source
    assert "No budget was given" in source


@pytest.mark.parametrize("total", [Drift(), Drift(max_abs=0.1, sqnr_db=30.0, cosine=0.99, tokens=3)])
def test_what_was_not_measured_is_left_out(total):
    page = Page(to_html(DriftReport({"name": "m"}, "host", "", {}, {"total": total})))
    assert "perplexity" not in page.text
    assert ("cosine" in page.text) == (total.cosine is not None)
    Page(to_html(DriftReport({}, "host", "", {}, {})))


def test_infinite_drift_is_drawn_as_such(make_report):
    context = [
        {"tokens": 64, "kl_mean": 0.1, "kl_ci95": 0.01},
        {"tokens": 128, "kl_mean": "inf", "kl_ci95": "inf"},
    ]
    c = chart(context)
    assert [m.infinite for m in c.marks] == [False, True]
    assert c.line.count(",") == 1
    page = Page(to_html(make_report(context=context, drift={"total": Drift(kl_mean=math.inf, tokens=1)})))
    assert page.tags.count("circle") == 1


def test_chart_places_values_to_scale():
    context = [{"tokens": n, "kl_mean": v, "kl_ci95": 0.0} for n, v in ((64, 0.0), (128, 0.5), (256, 1.0))]
    c = chart(context)
    y0, y1, y2 = (m.y for m in c.marks)
    assert y0 == c.bottom
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)  # rounded to tenths of a pixel
    assert [text for _, text in c.ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert c.ticks[-1][0] == y2
    assert chart(context[:1]) is None
    assert chart([]) is None


@pytest.mark.parametrize("top", [0.0, 1e-300, 3e-15, 0.013, 0.2, 7.0, 99.9, 1e12])
def test_chart_axis_holds_everything(top):
    c = chart(
        [{"tokens": 1, "kl_mean": top, "kl_ci95": top / 3}, {"tokens": 2, "kl_mean": 0.0, "kl_ci95": None}]
    )
    assert 2 <= len(c.ticks) <= 8
    assert all(0 < y <= c.bottom for m in c.marks for y in (m.y, m.low, m.high))
    if top:
        assert c.marks[0].high > 16 - 0.1  # the interval ends inside the frame


def test_same_report_same_bytes(make_report):
    assert to_html(make_report()) == to_html(make_report())


def test_every_head_is_in_the_heat_map(make_report):
    page = Page(to_html(make_report()))
    assert "What the cache does to attention" in page.text
    assert "TV of every head at 256 tokens" in page.text
    assert "Worst: layer 0 head 2: TV 0.12 at 256 tokens (simulated)" in page.text
    cells = [value for name, value in page.attributes if name == "style" and value.startswith("--tv")]
    assert cells == ["--tv: 0.040", "--tv: 0.080", "--tv: 0.120", "--tv: 0.020", "--tv: 0.040", "--tv: 0.060"]
    assert "attention" not in Page(to_html(make_report(attention=()))).text
