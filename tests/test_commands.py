"""Every command: the range of each number, outputs that are no inputs, and errors in one line."""

import math
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import changed, other_codes, script

from metrics.evaluation import MeasureConfig
from models import command
from models.artifacts import ROOT
from models.command import Config, InputError, Output, Range, fields_of, marks_of

SCRIPTS = [
    path
    for pattern in ("data/*.py", "tokenizer_vq/*.py", "tools/*.py", "*_c2i.py")
    for path in sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))
]
assert len(SCRIPTS) > 15
GIVEN = {"checkpoint": Path("last.pth"), "source": Path("model.pt")}
"""fields without a default"""


def config_of(path: str) -> type[Config]:
    module = script(path)
    (found,) = {
        kind
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Config)
        and kind.__module__ == module.__name__
    }
    return found


def needed(kind: type[Config]) -> dict:
    values = {f.name: GIVEN[f.name] for f in fields(kind) if f.default is f.default_factory}
    return values | ({"checkpoint": GIVEN["checkpoint"]} if "samples" in vars(kind) else {})


def marked(kind: type, mark: type) -> list[tuple[str, object, bool]]:
    """Return (field, mark, is it a tuple) of the fields whose type has such a mark."""
    hints = command.typing.get_type_hints(kind, include_extras=True)
    found = []
    for name, hint in hints.items():
        several = command.typing.get_origin(hint) is tuple
        found += [(name, m, several) for m in marks_of(hint) if isinstance(m, mark)]
    return found


@pytest.mark.parametrize("path", SCRIPTS)
def test_every_number_has_a_range_and_what_is_outside_is_refused(path):
    kind = config_of(path)
    ranged = {name for name, _, _ in marked(kind, Range)}
    for name, hint in command.typing.get_type_hints(kind).items():
        parts = {hint, *command.typing.get_args(hint)}
        assert not parts & {int, float} or name in ranged, f"{path}: {name} has no range"
    for name, allowed, several in marked(kind, Range):
        above = allowed.most if allowed.below else allowed.most + 1
        for value in (allowed.least - 1, above, math.nan, math.inf, -math.inf):
            if allowed.or_zero and value == 0:
                continue
            with pytest.raises(InputError, match=f"expected --{name.replace('_', '-')} .*got"):
                kind(**needed(kind) | {name: (value,) if several else value})


@pytest.mark.parametrize("path", SCRIPTS)
def test_an_output_is_no_input_and_of_its_kind(path, tmp_path):
    kind = config_of(path)
    outputs = {name for name, _, _ in marked(kind, Output)}
    for name, output, _ in marked(kind, Output):
        flag = f"--{name.replace('_', '-')}"
        values = needed(kind)
        file = tmp_path / "there.png"
        file.touch()
        with pytest.raises(InputError, match=f"expected {flag} to be a .*there.png"):
            kind(**values | {name: file})
        own = fields_of(kind(**values))
        names = {f.name for f in fields(kind)}
        paths = {n for n, v, _ in own if isinstance(v, Path) and n in names}
        for read in paths - outputs:
            both = (tmp_path / "new") if not output.suffix else tmp_path / "new.pth"
            with pytest.raises(InputError, match=f"{flag} .* would overwrite --"):
                kind(**values | {name: both, read: tmp_path / "x" / ".." / both.name})


MEASURES = ("calibrate", "features", "measure_inpainting", "measure_tokenizer", "robustness")
MEASURES += ("sweep_cfg",)
READS = {"checkpoint", "tokenizer", "extractor", "codes", "data", "cifar10_c"}


