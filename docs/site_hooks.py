"""Hooks of mkdocs: the site has the pages of the repository at the same places, and nothing in it leads nowhere.

Because a page and what it links to lie in the site as they do in the repository, the same relative links work in both.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
SHOWN = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs/**/*.md",
    "docs/*.css",
    "docs/study/*.png",
    "benchmarks/README.md",
    "benchmarks/*/*.png",
    "model_cards/*/*.*",
    "model_cards/*/assets/*.png",
    "model_cards/*/explain/*.*",
]
# Shown as pages of code: a browser would download the files themselves.
CODE = ["recipes/*.py", "recipes/*.yaml", "recipes/accelerate/*.yaml"]


def on_files(files, config):
    """Replace the files of docs_dir by those of the repository that the site shows."""
    for file in list(files):
        if Path(file.src_dir or "").resolve() == Path(config.docs_dir).resolve():
            files.remove(file)
    for path in _matching(SHOWN):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in _matching(CODE):
        language = "python" if path.endswith(".py") else "yaml"
        text = f"# {path}\n\n```{language}\n{(ROOT / path).read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"{path}.md", content=text))
    return files


def _matching(patterns):
    return sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})


def on_page_markdown(markdown, page, config, files):
    """Lead links to recipes to the pages that show them."""
    return re.sub(r"(\]\((?:\.\./)*recipes/[\w/]+\.(?:py|yaml))\)", r"\1.md)", markdown)


class _Html(HTMLParser):
    """The ids in a page, where its links lead, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        """Note what one element has and wants."""
        named = {name: value or "" for name, value in attributes}
        self.ids.update(named[name] for name in ("id", "name") if name in named)
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        self.loads += [named[name] for name in ("src", "srcset") if name in named]
        if tag == "link" and named.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(named["href"])


def on_post_build(config):
    """Fail the build for a link or an anchor that leads nowhere, and for anything that is loaded from elsewhere."""
    site = Path(config.site_dir)
    pages = {path: _Html(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    problems = []
    for path, page in pages.items():
        shown = path.relative_to(site)
        problems += [f"{shown}: loads {target} from elsewhere" for target in page.loads if urlsplit(target).netloc]
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file():
                problems.append(f"{shown}: {target} is not there")
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].ids:
                problems.append(f"{shown}: {target} names no part of that page")
    for path in site.rglob("*.css"):
        elsewhere = re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+", path.read_text(encoding="utf-8"))
        problems += [f"{path.relative_to(site)}: loads {target} from elsewhere" for target in elsewhere]
    if problems:
        raise PluginError("\n".join(problems))
