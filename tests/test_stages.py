"""A stage as a command: what it said, its memory and no other's, and its last words."""

from pathlib import Path

import pytest

from metrics import stages
from metrics.stages import run_stage
from models.errors import InputError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script of these lines as a stage, on 3 threads."""
    monkeypatch.setattr(stages, "ROOT", tmp_path)

    def run_lines(*lines: str, arguments=(), **options):
        (tmp_path / "stage.py").write_text("\n".join(lines))
        return run_stage(("a stage", ["stage.py", *arguments]), 3, **options)

    return run_lines


def test_a_stage_is_given_its_arguments_and_threads_and_is_heard(run, capsys):
    ran = run(
        "import os, sys",
        "print('got', sys.argv[1:], os.environ['OMP_NUM_THREADS'])",
        "sys.stderr.write('a bar')",
        "print('done')",
        arguments=["--steps=2", "with space"],
    )
    assert ran.said == "got ['--steps=2', 'with space'] 3\ndone\n"
    shown = capsys.readouterr()
    assert shown.out.endswith("uv run stage.py --steps=2 'with space'\n" + ran.said)
    assert shown.err == "a bar"
    assert (ran.name, ran.line) == ("a stage", ["stage.py", "--steps=2", "with space"])
    assert ran.seconds > 0


def test_bars_can_be_left_out_and_long_output_is_read(run, capsys):
    lines = ("import sys", "for i in range(5000):", "  print('x' * 99)", "  sys.stderr.write('y')")
    ran = run(*lines, show=False)
    assert len(ran.said) == 500_000
    assert capsys.readouterr().err == ""


def test_memory_is_that_of_the_stage_not_of_its_starter(run):
    """A process of torch starts it; by fork or vfork Linux would count that as the stage's."""
    held = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
    assert int(held) > 150_000  # kB
    assert 0 < run("pass").peak_memory_gb < 0.1
    assert 0.3 < run("held = b'x' * 300_000_000").peak_memory_gb < 0.4


def test_a_stage_that_fails_says_its_last_line(run):
    with pytest.raises(InputError, match="stage 'a stage' failed: no such codes; its command was"):
        run("import sys", "sys.stderr.write('a bar\\n')", "sys.exit('error: no such codes')")
    with pytest.raises(InputError, match="'a stage' failed: no message"):
        run("import os; os.kill(os.getpid(), 9)")
