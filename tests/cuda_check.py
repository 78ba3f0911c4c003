"""``csrc/cuda/check.py``, which is a program and in no package, as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def _check_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "csrc" / "cuda" / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check = _check_module()
