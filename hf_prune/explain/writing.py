"""Writing an explanation beside a saved model."""

import os
from pathlib import Path

from ..publish.explanation import Explanation, save_explanation


def write_explanation(folder: str | os.PathLike, explanation: Explanation) -> list[Path]:
    """Write an explanation into `explain/` of a folder. Returns the files; others are left as they are."""
    from .page import write_page  # matplotlib is loaded when an explanation is shown

    return [save_explanation(folder, explanation), *write_page(Path(folder), explanation)]
