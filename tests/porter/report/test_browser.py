"""The page in a real browser: it renders, says nothing on the console, and asks the world for nothing."""

import browser
import pytest

from porter.report.html import to_html

WIDTHS = (400, 1200)


@pytest.fixture(scope="module")
def chromium():
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with browser.Browser(path) as found:
        yield found


@pytest.fixture
def page(tmp_path, make_report, make_plan):
    path = tmp_path / "report.html"
    path.write_text(to_html(make_report(), make_plan()), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_it_renders_from_disk_alone(chromium, page, width):
    grounds = []
    for dark in (False, True):
        chromium.open(page, width=width, dark=dark)
        assert chromium.seen.console == []
        assert chromium.seen.requests == [page.as_uri()]
        assert chromium.ask("document.querySelector('.verdict').getBoundingClientRect().height") > 20
        # The page itself is never wider than the window; tables and pictures scroll in their own frames.
        assert chromium.ask("document.documentElement.scrollWidth <= innerWidth")
        grounds.append(chromium.ask("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


def test_every_picture_is_drawn_and_told(chromium, page):
    chromium.open(page, width=1200, dark=False)
    sizes = chromium.ask("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
    assert len(sizes) >= 5
    assert min(sizes) > 100
    silent = "[...document.querySelectorAll('svg')].filter(s => !s.getAttribute('aria-label')).length"
    assert chromium.ask(silent) == 0
    # No label is cut off by the edge of its picture.
    cut = """[...document.querySelectorAll('.picture svg text')].filter(t => {
        const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(t => t.textContent)"""
    assert chromium.ask(cut) == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(chromium, page, dark):
    """A contrast of 4.5 at least (WCAG 2.2, 1.4.3), wherever there is text outside of pictures."""
    chromium.open(page, width=1200, dark=dark)
    low = chromium.ask("""(() => {
        const rgb = s => (s.match(/[\\d.]+/g) || []).map(Number);
        const light = c => c.slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = e => {
            for (; e; e = e.parentElement) {
                const c = rgb(getComputedStyle(e).backgroundColor);
                if (c.length === 3 || c[3] === 1) return c;
            }
        };
        return [...document.querySelectorAll('p, td, th, dt, dd, h1, h2, h3, small, .kind, li, code')]
            .filter(e => e.textContent.trim() && !e.closest('.heat')).filter(e => {
                const both = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
                const [a, b] = both.sort((x, y) => y - x);
                return (a + 0.05) / (b + 0.05) < 4.5;
            }).map(e => e.className + ' ' + e.textContent.slice(0, 20));
    })()""")
    assert low == []
