"""Stages as processes, which fail by name and end with who started them; and what speed is."""

import os
import signal
import subprocess
import sys
import time
from ast import literal_eval
from pathlib import Path

import pytest
import torch

from models import machine
from models.command import InputError
from models.machine import flops_of, matmul_peak, run_stages
from models.method import ModelConfig
from models.methods import build
from models.training import flops


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Write scripts of these lines; return them as stages."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)

    def write(*scripts: str):
        for i, text in enumerate(scripts):
            (tmp_path / f"stage{i}.py").write_text(text)
        return [(f"stage {i}", [f"stage{i}.py", "--a=with space"]) for i in range(len(scripts))]

    return write


def test_stages_share_the_threads_and_the_last_shows_its_bars(stages, capfd, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    text = "import os, sys; print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], file=sys.stderr)"
    run_stages(stages(text, text))
    said = capfd.readouterr()
    assert said.err == "['--a=with space'] 3\n"
    assert "== stage 0\nuv run stage0.py '--a=with space'" in said.out
    run_stages(stages("print('done')"))
    assert capfd.readouterr().out.endswith("\ndone\n")


@pytest.mark.parametrize("first", [True, False])
def test_a_stage_that_fails_is_named_and_ends_the_others(stages, first):
    fails, runs = "exit('error: no such codes')", "import time; time.sleep(60)"
    both = stages(*((fails, runs) if first else (runs, fails)))
    began = time.time()
    with pytest.raises(InputError, match=f"stage 'stage {1 - first}' failed: no such codes"):
        run_stages(both, quiet=True)
    assert time.time() - began < 50


PARENT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
from models import machine
machine.ROOT = Path(sys.argv[1])
machine.run_stages([("child", ["child.py"])])
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


def test_memory_is_of_this_process_and_not_of_the_one_that_started_it():
    text = "from models.machine import *; print(peak_memory(torch.device('cpu')))"
    large = torch.ones(2**27)
    child = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    whole = machine.peak_memory(torch.device("cpu"))["peak_memory_gb"]
    assert 0.1 < literal_eval(child.stdout)["peak_memory_gb"] < whole - large.nbytes / 2e9


def test_operations_are_those_of_the_products_and_of_both_directions():
    layer, x = torch.nn.Linear(30, 20, bias=False), torch.zeros(99, 30, requires_grad=True)
    for batch in (7, 99):
        assert flops_of(lambda n: layer(x[:n]), batch) == 2 * 30 * 20
        assert flops_of(lambda n: layer(x[:n]).sum().backward(), batch) == 3 * 2 * 30 * 20
    assert 1e8 < matmul_peak(torch.device("cpu"), "fp32") < 1e14


def test_what_a_batch_shares_is_counted_once():
    alone, among = (flops(build("rar", ModelConfig(width=64, layers=2)), n) for n in (1, 32))
    modulation = 3 * 2 * 65 * 64 * (2 * 6 * 64) + 3 * 2 * 64 * 64 * 2 * 64
    assert alone - among == pytest.approx(modulation * (1 - 11 / 32))
