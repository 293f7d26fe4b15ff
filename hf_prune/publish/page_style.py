"""The style sheet that all pages share; each has it inline, so that it opens without a network."""

from pathlib import Path


def page_style() -> str:
    """The style sheet: boxes, and tables that fade out at the side to which they can be scrolled (class `scroll`)."""
    return Path(__file__).with_name("page_style.css").read_text(encoding="utf-8")
