"""The files that a host of repositories reads: they fit their schemas and agree with the project."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import bop2nd_fast

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
SCHEMAS = {
    "github-workflows": sorted((ROOT / ".github/workflows").glob("*.yml")),
    "github-issue-forms": FORMS,
    "github-issue-config": [ROOT / ".github/ISSUE_TEMPLATE/config.yml"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_fit_their_schema(schema):
    assert SCHEMAS[schema]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    checked = subprocess.run([*command, *map(str, SCHEMAS[schema])], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == bop2nd_fast.__version__


def test_hooks_before_a_commit_are_those_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [re.sub(r" --force-exclude", "", hook["entry"]).removeprefix(".venv/bin/") for hook in hooks]
    recipe = (
        (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0].replace("--quiet ", "")
    )
    assert entries and all(f"$(BIN)/{entry}" in recipe for entry in entries), recipe


def test_the_workflow_calls_what_the_makefile_has():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = set(re.findall(r"\bmake ([a-z-]+)", workflow))
    assert called and called <= targets
    assert ".ci/run" in workflow and (ROOT / ".ci/run").exists()
