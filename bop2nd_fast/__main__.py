"""Entry of the ``bop2nd`` command and of ``python -m bop2nd_fast``."""

from __future__ import annotations

import sys

NEEDED = ("typer", "rich")  # the extra [cli]


def main() -> int:
    """Run the command line; returns the exit status. One line instead of a traceback where a package is
    missing, output cannot be written, or Ctrl-C was pressed outside of what a command handles itself."""
    try:
        return _run()
    except KeyboardInterrupt:
        print("bop2nd: interrupted", file=sys.stderr)
        return 130


def _run() -> int:
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDED:
            raise
        print(
            f"bop2nd: the command line needs the package '{package}'; install it with "
            f"pip install 'bop2nd-fast[cli]'",
            file=sys.stderr,
        )
        return 2
    try:
        app(prog_name="bop2nd")
    except OSError as error:
        if error.filename is not None:
            raise
        print(f"bop2nd: the output could not be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
