"""Stages as processes, run by other commands, and one stage's work shared among processes."""

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO

import torch

from models.artifacts import ROOT, remove_leftovers
from models.command import InputError

Stage = tuple[str, list[str]]
"""name, script and arguments"""
RECORDED = ("images_per_second", "peak_memory_gb", "network_calls", "parameters")


class Workers:
    """Calls of one function, made here, or dealt among processes that each have a copy of it."""

    def __init__(self, function: Callable, device: torch.device, processes: int):
        """Start the processes: on a CPU each has its share of the threads, else a GPU of its own.

        The function is one of models, with a method `to`, and answers on the CPU.
        """
        self.function, self.pool = function, None
        if processes == 1:
            return
        context = multiprocessing.get_context("spawn")  # a fork would share CUDA and its threads
        ranks = context.Queue()
        for rank in range(processes):
            ranks.put(rank)
        threads = max(1, torch.get_num_threads() // processes)
        given = (function.to(torch.device("cpu")), device.type, threads, ranks)
        self.pool = ProcessPoolExecutor(processes, context, _start_worker, given)

    def map(self, calls: Sequence[tuple]) -> Iterator:
        """Yield the results of the calls, in their order. Raises InputError if a process ends."""
        if self.pool is None:
            yield from itertools.starmap(self.function, calls)
            return
        try:
            yield from self.pool.map(_work, calls)
        except BrokenProcessPool:
            raise InputError("a process that --devices started was ended: out of memory?") from None


def _start_worker(function: Callable, device: str, threads: int, ranks) -> None:
    global _function
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started them
    torch.set_num_threads(threads)
    rank = ranks.get()
    _function = function.to(torch.device(device, rank) if device == "cuda" else device)


def _work(call: tuple):
    return _function(*call)


def _end_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, however that happens (kill -9 too)."""
    with contextlib.suppress(OSError, AttributeError):  # another system: see `run_stages`
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run_stages(stages: Sequence[Stage], threads: int, output: IO | None = None) -> None:
    """Run stages side by side, each on its share of the threads; the last one shows its bars.

    `output` is a file for what they print. Whatever ends this process but SIGKILL ends them, on
    Linux that too. Raises InputError, naming the stage, if one fails; the others are ended.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated: run the same command again"))
    share = str(max(1, threads // len(stages)))
    env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": share}
    children: list[subprocess.Popen] = []
    with tempfile.TemporaryFile("w+", errors="replace") as hidden:
        try:
            for name, (script, *arguments) in stages:
                print(f"\n== {name}\n{shlex.join(['uv', 'run', script, *arguments])}", flush=True)
                bars = None if name == stages[-1][0] else hidden
                line = [sys.executable, str(ROOT / script), *arguments]
                child = subprocess.Popen(
                    line, env=env, stdout=output, stderr=bars, preexec_fn=_end_with_parent
                )
                children.append(child)
            for (name, _), child in zip(stages, children, strict=True):
                if child.wait() != 0:
                    hidden.seek(0)
                    last = (hidden.read().strip().splitlines() or ["see above"])[-1]
                    raise InputError(f"stage {name!r} failed: {last.removeprefix('error: ')}")
        finally:
            for child in children:
                child.terminate()
                child.wait()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a run's folder; the system ends a dead one's lock.

    Raises InputError naming the process that holds it. Without `fcntl` (Windows) nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{folder} is being written by process {file.read(20).strip() or 'unknown'}; "
                "wait for it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        remove_leftovers(folder)
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing came of it


def recorded(record: dict) -> dict:
    """Return what a stage recorded of its speed and size."""
    return {key: record[key] for key in RECORDED if key in record}


def of_training(log: Path) -> dict:
    """Return the median images_per_second of a log's rows but the first, the warm-up; and memory.

    Raises InputError if there is no other row.
    """
    _, *rows = [json.loads(line) for line in log.read_text().splitlines()]
    if not rows:
        raise InputError(f"{log} has one row, the warm-up: expected more steps")
    speed = statistics.median(row["images_per_second"] for row in rows)
    return recorded(rows[-1]) | {"images_per_second": speed}


def of_sampling(folder: Path) -> dict:
    """Return what stage 5 recorded in metrics.json."""
    return recorded(json.loads((folder / "metrics.json").read_text()))


def of_encoding(said: str) -> dict:
    """Return images_per_second of the test split from what stage 3 printed."""
    speed = re.search(r"test_codes\.npy .*; ([\d.]+) images/s", said)
    if speed is None:
        raise InputError("stage 3 printed no speed of the test split")
    return {"images_per_second": float(speed[1])}


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor() -> str:
    """Return the name of the CPU, as far as the system tells."""
    about = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", about.read_text()) if about.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
