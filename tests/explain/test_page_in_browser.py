"""The page of an explanation in a real browser: wide, narrow and dark."""

import pytest
from explained import EXPLANATIONS

from hf_prune.explain.page import make_page

pytestmark = pytest.mark.browser

SIZES = {
    "wide": ({"width": 1280, "height": 900}, "light"),
    "narrow": ({"width": 400, "height": 800}, "light"),
    "dark": ({"width": 1280, "height": 900}, "dark"),
}

# The contrast of every text with what is behind it, as WCAG 2 defines it: those below 4.5, or 3 where it is large.
FAINT_TEXTS = """() => {
  const parse = color => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const color = parse(getComputedStyle(one).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
      if (color[3] > 0) throw new Error("a background that shows through: " + one.outerHTML.slice(0, 80));
    }
    throw new Error("nothing is behind " + element.outerHTML.slice(0, 80));
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
    const style = getComputedStyle(element);
    const color = parse(element instanceof SVGElement ? style.fill : style.color);
    const lights = [light(color), light(behind(element))].sort((a, b) => b - a);
    const contrast = (lights[0] + 0.05) / (lights[1] + 0.05);
    if (contrast < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) {
      found.push(element.textContent.trim().slice(0, 40) + ": " + contrast.toFixed(2));
    }
  }
  return found;
}"""

WHAT_IS_THERE = """() => ({
  title: document.title,
  headings: [...document.querySelectorAll("h1, h2, h3")].map(one => Number(one.tagName[1])),
  sections: [...document.querySelectorAll("main > section > h2")].map(one => one.textContent),
  landmarks: ["header", "nav", "main", "footer"].map(name => document.querySelectorAll(name).length),
  contents: [...document.querySelectorAll("nav a")].map(one => document.querySelector(one.hash) !== null),
  tables: document.querySelectorAll("table").length,
  withoutCaption: [...document.querySelectorAll("table")].filter(one => one.caption === null).length,
  withoutScope: document.querySelectorAll("th:not([scope])").length,
  rowsWithoutHeader: [...document.querySelectorAll("tbody tr")].filter(one => one.querySelector("th") === null).length,
  pictures: document.querySelectorAll("svg").length,
  unnamedPictures: [...document.querySelectorAll("svg")].filter(one =>
    one.closest("[aria-hidden=true]") === null && !one.getAttribute("aria-label")).length,
  width: document.documentElement.scrollWidth,
  outside: [...document.querySelectorAll("main *")].filter(one =>
    one.closest(".scroll, .sr") === null && one.getBoundingClientRect().right > innerWidth + 1)
    .map(one => one.outerHTML.slice(0, 80)),
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> the page of each explanation."""
    found = {}
    for name, make in EXPLANATIONS.items():
        found[name] = tmp_path_factory.mktemp(name) / "index.html"
        found[name].write_bytes(make_page(make()))
    return found


@pytest.fixture(params=SIZES)
def opened(request, browser):
    """Opens a page: (what is asked of it, its requests, its messages)."""
    viewport, scheme = SIZES[request.param]
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    asked, said = [], []
    page.on("request", lambda one: asked.append(one.url))
    page.on("console", lambda one: said.append(one.text))
    page.on("pageerror", lambda one: said.append(str(one)))
    page.on("dialog", lambda one: (said.append(one.message), one.dismiss()))
    page.asked, page.said = asked, said
    yield page
    context.close()


@pytest.mark.parametrize("name", EXPLANATIONS)
def test_a_page_is_whole_by_itself_and_readable_at_every_size(opened, pages, name):
    address = pages[name].as_uri()
    opened.goto(address)
    there = opened.evaluate(WHAT_IS_THERE)
    assert opened.asked == [address]
    assert opened.said == []
    assert there["title"].startswith("What pruning changed in ")
    assert there["headings"][:2] == [1, 2]
    assert all(after <= before + 1 for before, after in zip(there["headings"], there["headings"][1:], strict=False))
    assert {"What was taken", "What changed in the answers", "Where it changed most"} <= set(there["sections"])
    assert there["landmarks"] == [1, 1, 1, 1]
    assert len(there["contents"]) == len(there["sections"])
    assert all(there["contents"])
    assert there["tables"] >= 1
    assert (there["withoutCaption"], there["withoutScope"], there["rowsWithoutHeader"]) == (0, 0, 0)
    assert there["unnamedPictures"] == 0
    assert there["width"] == opened.viewport_size["width"]
    assert there["outside"] == []
    opened.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert opened.evaluate("document.documentElement.scrollWidth") == opened.viewport_size["width"]
    assert opened.evaluate(FAINT_TEXTS) == []


def test_pictures_and_figures_without_a_dense_model_are_seen_without_scrolling(opened, pages):
    opened.goto(pages["alone"].as_uri())
    tables = "[...document.querySelectorAll('table.figures')].filter(one => one.checkVisibility())"
    wider = f"{tables}.map(one => one.parentElement.scrollWidth - one.parentElement.clientWidth)"
    assert set(opened.evaluate(wider)) == {0}


