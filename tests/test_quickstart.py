"""The quickstart: every stage as a command, and one page that holds all it shows."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import script

from models.artifacts import ROOT
from models.command import INTERRUPTED, InputError

stage = script("tools/quickstart.py")
CELL = """
import os, pathlib, time
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""


def test_a_quickstart_ends_in_one_page_with_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "ORDERS", ("random",))  # one is half the time
    out = tmp_path / "out"
    path = stage.main(stage.QuickstartConfig(out=out, effort=0.001, images=200))
    page = path.read_text()
    assert "data:image/gif" in page and "Traceback" not in page
    metrics = json.loads((out / "randar_random/metrics.json").read_text())
    assert f"<td>{metrics['samples']['FD_shapes']:,.3f}</td>" in page
    assert "train_c2i.py" in page and "Resumed" not in page
    numbers = json.loads((out / "quickstart.json").read_text())
    assert numbers["orders"] == {"random": {"num_samples": 500} | metrics["samples"]}
    assert numbers["minutes"] > 0 and len(numbers["seconds"]) == 6 and not numbers["resumed"]


def test_ended_while_its_page_is_made_it_says_so_in_one_line(tmp_path):
    made = f"""
import signal
from pathlib import Path
from helpers import script
from models.command import one_line_errors
signal.signal(signal.SIGINT, signal.default_int_handler)
with one_line_errors():
    script("tools/quickstart.py").write_page({CELL!r}, "head", "foot", Path("index.html"))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    pipe, told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, tmp_path / "pid"
    line = [sys.executable, "-c", made]
    with subprocess.Popen(line, cwd=tmp_path, env=env, text=True, **pipe) as process:
        while not (told.exists() and told.read_text()) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[0]
    assert process.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1] == INTERRUPTED
    for _ in range(100):
        stat = Path(f"/proc/{told.read_text()}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":  # ended, perhaps not collected
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the notebook runs on")


def test_commands_are_shown_as_typed_in_the_root_of_the_repo():
    shown = stage.as_typed(stage.first_stages(stage.QuickstartConfig(out=stage.ROOT / "an out")))
    assert shown.startswith("uv run data/shapes.py \\\n  '--out=an out/data' \\\n  --count")
    assert "--tokenizer=an out/tokenizer.pth" in shlex.split(shown) and str(stage.ROOT) not in shown


def test_a_stage_that_fails_is_named(tmp_path, capfd):
    cfg = stage.QuickstartConfig(dataset="cifar10", source=tmp_path / "nowhere", out=tmp_path / "o")
    with pytest.raises(InputError, match="stage '1 data' failed"):
        stage.main(cfg)
    said = "\n" + capfd.readouterr().err
    assert "\nerror: " in said and "nowhere" in said and "Traceback" not in said
    with pytest.raises(InputError):
        stage.main(stage.QuickstartConfig(source=tmp_path, out=tmp_path / "o"))
