"""What several test files need."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from models.artifacts import ROOT


@cache
def script(path: str) -> ModuleType:
    """Return a script as a module, `script("data/load_CIFAR10.py")`; its folder is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # before it runs: dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
