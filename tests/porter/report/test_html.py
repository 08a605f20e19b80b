"""The page: complete, self-contained, well-formed, and deaf to what a model's strings say."""

import itertools
import math
from html.parser import HTMLParser

import pytest

from porter.drift.attribution import Attribution, Part
from porter.drift.depth import Level
from porter.drift.measures import Drift
from porter.report.chart import chart
from porter.report.depth import depth
from porter.report.front import front, shares
from porter.report.html import to_html
from porter.report.planned import picture
from porter.report.report import DriftReport
from porter.report.timeline import timelines
from porter.report.waterfall import waterfall
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
            "decode at 512",
            "47,000",
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


def test_the_parts_are_drawn_to_scale():
    def part(name, own, after):
        return Part(name, (), Drift(kl_mean=own), Drift(kl_mean=after))

    found = Attribution([part("weights", 0.4, 0.4), part("KV cache", 0.2, 0.8), part("lowering", 0.3, 0.6)])
    falls = waterfall(found)
    assert [text for _, text in falls.ticks][:2] == ["0", "0.5"]
    top = float(falls.ticks[-1][1])

    def pieces(i):
        return {k: (x / 1000 * top, w / 1000 * top) for k, x, w in falls.bars[i].pieces if w}

    near = {"abs": 1e-3 * top}
    assert pieces(0)["part"] == pytest.approx((0, 0.4), **near)
    assert pieces(1)["part"] == pytest.approx((0.4, 0.2), **near)
    assert pieces(1)["met"] == pytest.approx((0.6, 0.2), **near)  # comes on top
    assert pieces(2)["undone"] == pytest.approx((0.8, 0.3), **near)  # nothing of it stays
    assert pieces(2)["less"] == pytest.approx((0.6, 0.2), **near)
    assert "part" not in pieces(2)
    assert pieces(3) == {"part": pytest.approx((0, 0.6), **near)}
    assert waterfall(Attribution([part("weights", math.inf, math.inf)])) is None
    assert waterfall(Attribution()) is None


def test_the_memory_is_drawn_where_and_when_it_is_used(make_plan):
    p = picture(make_plan())
    assert len(p.blocks) == 5
    byte = (p.bottom - 34) / (float(p.up[-1][1].split()[0]) * 1024)
    launch = (p.right - p.left) / 5
    first = p.blocks[0]
    assert (first.x, first.width) == (p.left, pytest.approx(2 * launch, abs=0.1))  # launches 0 and 1
    assert first.y + first.height == pytest.approx(p.bottom, abs=0.1)
    assert first.height == pytest.approx(4096 * byte, abs=0.2)
    assert p.blocks[1].y + p.blocks[1].height == pytest.approx(first.y, abs=0.2)  # the next storage
    assert p.bound[0] == pytest.approx(p.bottom - 12288 * byte, abs=0.2)
    assert p.up[-1][1] == "15 KiB"
    assert p.left_out == 0
    assert picture(make_plan(workspace_bytes=0)) is None


def test_a_plan_of_thousands_of_buffers_is_drawn_by_its_largest(make_plan):
    one = make_plan()["buffers"][0]
    many = [one | {"bytes": i} for i in range(1, 1001)]
    p = picture(make_plan(buffers=many))
    assert (len(p.blocks), p.left_out) == (800, 200)


def kernels(*times):
    bounds = ("bandwidth of hbm", "latency", "matrix", "vector", "dma")
    return [
        {"name": f"kernel_{i}", "kind": "simulated", "seconds": t, "calls": i + 1, "bound_by": bounds[i % 5]}
        for i, t in enumerate(times)
    ]


def test_the_timeline_adds_up():
    prefill, decode = timelines(
        {
            "prefill": {"tokens": 512, "context": 512, "kernels": kernels(1e-4, 3e-4, 2e-5, 5e-6, 9e-4)},
            "decode": {"tokens": 1, "context": 512, "kernels": kernels(2e-6, 7e-6, 1e-6)},
        }
    )
    assert prefill.total == "5.28 ms"  # 1 x 0.1, 2 x 0.3, 3 x 0.02, 4 x 0.005, 5 x 0.9 ms
    assert decode.title == "decode step at 512 tokens"
    ends = [s.x + s.width for s in prefill.segments]
    assert ends[:-1] == pytest.approx([s.x for s in prefill.segments[1:]], abs=0.11)
    assert ends[-1] == pytest.approx(prefill.width - 8, abs=0.2)
    assert next((k.name, k.share, k.bound) for k in prefill.longest) == ("kernel_4", "85.2 %", "dma")
    assert [shade for shade, _, _ in prefill.bounds] == [0, 1, 2, 3, 3]
    assert list(timelines({"prefill": None, "decode": {"kernels": []}})) == []


