import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_prune.publish.markdown import code, fence, inline, single_line

quick = settings(max_examples=60, deadline=None, derandomize=True)

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

PIECES = (
    *("`", "``", "|", "\\", "*", "_", "**", "~~", "[", "](", ")", "![", "<", ">", "<b>", "</code>", "<!--", "-->"),
    *("&amp;", "&#35;", "&", "#", "# ", "$", "$$", "!", "@", "\n", "\r\n", "\t", "\0", "\u2028", "\u202e", "\x85"),
    *("- ", "+ ", "* ", "1. ", "2) ", "---", "===", "===\n", "> ", "    ", "<script>", "<https://a.b>", "http://a.b"),
    *("{{ x }}", "{% raw %}", "name", "a b", "é", "漢字", "\U0001f600", "\u0301", "\ud800", "%", "'", '"', ";", "~"),
)

texts = st.text(max_size=30) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


class Elements(HTMLParser):
    """Names of the elements that are opened and closed, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_comment(self, data):
        self.tags.append("comment")

    def handle_data(self, data):
        self.text += data


def elements(markdown):
    return Elements(MARKDOWN.render(markdown))


def squeezed(text):
    return " ".join(text.split())


WITHIN = {
    "paragraph": "before {} after",
    "heading": "## Of {}",
    "whole heading": "# {}",
    "cell": "| a | b |\n|---|---|\n| {} | c |",
    "link": "[{}](https://example.org/a)",
    "list item": "- Of {}.",
    "two in a line": "From {0} to {0}.",
}
AT_THE_START = {
    "paragraph": "{} after",
    "list item": "- {} after",
    "whole list item": "- {}",
    "second line": "before\n{}",
}


def shows(place, rendered, value):
    """Check that a place with a rendered value has the elements of the place, and the value as its text."""
    text = single_line(value)
    plain = elements(place.format("x"))
    found = elements(place.format(rendered))
    added = [tag for tag in found.tags if tag not in ("code", "/code")]
    assert added == plain.tags
    assert squeezed(found.text) == squeezed(plain.text.replace("x", text) if "x" not in text else _filled(place, text))


def _filled(place, text):
    return elements(place.format("\ue000")).text.replace("\ue000", text)


# ---- A single line ----


@quick
@given(texts | st.text(st.characters(), max_size=30))
@example("a\ud800b")
@example("\u202egnp.exe")
def test_a_single_line_has_no_breaks_or_control_characters_and_can_be_encoded(value):
    line = single_line(value)
    assert line.splitlines() in ([], [line])
    assert line.isprintable()
    assert line == squeezed(line)
    assert line.encode().decode() == line


def test_printable_text_is_left_alone_but_for_its_spaces():
    assert single_line("  Größe der 模型 (v1.0)\n\t “x” ") == "Größe der 模型 (v1.0) “x”"


@quick
@given(texts)
def test_a_single_line_of_a_single_line_is_the_same(value):
    assert single_line(single_line(value)) == single_line(value)


def test_anything_can_be_a_single_line():
    assert [single_line(value) for value in (None, 1.5, ["a\nb"])] == ["None", "1.5", r"['a\nb']"]


# ---- In a line of text ----


@pytest.mark.parametrize("place", WITHIN.values(), ids=WITHIN)
@quick
@given(value=texts)
@example(value="[x](javascript:alert(1))")
@example(value="a | b \\| c \\")
@example(value="# trailing #")
@example(value="<!-- hf-prune: end summary -->")
def test_text_within_a_line_shows_itself_and_nothing_else(place, value):
    shows(place, inline(value), value)


@pytest.mark.parametrize("place", AT_THE_START.values(), ids=AT_THE_START)
@quick
@given(value=texts)
@example(value="- a")
@example(value="+ a")
@example(value="1. a")
@example(value="1) a")
@example(value="---")
@example(value="===")
def test_text_at_the_start_of_a_line_shows_itself_and_nothing_else(place, value):
    if single_line(value):
        shows(place, inline(value), value)


@quick
@given(texts)
def test_a_formula_is_no_formula(value):
    assert not re.search(r"(?<!\\)(\\\\)*\$", inline(value))


# ---- As code ----


PLACES = WITHIN | {f"{name} at the start": place for name, place in AT_THE_START.items()}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@quick
@given(value=texts)
@example(value="")
@example(value="`")
@example(value=" ` ")
@example(value="a|b")
@example(value="\\")
@example(value="</code><b>")
@example(value="---")
def test_code_shows_itself_and_nothing_else(place, value):
    shows(place, code(value), value)


@quick
@given(texts)
def test_code_is_one_element(value):
    found = elements(f"x {code(value)} x")
    assert found.tags == ["p", "code", "/code", "/p"]


def test_plain_names_are_plain_code_spans():
    assert code("bert.encoder.layer.0.weight") == "`bert.encoder.layer.0.weight`"
    assert code(1e-05) == "`1e-05`"


# ---- A block of code ----


@quick
@given(texts | st.text("`~\n a", max_size=40))
@example("```")
@example("````\n```python\n")
@example("a\n\n    b\n~~~\n")
@example("")
def test_a_fence_holds_any_text(text):
    (token,) = MARKDOWN.parse(fence(text, "yaml"))
    assert (token.type, token.info) == ("fence", "yaml")
    held = re.sub(r"\r\n?", "\n", text.rstrip()).replace("\0", "\ufffd")
    assert token.content == held + "\n"


def test_what_follows_a_fence_is_not_in_it():
    tokens = MARKDOWN.parse(fence("```\n# no heading", "") + "\n\n# A heading")
    assert [token.type for token in tokens] == ["fence", "heading_open", "inline", "heading_close"]
