"""The documentation: `make docs` builds it into build/docs, warnings are errors.

Markdown through MyST, for that is what the repository's other texts are written in; docstrings through
autodoc. Nothing is fetched: no fonts, no inventories, no mathematics from a network. Texts that live
elsewhere in the repository (README, CONTRIBUTING, csrc/README) are included, and links between files of the
repository become links between pages.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx.util import logging

import bop2nd_fast

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "bop2nd_fast"
author = "The bop2nd_fast authors"
project_copyright = author
release = version = bop2nd_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # an included text starts at the level it has at home

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False  # what says nothing of its own is not listed
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
default_role = "code"  # docstrings say `name`, as Markdown does
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = f"bop2nd_fast {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
highlight_language = "none"  # of blocks that name no language
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Files of the repository that are pages here; docs/*.md need no entry.
PAGES = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "csrc/README.md": "csrc",
    "benchmarks/README.md": "benchmarks",
}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def page_of(path: Path) -> str | None:
    """The page that a file of the repository is, as a path from docs/; None if it is none."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    if (result := re.fullmatch(r"benchmarks/results/([^/]+)/README\.md", name)) is not None:
        return f"results/{result[1]}.md"
    return f"{PAGES[name]}.md" if name in PAGES else None


def with_site_links(text: str, home: Path, page: Path) -> str:
    """``text`` of a file in the folder ``home`` with links as they must read in the page ``page``.

    A link to a file that is no page becomes its text: the site holds no copy of the repository.
    """

    def replace(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = Path(os.path.normpath(home / target))
        if not path.is_relative_to(ROOT) or not path.exists():
            return match[0]  # left to Sphinx, which warns
        if match["image"]:
            return f"![{match['text']}]({os.path.relpath(path, page.parent)}{anchor})"
        found = page_of(path)
        if found is None:
            return match["text"]
        return f"[{match['text']}]({os.path.relpath(DOCS / found, page.parent)}{anchor})"

    blocks = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(b if b.startswith("```") else LINK.sub(replace, b) for b in blocks)


def recipes_table() -> str:
    """Every recipe, for the place where a page says ``<!-- recipes -->``."""
    rows = ["| recipe | network | data | optimizer | epochs | batch |", "|---|---|---|---|--:|--:|"]
    for name in bop2nd_fast.recipes.NAMES:
        it = bop2nd_fast.recipes.get(name)
        cells = (f"`{name}`", it.network, it.dataset, it.optimizer, str(it.epochs), str(it.batch_size))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def on_source(app: Any, name: str, source: list[str]) -> None:
    page = DOCS / f"{name}.md"
    source[0] = with_site_links(source[0], page.parent, page)
    source[0] = source[0].replace("<!-- recipes -->", recipes_table())


def on_include(app: Any, path: Path, parent: str, source: list[str]) -> None:
    page = min(DOCS.rglob(f"{parent}.md"), key=lambda p: len(p.parts))
    source[0] = with_site_links(source[0], Path(os.path.normpath(DOCS / path)).parent, page)


def make_result_pages() -> None:
    """A page for every machine that has results; ignored by git."""
    folder = DOCS / "results"
    folder.mkdir(exist_ok=True)
    for readme in (ROOT / "benchmarks" / "results").glob("*/README.md"):
        target = os.path.relpath(readme, folder)
        text = f"---\norphan: true\n---\n\n```{{include}} {target}\n```\n"
        page = folder / f"{readme.parent.name}.md"
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


make_result_pages()


def on_finish(app: Any, exception: Exception | None) -> None:
    """No page may need a network to look right."""
    fetched = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"')
    for page in Path(app.outdir).rglob("*.html"):
        if found := fetched.search(page.read_text()):
            logging.getLogger(__name__).warning("%s fetches from a network: %s", page.name, found[0])


def setup(app: Any) -> None:
    app.connect("build-finished", on_finish)
    app.connect("source-read", on_source)
    app.connect("include-read", on_include)
