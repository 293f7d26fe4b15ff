"""What all pages share: the style sheet, which each has inline so that it opens without a network, and long names."""

import html
import re
from pathlib import Path


def page_style() -> str:
    """The style sheet: boxes, and tables that fade out at the side to which they can be scrolled (class `scroll`)."""
    return Path(__file__).with_name("page_style.css").read_text(encoding="utf-8")


def breakable(name: str) -> str:
    """A name as HTML, whose lines may break after dots, underscores, slashes, commas and signs of equality."""
    parts = re.split(r"(?<=[._/,=])", name)
    return "<wbr>".join(html.escape(part) for part in parts if part)
