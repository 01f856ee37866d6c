"""Run a stage as the command that it is; say what it printed, its seconds and its memory."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from models.artifacts import ROOT
from models.errors import InputError

Stage = tuple[str, list[str]]
"""name, command"""

LAUNCH = """
import contextlib, signal, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage answers it
code = child.wait()
with contextlib.suppress(ImportError):  # Windows
    import resource
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    open(sys.argv[1], "w").write(str(most * (1 if sys.platform == "darwin" else 1024)))
sys.exit(code)
"""
"""Starts a stage from a small process. Linux counts the starter's memory at the start as the
child's own, and whoever has torch imported is a large starter."""


@dataclass(frozen=True)
class Ran:
    """A stage that came to its end."""

    name: str
    line: list[str]
    """script and arguments"""
    seconds: float
    """of the whole command, the start of Python and its imports too"""
    peak_memory_gb: float | None
    """its largest resident set, in 1e9 bytes; None where the system does not tell"""
    said: str
    """what it printed to stdout"""


def run_stage(stage: Stage, threads: int, show: bool = True) -> Ran:
    """Run a stage, its prints passed on, and its progress bars if `show`.

    Raises InputError, with the stage's own last line, if it fails.
    """
    name, line = stage
    shown = shlex.join(["uv", "run", *line])
    print(f"\n== {name}\n{shown}", flush=True)
    began, errors = time.time(), ""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as reader:
        memory = Path(folder) / "memory"
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", LAUNCH, str(memory)]
            + [sys.executable, str(ROOT / line[0]), *line[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)},
            text=True,
            errors="replace",
        )
        said = reader.submit(_pass_on, child.stdout)
        while part := child.stderr.read(1):  # progress bars go to stderr without line ends
            if show:
                sys.stderr.write(part)
            errors = (errors + part)[-2000:]
        if child.wait() != 0:
            last = (errors.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
            raise InputError(f"stage {name!r} failed: {last}; its command was: {shown}")
        seconds = time.time() - began
        peak = int(memory.read_text()) / 1e9 if memory.exists() else None
    return Ran(name, line, seconds, peak, said.result())


def _pass_on(lines: Iterable[str]) -> str:
    """Print lines as they come; return them all."""
    kept = []
    for line in lines:
        print(line, end="", flush=True)
        kept.append(line)
    return "".join(kept)
