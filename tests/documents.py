"""The repository's texts, read as a person would follow them: their programs run, their commands exist.

What a fence says: ``python`` is executed, page by page in order, in one namespace and an empty folder;
``bash`` is checked command by command (program, subcommand, options, targets, files); other languages are
shown only, as is what stands under a comment ``<!-- shown only: why -->``. A comment ``<!-- setup`` holds
Python that a page takes for granted; readers do not see it.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)
SHOWN_ONLY = {"", "c", "cmake", "diff", "json", "text", "toml", "{include}", "{toctree}", "{eval-rst}"}
# Programs that are not ours: what follows them is not looked at.
FOREIGN = {
    *("c++", "cat", "cc", "cd", "cmake", "cp", "ctest", "curl", "docker", "export", "git", "ls", "mkdir"),
    *("perf", "pre-commit", "qemu-aarch64", "rm", "rsync", "scp", "source", "ssh", "tensorboard", "unzip"),
}
FOREIGN_MODULES = {"build", "pip", "pytest", "venv"}
BLOCK = re.compile(
    r"^(?P<fence>```+|:::+)(?P<language>\S*)[^\n]*\n(?P<body>.*?)^(?P=fence)$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is that of its first line in the page."""

    page: Path
    line: int
    language: str
    text: str
    hidden: bool = False


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@functools.cache
def blocks(page: Path) -> tuple[Block, ...]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        part = "body" if match["setup"] is None else "setup"
        line = text.count("\n", 0, match.start(part)) + 1
        language = "python" if part == "setup" else match["language"]
        above = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        if above.startswith("<!-- shown only: "):
            ast.parse(match[part])
            language = "text"
        found.append(Block(page, line, language, match[part], part == "setup"))
    return tuple(found)


def run_programs(page: Path, scope: dict[str, Any] | None = None) -> dict[str, Any]:
    """Execute the page's Python in order; tracebacks name the page and its lines. Returns the namespace."""
    scope = {"__name__": "__page__"} if scope is None else scope
    for block in blocks(page):
        if block.language == "python":
            execute(block, scope)
    return scope


def execute(block: Block, scope: dict[str, Any]) -> None:
    exec(compile("\n" * (block.line - 1) + block.text, name(block.page), "exec"), scope)


def programs(page: Path, heading: str) -> list[str]:
    """The programs that readers see under a heading."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines, 1) if re.fullmatch(rf"#+ {re.escape(heading)}", line))
    end = next((i for i, line in enumerate(lines[start:], start + 1) if line.startswith("## ")), len(lines))
    shown = [b for b in blocks(page) if b.language == "python" and not b.hidden]
    return [b.text for b in shown if start < b.line <= end]


# ------------------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Every command of the page's shell blocks: its line, its words."""
    for block in blocks(page):
        if block.language != "bash":
            continue
        joined = block.text.replace("\\\n", "\0")
        for i, line in enumerate(joined.split("\n")):
            number = block.line + i + joined[: joined.index(line)].count("\0")
            for words in split(line.replace("\0", " ")):
                yield number, words


def split(line: str) -> list[list[str]]:
    """A line of shell as commands, each a list of words; comments left out."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in reader:
        if set(word) <= set("&|;"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def complaint(words: list[str]) -> str | None:
    """What is wrong with a command, or None."""
    words = list(words)
    while words and re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
        words.pop(0)  # variables of the environment
    if not words or words[0] in FOREIGN:
        return None
    program, rest = Path(words[0]).name, words[1:]
    if program == "bop2nd":
        return _complaint_bop2nd(rest)
    if program == "bop2nd-run":
        text = (ROOT / "runtime/bop2nd_runtime/__main__.py").read_text()
        unknown = [word for word in rest if word.startswith("-") and f'"{word}"' not in text]
        return f"bop2nd-run has no option {unknown[0]}" if unknown else None
    if program == "make":
        return _complaint_make(rest)
    if program == "pip" or (re.fullmatch(r"python3?(\.\d+)?", program) and rest[:2] == ["-m", "pip"]):
        return _complaint_pip(rest)
    if program in ("compute-sanitizer", "nice", "time"):
        start = next((i for i, word in enumerate(rest) if word.startswith("python")), len(rest))
        return complaint(rest[start:])
    if program in ("pytest", "sphinx-build"):
        return _missing([word for word in rest if not word.startswith("-") and "/" in word])
    if re.fullmatch(r"python3?(\.\d+)?", program):
        return _complaint_python(rest)
    if program == "torchrun":
        script = next((word for word in rest if word.endswith(".py")), None)
        if script is not None:
            return _complaint_python(rest[rest.index(script) :])
        return _complaint_python(rest[rest.index("-m") :]) if "-m" in rest else "torchrun runs nothing"
    if "/" in words[0] and words[0].startswith(("build/", "./build/", "out/")):
        return None  # something that an earlier command builds
    if (ROOT / words[0]).is_file():
        return None
    return f"there is no program {words[0]!r}"


def _complaint_bop2nd(words: list[str]) -> str | None:
    import click
    import typer

    from bop2nd_fast.cli import app

    group: Any = typer.main.get_command(app)
    if not words or words[0].startswith("-") or words[0].isupper():
        return None
    if words[0] not in group.commands:
        return f"bop2nd has no command {words[0]!r}"
    command = group.commands[words[0]]
    if "--help" in words or command.ignore_unknown_options or command.allow_extra_args:
        return None
    try:
        command.make_context(words[0], list(words[1:]))
    except click.ClickException as error:
        return f"bop2nd {words[0]}: {error.format_message()}"
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("click", "typer"):
            raise
        return f"bop2nd {words[0]}: {error}"
    return None


def _complaint_make(words: list[str]) -> str | None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        variable, assigned, _ = word.partition("=")
        if assigned:
            if not re.search(rf"^{variable}\s*\??:?=|\$\({variable}\)", text, re.MULTILINE):
                return f"the Makefile has no variable {variable}"
        elif not word.startswith("-") and not re.search(rf"^{re.escape(word)}:", text, re.MULTILINE):
            return f"the Makefile has no target {word}"
    return None


def _complaint_pip(words: list[str]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.fullmatch(r"(?:\.|bop2nd[-_]fast)\[(.*)\]", word):
            for extra in match[1].split(","):
                if extra not in extras:
                    return f"there is no extra {extra!r}"
    return _missing([b for a, b in itertools.pairwise(words) if a in ("-r", "--requirement")])


def _complaint_python(words: list[str]) -> str | None:
    if not words or words[0] == "-c":
        return None
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module == "bop2nd_fast":
            return _complaint_bop2nd(rest)
        if module.split(".")[0] in FOREIGN_MODULES:
            return _missing([word for word in rest if word.endswith(".py")])
        base = ROOT / module.replace(".", "/")
        file = next((f for f in (base.with_suffix(".py"), base / "__main__.py") if f.is_file()), None)
        if file is None:
            return f"there is no module {module}"
    else:
        file, rest = ROOT / words[0], words[1:]
        if not file.is_file():
            return f"there is no file {words[0]}"
    source = "".join(path.read_text() for path in {file, *file.parent.glob(f"{file.stem}_*.py")})
    for word in rest:
        option = word.partition("=")[0]
        if option.startswith("--") and f'"{option}"' not in source:
            return f"{name(file)} has no option {option}"
    return None


def _missing(paths: list[str]) -> str | None:
    return next((f"there is no file {path}" for path in paths if not (ROOT / path).exists()), None)
