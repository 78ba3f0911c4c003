"""A process that answers requests in JSON lines: an interpreter or a tree of its own, timed inside itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Worker:
    """Starts ``command`` and waits for its first line.

    Raises:
        OSError: it cannot be started.
        RuntimeError: it ended, or answered with an error, which is the text.
    """

    def __init__(self, command: Sequence[str], **more: Any) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process: Any = subprocess.Popen(command, **pipes, **more)
        self._command = command
        self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return its answer; raises RuntimeError as above."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line or "{}")
        if not line or "error" in answer:
            script = Path(self._command[-1]).name
            raise RuntimeError(answer.get("error", f"{script} ended before it answered"))
        return answer

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the process, if it has not ended."""
        self._process.stdin.close()
        self._process.wait()
