"""Reports in a real browser: nothing fetched, no complaint, every figure visible, on a phone and in the dark."""

import pytest

from fastsiam.report.__main__ import main
from tests.support.optional import browser_path
from tests.support.run_folders import EVIL, write_run

pytestmark = pytest.mark.slow

# Boxes of the figures that are seen: [label, width, height].
FIGURES = """() => [...document.querySelectorAll('.panels figure')].map(figure => {
    const boxes = [...figure.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect());
    const seen = boxes.filter(box => box.width > 0);
    return [figure.querySelector('h3').textContent, seen.length, seen[0]?.width ?? 0, seen[0]?.height ?? 0];
})"""
PICTURES = "() => [...document.images].map(image => [image.complete && image.naturalWidth, image.width, image.height])"
WIDTHS = "() => [document.documentElement.scrollWidth, innerWidth]"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(playwright), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    one = write_run(root / "run", names=EVIL)
    others = [
        write_run(root / f"{'long-name' * 20}{number}", **{"optimizer.momentum": 0.5 + number / 10})
        for number in (1, 2)
    ]
    assert main([str(one), "--out", str(root / "one.html")]) == 0
    assert main([str(one), *map(str, others), "--out", str(root / "several.html")]) == 0
    return {name: f"file://{root}/{name}.html" for name in ("one", "several")}


@pytest.fixture
def opened(browser, pages):
    """A page in a window of some width and colour scheme; fails where the browser complains or fetches."""
    contexts, complaints = [], []

    def open_page(name, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: complaints.append(request.url) if fetched(request.url) else None)
        tab.goto(pages[name])
        return tab

    def fetched(url):
        return not url.startswith("data:") and url not in pages.values()

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("name", ["one", "several"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_seen_on_every_axis(opened, name, width):
    tab = opened(name, width)
    before = None
    for axis in ("time", "images", "epochs"):
        tab.locator(f"label[for=axis-{axis}]").click()
        shown = tab.evaluate(FIGURES)
        assert len(shown) == 8
        assert all(count == 1 and wide > 200 and high > 100 for _, count, wide, high in shown), shown
        label = tab.locator(".panels svg:visible").first.get_attribute("aria-label")
        assert f"over {axis}." in label
        assert label != before
        before = label
    pictures = tab.evaluate(PICTURES)
    assert len(pictures) == (16 + 48) * (1 if name == "one" else 3)
    assert all(natural == 32 and wide > 20 and high > 20 for natural, wide, high in pictures)
    assert tab.locator(".projection figure svg").first.bounding_box()["height"] > 150
    assert all(
        box["width"] > 0 for box in [locator.bounding_box() for locator in tab.locator("figure svg:visible").all()]
    )


@pytest.mark.parametrize("name", ["one", "several"])
def test_a_phone_needs_no_sideways_scrolling(opened, name):
    for width in (390, 320, 700, 985):
        content, window = opened(name, width).evaluate(WIDTHS)
        assert (content, window) == (width, width)


def test_dark_is_dark_and_text_keeps_its_contrast(opened):
    seen = {}
    for scheme in ("light", "dark"):
        tab = opened("one", scheme=scheme)
        color = "element => getComputedStyle(element)"
        seen[scheme] = [
            tab.locator("body").evaluate(f"{color}.backgroundColor"),
            tab.locator("body").evaluate(f"{color}.color"),
            tab.locator(".panels svg text:visible").first.evaluate(f"{color}.fill"),
        ]
        assert contrast(seen[scheme][0], seen[scheme][1]) > 7
        assert seen[scheme][1] == seen[scheme][2]
    assert brightness(seen["light"][0]) > 0.9
    assert brightness(seen["dark"][0]) < 0.1


def test_on_paper_it_is_light_and_without_the_switch(opened):
    tab = opened("one", 688, "dark")
    tab.emulate_media(media="print")
    assert brightness(tab.locator("body").evaluate("element => getComputedStyle(element).backgroundColor")) == 1
    assert not tab.locator("label[for=axis-time]").is_visible()
    assert all(count == 1 for _, count, _, _ in tab.evaluate(FIGURES))


def test_names_from_outside_stay_text(opened):
    tab = opened("one")
    assert tab.locator("script").count() == 0
    assert EVIL[:20] in tab.locator(".neighbours").inner_text()


def brightness(color):
    red, green, blue = (int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(","))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Ratio of WCAG 2: 4.5 is the least for text, 7 is enhanced."""
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)
