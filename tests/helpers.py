"""What several test files need."""

import importlib.util
import sys
from dataclasses import fields, replace
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


def config_of(kind: type, **values):
    """Return a command's config, the flags of MeasureConfig in their nested place."""
    from metrics.evaluation import MeasureConfig

    nested = {f.name: values.pop(f.name) for f in fields(MeasureConfig) if f.name in values}
    return kind(**values, against=MeasureConfig(**nested))


def changed(config, **values):
    """Return a config with some of its values, or of its MeasureConfig's, replaced."""
    own = {f.name for f in fields(config)}
    nested = {name: values.pop(name) for name in list(values) if name not in own}
    return replace(config, against=replace(config.against, **nested), **values)
