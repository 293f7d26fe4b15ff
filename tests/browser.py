"""A real browser for tests of pages: headless Chromium, driven by playwright; such tests are marked `browser`."""

import shutil

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Chromium for the tests of a module, which are skipped where none is installed; CONTRIBUTING.md says how to.

    `browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")` opens a page; close it again.
    """
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"no browser was found: none of {', '.join(_NAMES)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # CI runs tests as root
        yield chromium
        chromium.close()