# The words of the labels of heat maps, between dots and underscores, that are broken over lines.
BROKEN_WORDS = """() => {
  const found = [];
  for (const label of document.querySelectorAll("table.heat th")) {
    const nodes = document.createTreeWalker(label, NodeFilter.SHOW_TEXT);
    while (nodes.nextNode()) {
      for (const word of nodes.currentNode.textContent.matchAll(/[^\\s._]+[._]?/g)) {
        const range = document.createRange();
        range.setStart(nodes.currentNode, word.index);
        range.setEnd(nodes.currentNode, word.index + word[0].length);
        const tops = [...range.getClientRects()].map(one => Math.round(one.top));
        if (new Set(tops).size > 1) found.push(label.textContent);
      }
    }
  }
  return found;
}"""


def test_labels_of_heat_maps_break_at_dots_and_underscores_alone(browser):
    explanation = EXPLANATIONS["classifier"]()
    matrices = [
        one.model_copy(update={"kind": f"block.intermediate_projection_{one.kind}"}) for one in explanation.matrices
    ]
    for some in (explanation.matrices, matrices):
        content = make_page(explanation.model_copy(update={"matrices": tuple(some)}))
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.set_content(content.decode())
        assert page.locator("table.heat tbody th").count() > 4
        assert page.evaluate(BROKEN_WORDS) == []
        breaking = "max-width: 3rem !important; min-width: 0 !important; overflow-wrap: anywhere !important"
        page.add_style_tag(content=f"table.heat tbody th {{ {breaking}; }}")
        assert page.evaluate(BROKEN_WORDS) != []
        page.close()


def test_faint_texts_are_found(browser):
    page = browser.new_page()
    page.set_content("<body style='background: #fff'><p style='color: #888'>faint</p><p>clear</p></body>")
    assert page.evaluate(FAINT_TEXTS) == ["faint: 3.54"]
    page.close()


def test_dark_pages_are_dark_with_their_pictures(browser, pages):
    found = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(pages["classifier"].as_uri())
        found.append(
            page.evaluate(
                """() => {
                  const filled = ["figure text", ".p-dot", ".d-dot"].map(
                    one => getComputedStyle(document.querySelector(one)).fill);
                  const cell = document.querySelector("td.h15, td.h16, td.h17");
                  return [document.body, cell].map(one => getComputedStyle(one).backgroundColor).concat(filled);
                }"""
            )
        )
        page.close()
    light, dark = found
    assert all(one != other for one, other in zip(light, dark, strict=True))


def test_wide_tables_are_scrolled_by_themselves_and_reached_by_the_keyboard(browser, pages):
    page = browser.new_page(viewport=SIZES["narrow"][0])
    page.goto(pages["huge"].as_uri())
    wide = page.evaluate(
        """() => [...document.querySelectorAll(".scroll")].filter(one => one.scrollWidth > one.clientWidth)
        .map(one => [one.tabIndex, one.getAttribute("role"), Boolean(one.getAttribute("aria-label"))])"""
    )
    page.close()
    assert len(wide) > 5
    assert all(one == [0, "region", True] for one in wide)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tables_that_are_wider_than_the_screen_show_that_there_is_more(browser, pages, scheme):
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page.goto(pages["classifier"].as_uri())
    state = """one => [one.scrollWidth > one.clientWidth, getComputedStyle(one).maskImage.startsWith("linear-gradient"),
        getComputedStyle(one).maskImage.includes("rgba(0, 0, 0, 0)")]"""
    tables = page.locator("main > section > .scroll")
    found = [one.evaluate(state) for one in tables.all()]
    assert {wide for wide, _, _ in found} == {True, False}
    assert [wide for wide, _, _ in found] == [fades for _, _, fades in found]
    wide = tables.all()[[one[0] for one in found].index(True)]
    before = wide.screenshot()
    wide.evaluate("one => { one.style.animation = 'none'; one.style.background = 'none' }")
    assert wide.screenshot() != before
    wide.evaluate("one => { one.style.animation = ''; one.style.background = ''; one.scrollLeft = one.scrollWidth }")
    page.wait_for_timeout(100)  # for the next frame
    assert not wide.evaluate(state)[2]
    shadow = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--shadow')")
    assert shadow == {"light": "#0000004d", "dark": "#ffffff52"}[scheme]
    assert "--shadow" not in wide.evaluate("one => getComputedStyle(one).backgroundImage")
    assert wide.evaluate("one => getComputedStyle(one).backgroundImage").count("linear-gradient") == 4
    page.close()


def test_no_script_of_a_text_ran(browser, pages):
    page = browser.new_page()
    page.goto(pages["hostile"].as_uri())
    assert page.evaluate(
        "[document.title.startsWith('What pruning'), document.scripts.length, document.images.length]"
    ) == [
        True,
        0,
        0,
    ]
    assert "<script>document.title" in page.inner_text("h1")
    page.close()


def test_printed_pages_have_what_was_folded(browser, pages):
    page = browser.new_page()
    page.goto(pages["classifier"].as_uri())
    folded = page.locator("details table").first
    assert not folded.is_visible()
    page.emulate_media(media="print")
    assert folded.is_visible()
    assert not page.locator("nav").is_visible()
    page.close()
