"""Stages as commands: they get their arguments, fail by name, and end with who started them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models import processes, training
from models.command import InputError
from models.processes import of_encoding, of_training, run_stages


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Write scripts of these lines; return them as stages."""
    monkeypatch.setattr(processes, "ROOT", tmp_path)

    def write(*scripts: str):
        for i, text in enumerate(scripts):
            (tmp_path / f"stage{i}.py").write_text(text)
        return [(f"stage {i}", [f"stage{i}.py", "--a=with space"]) for i in range(len(scripts))]

    return write


def test_stages_share_the_threads_and_the_last_shows_its_bars(stages, tmp_path, capfd):
    text = "import os, sys; print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], file=sys.stderr)"
    run_stages(stages(text, text), 7)
    said = capfd.readouterr()
    assert said.err == "['--a=with space'] 3\n"
    assert "== stage 0\nuv run stage0.py '--a=with space'" in said.out
    with open(tmp_path / "said", "w") as output:
        run_stages(stages("print('done')"), 1, output)
    assert (tmp_path / "said").read_text() == "done\n"


def test_a_stage_that_fails_is_named_and_ends_the_others(stages):
    both = stages("exit('error: no such codes')", "import time; time.sleep(60)")
    began = time.time()
    with pytest.raises(InputError, match="stage 'stage 0' failed: no such codes"):
        run_stages(both, 2)
    assert time.time() - began < 50


PARENT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
from models import processes
processes.ROOT = Path(sys.argv[1])
processes.run_stages([("child", ["child.py"])], 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kill -9 is survived elsewhere")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stage_ends_with_its_parent(tmp_path, how):
    pid = tmp_path / "pid"
    (tmp_path / "child.py").write_text(
        f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)],
                              stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.time() + 120
    while not (pid.exists() and pid.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    child = int(pid.read_text())
    parent.send_signal(how)
    parent.wait(60)
    while time.time() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":  # ended, not collected
            return
        time.sleep(0.1)
    pytest.fail("the child goes on")


def test_a_log_or_an_output_without_a_speed_is_refused(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "images_per_second": speed} for step, speed in ((1, 1000), (2, 7))]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert of_training(log) == {"images_per_second": 7}
    log.write_text(json.dumps(rows[0]))
    with pytest.raises(InputError, match="one row, the warm-up"):
        of_training(log)
    with pytest.raises(InputError, match="printed no speed"):
        of_encoding("train_codes.npy; 9.0 images/s")


def test_memory_is_of_this_process_and_on_a_gpu_of_its_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000)
    assert training.peak_memory(torch.device("cuda")) == {"peak_memory_gb": 2.5}
    assert 0.1 < training.peak_memory(torch.device("cpu"))["peak_memory_gb"] < 20
