"""What the texts show is true: programs run, commands and options exist, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from typer.testing import CliRunner

from bop2nd_fast import models
from bop2nd_fast.cli import app
from bop2nd_fast.studies.definitions import STUDIES
from tests import documents

LANGUAGES = documents.SHOWN_ONLY | {"python", "bash"}
TABLES = {"docs/packed_file.md", "CONTRIBUTING.md"}
PROSE = [p for p in documents.PAGES if p.parent.name in ("docs", documents.ROOT.name)]
PROSE = [p for p in PROSE if documents.name(p) not in TABLES]
WITH_PYTHON = [p for p in documents.PAGES if any(b.language == "python" for b in documents.blocks(p))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=documents.name)
def test_the_programs_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    documents.run_programs(page)


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_first_commands_work(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for _, words in documents.commands(documents.ROOT / page):
        if words[0] == "bop2nd" and words[1] != "study":  # that one needs CIFAR-10
            tiny = ["--epochs", "1", "--width", "4"] if words[1] == "train" else []
            result = CliRunner().invoke(app, [*words[1:], *tiny])
            assert result.exit_code == 0, (words, result.output)
            ran.append(words[1])
    assert {"info", "train", "pack", "predict"} <= set(ran)


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.name)
def test_commands_and_links_exist(page: Path) -> None:
    found = [(line, documents.complaint(words)) for line, words in documents.commands(page)]
    complaints = [f"line {line}: {text}" for line, text in found if text is not None]
    for block in documents.blocks(page):
        if block.language not in LANGUAGES and not block.language.startswith("{"):
            complaints.append(f"line {block.line}: {block.language!r} is none of {sorted(LANGUAGES)}")
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", text):
        if not re.match(r"[a-z]+:", target) and not (page.parent / unquote(target)).exists():
            complaints.append(f"a link to {target}, which does not exist")
    assert not complaints


def test_the_studies_and_networks_are_all_named() -> None:
    recipes, train = ((documents.ROOT / "docs" / name).read_text() for name in ("recipes.md", "train.md"))
    assert not [name for name in STUDIES if f"| `{name}` |" not in recipes]
    networks = [name for name in models.__all__ if name not in ("NAMES", "get")]
    assert not [name for name in networks if name not in train]


@pytest.mark.parametrize("page", PROSE, ids=documents.name)
def test_lines_are_short_and_hold_whole_code_spans(page: Path) -> None:
    skipped = r"^```.*?^```$|^<!-- (benchmark|study):.*?^<!-- /\1 -->$"
    text = re.sub(skipped, "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    longest = 110 if page.name == "README.md" else 130
    assert not [line for line in text.splitlines() if len(line) > longest and not line.startswith("|")]
    assert not [line for line in text.splitlines() if line.count("`") % 2]


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("bop2nd pack x.pt -o y.safetensors", None),
        ("bop2nd pack x.pt --nothing", "--nothing"),
        ("bop2nd invent", "no command 'invent'"),
        ("make nothing", "target nothing"),
        ("make PYTHON=python3.12 install", None),
        ("pip install '.[nothing]'", "extra 'nothing'"),
        ("python -m benchmarks.run --quick", None),
        ("python -m benchmarks.run --nothing", "no option --nothing"),
        ("python -m benchmarks.nothing", "no module"),
        ("BOP2ND_BACKEND=scalar python -m pytest tests/test_nothing.py -q", "no file"),
        ("frobnicate --now", "no program 'frobnicate'"),
    ],
)  # fmt: skip
def test_the_check_of_commands_can_fail(command: str, wrong: str | None) -> None:
    (words,) = documents.split(command)
    found = documents.complaint(words)
    assert found is None if wrong is None else found is not None and wrong in found