@pytest.mark.parametrize("name", MEASURES)
def test_a_measurement_of_files_that_are_missing_or_of_others_does_not_begin(
    name, cheap, world, tmp_path, monkeypatch
):
    kind, tool = config_of(f"tools/{name}.py"), script(f"tools/{name}.py")
    flags = {f.name for f in fields(kind)}
    flags |= {f.name for f in fields(MeasureConfig)} if "against" in flags else set()
    cfg = cheap(kind, "randar" if "checkpoint" in flags else None)
    refusals = [(flag, tmp_path / "nowhere", "nowhere") for flag in sorted(READS & flags)]
    another, others = (
        other_codes(world, tmp_path / name, **{name: "0" * 64}) for name in ("tokenizer", "images")
    )
    refusals += [("codes", another, "codes of another tokenizer")] if "codes" in flags else []
    if hasattr(tool, "codes_of_images"):
        refusals.append(("codes", others, "codes of other test images"))
    measured = lambda *_, **__: pytest.fail("it measured")  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "__call__", measured)
    for flag, value, message in refusals:
        with pytest.raises(InputError, match=message):
            tool.main(changed(cfg, **{flag: value}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train_c2i.py --steps 0", r"expected --steps in \[1, 1e\+09\], got 0"),
        ("train_c2i.py --steps many", "Error parsing --steps: invalid literal.*'many'"),
        ("train_c2i.py --anneal.start nan", r"expected --anneal.start in \[0, 1\), got nan"),
        ("train_c2i.py --model huge", "invalid choice 'huge' for argument '--model'.*'nano'"),
        ("eval_c2i.py --chekpoint x", "Unrecognized options: --chekpoint"),
        ("tools/export_checkpoint.py", "--checkpoint"),
        ("data/load_CIFAR10.py --source nowhere", "--source nowhere: expected cifar-10-python"),
    ],
)
def test_a_mistake_is_one_line(line, message, monkeypatch, capsys):
    path, *flags = line.split()
    monkeypatch.setattr(sys, "argv", [path, *flags])
    with pytest.raises(SystemExit) as stopped:
        command.run(script(path).main, config_of(path))
    assert re.fullmatch(rf"error: .*{message}.*", stopped.value.code), stopped.value.code
    said = capsys.readouterr()
    assert not said.out and not said.err  # Python itself prints the code, and exits with 1


def test_the_script_of_a_copied_folder_is_not_run_with_the_code_of_the_first(tmp_path):
    (tmp_path / "train_c2i.py").write_text("def main(cfg): raise AssertionError('it ran')")
    main = runpy.run_path(str(tmp_path / "train_c2i.py"))["main"]
    with pytest.raises(SystemExit) as stopped:
        command.run(main, config_of("train_c2i.py"))
    said = f"error: {tmp_path}/train_c2i.py would run the code of {ROOT}; run: uv sync"
    assert stopped.value.code == said


def test_python_of_a_moved_or_copied_folder_runs_the_code_beside_it(tmp_path):
    venv.create(tmp_path / ".venv", symlinks=True)
    packages = next(tmp_path.glob(".venv/lib/python*/site-packages"))
    installed = Path(sysconfig.get_path("purelib")) / "own_folder.pth"
    shutil.copy(installed, packages)
    (packages / "any_order_cifar.pth").write_text(f"{ROOT}\n")  # where it was, or the first copy
    (tmp_path / "models").mkdir()
    for name in ("__init__.py", "command.py"):
        (tmp_path / "models" / name).touch()
    line = [tmp_path / ".venv/bin/python", "-c", "import models; print(models.__file__)"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT / "tools")
    assert done.stdout == f"{tmp_path}/models/__init__.py\n", done.stderr


def test_the_line_of_an_error_is_not_glued_to_a_progress_bar(capsys):
    from tqdm import tqdm

    with pytest.raises(SystemExit, match="^error: no$"), command.one_line_errors():
        bars = [tqdm(total=2, mininterval=0, leave=i == 0) for i in range(4)]
        for bar in bars:
            bar.update()
        raise InputError("no")
    assert capsys.readouterr().err.endswith("\n")


def test_an_interrupt_in_the_start_of_a_compiled_module_is_one():
    """Such a module turns it into an ImportError of its own; any other one is our bug."""

    def start(cause: type[BaseException]):
        with command.one_line_errors():
            try:
                raise cause
            except BaseException:
                raise ImportError("initialization failed")  # noqa: B904

    with pytest.raises(SystemExit, match="^interrupted: run the same command again"):
        start(KeyboardInterrupt)
    with pytest.raises(ImportError):
        start(ValueError)