def test_depth_goes_down_to_the_last_layer(make_report):
    d = depth([*make_report().depth, Level("same", 4, math.inf)])
    assert [m.label for m in d.marks] == ["", "0", "", "1", "", "2", "", "3"]
    assert all(a.y < b.y for a, b in itertools.pairwise(d.marks))  # down, where pixels grow
    assert d.summary == "from 40 dB after the first addition to 26 dB after the last"
    assert depth([Level("one", 0, 3.0)]) is None


def test_every_section_is_there_where_its_data_is(make_report, make_plan):
    full, bare = Page(to_html(make_report(), make_plan())), Page(to_html(DriftReport({}, "host", "", {}, {})))
    for heading in (
        *("Where the drift comes from", "Against ordinary rounding", "Nodes that are furthest off"),
        *("Drift against context length", "Layer by layer", "What becomes of each class", "Memory over time"),
        *("Where the time goes on the target", "What was done to the model", "What nearly applied"),
    ):
        assert heading in full.text
        assert heading not in bare.text
    assert "What was run, and how to repeat it" in bare.text
    assert "rms 6.7 ×" in full.text  # 10 ** ((44 - 27.5) / 20)


def test_what_was_not_split_says_why(make_report):
    skipped = make_report(attribution=Attribution(skipped="the model has 7 weights"), plain=None)
    assert "Not split by its causes: the model has 7 weights." in Page(to_html(skipped)).text


def searched_for():
    """A search of four points, two of which were tried, and three places."""
    tried = {0.004: 0.005, 0.0004: 0.0003}
    points = [
        {"cost": 100.0 * bits, "bits": {"weights": bits}, "promised": {"kl_mean": kl}, "measured": None}
        for bits, kl in ((2.0, 0.04), (4.0, 0.004), (8.0, 0.0004), (32.0, 0.0))
    ]
    points += [
        p | {"measured": {"kl_mean": tried[p["promised"]["kl_mean"]]}}
        for p in points
        if p["promised"]["kl_mean"] in tried
    ]
    chosen = (("weight", "int4-g32", 64), ("weight", "int4-g32", 16), ("weight", "", 20))
    items = [{"kind": k, "chosen": c, "numbers": n, "name": "w"} for k, c, n in chosen]
    facts = {"minimize": "bytes", "unit": "bytes", "kind": "measured", "cost": 4.0, "bound": 4.0}
    more = {"bits": {"weights": 4.0}, "promised": {"kl_mean": 0.004}, "rounds": [points[-1]]}
    return facts | more | {"front": points, "items": items}


def test_the_front_of_a_search_is_drawn_on_decades():
    found = front(searched_for(), {"kl_mean": 0.01})
    line = [tuple(map(float, point.split(","))) for point in found.line.split()]
    assert len(line) == 3  # a drift of 0 has no place on a logarithm
    (x, y), (x2, y2), _ = line
    assert x2 - x == pytest.approx((line[2][0] - x2) / 2, abs=0.2)  # 2 and 4 bits, 4 and 8 bits
    assert y2 - y == pytest.approx(line[2][1] - y2, abs=0.2)  # a tenth each time
    assert found.limit[1].startswith("budget")
    assert y < found.limit[0] < y2
    assert sorted(d.measured < d.promised for d in found.dots) == [False, True]  # worse is higher up
    assert [(s.name, s.places, s.share) for s in shares(searched_for())] == [
        ("weight: int4-g32", 2, "80 %"),
        ("weight: as it is", 1, "20 %"),
    ]
    assert front({}, {}) is None


def test_a_search_has_its_section(make_report):
    page = Page(to_html(make_report(search=searched_for())))
    assert "How formats were found" in page.text
    assert "average bits of a weight" in page.text
