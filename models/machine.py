"""This machine: its devices and precisions, what it can do in a second, and its processes."""

import contextlib
import copy
import ctypes
import functools
import itertools
import logging
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

import torch

from models.artifacts import ROOT
from models.command import INTERRUPTED, InputError, keep_freed_memory

Precision = Literal["auto", "fp32", "bf16"]
Stage = tuple[str, list[str]]
"""name, script and arguments"""


def pick_device(name: str) -> torch.device:
    """Return the device called auto (a GPU if there is one), cpu or cuda.

    Raises InputError for another name, or for cuda without a GPU.
    """
    gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not gpu):
        raise InputError(f"expected device auto, cpu or (with a GPU) cuda, got {name}")
    return torch.device("cuda" if name != "cpu" and gpu else "cpu")


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return {"peak_memory_gb"}, in 1e9 bytes: of tensors on a GPU, else of this process so far.

    {} on the CPU of a system that does not tell.
    """
    if device.type == "cuda":
        return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    status = Path("/proc/self/status")  # getrusage would count the starter's memory too
    peak = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return {"peak_memory_gb": int(peak[1]) * 1024 / 1e9} if peak else {}


def bf16_is_native(device: torch.device) -> bool:
    """Tell whether bf16 arithmetic is done by the hardware, and so is faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_precision(name: Precision, device: torch.device) -> Precision:
    """Return fp32 or bf16; for auto bf16 where that is native."""
    return name if name != "auto" else "bf16" if bf16_is_native(device) else "fp32"


def start_fabric(device: torch.device, devices: int = 1, precision: Precision = "auto"):
    """Return a Fabric, launched; its weights stay fp32, and on a GPU their products are TF32."""
    from lightning_fabric import Fabric  # takes longer to import than torch

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if device.type == "cuda":
        if devices > torch.cuda.device_count():
            raise InputError(f"expected --devices up to {torch.cuda.device_count()}, got {devices}")
        torch.set_float32_matmul_precision("high")
    mixed = {"bf16": "bf16-mixed", "fp32": "32-true"}[pick_precision(precision, device)]
    if int(os.environ.get("LOCAL_RANK", 0)):
        _end_with_parent()  # it would wait for a rank 0 that was killed
    fabric = Fabric(accelerator=device.type, devices=devices, precision=mixed)
    fabric.launch()
    return fabric


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor() -> str:
    """Return the name of the CPU, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def machine_name(device: torch.device) -> str:
    """Return what a time was measured on: the GPU, or the CPU and its threads."""
    if device.type == "cuda":
        return device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}"


def compiled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return the model compiled; as it is, with a line, where there is no compiler that works."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # of the compiler, the driver, the linker, ..
        print(f"not compiled, since nothing can be here: {str(error).splitlines()[0]}", flush=True)
        return model
    return torch.compile(model)


def flops_of(work: Callable[[int], object], batch: int) -> float:
    """Return the floating-point operations of matrix products and attentions for one image.

    `work` is done once, with `batch` images, at most 64: what they share, such as RAR's modulation
    of a label, an image alone would be charged for.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work(batch := min(batch, 64))
    return counter.get_total_flops() / batch


def matmul_peak(device: torch.device, precision: Precision = "auto") -> float:
    """Return the most operations a second of a matrix product, of five in each of two sizes."""
    dtypes, best = {"bf16": torch.bfloat16, "fp32": torch.float32}, 0.0
    dtype = dtypes[pick_precision(precision, device)]
    for width in (4096, 8192) if device.type == "cuda" else (512, 1024):
        a_DD = torch.randn(width, width, device=device, dtype=dtype)
        for _ in range(5):
            since = now(device)
            a_DD @ a_DD
            best = max(best, 2 * width**3 / (now(device) - since))
    return best


def now(device: torch.device) -> float:
    """Return the time in seconds, after all that a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rates(speed: float, flops: float, tokens: int, peak: float) -> dict[str, float]:
    """Return what a run of `speed` images a second does in one, and how much of what it could.

    flops and tokens are those of an image, `peak` is as `matmul_peak` says, of all devices.
    """
    return {
        "images_per_second": speed,
        "tokens_per_second": speed * tokens,
        "gflops_per_second": speed * flops / 1e9,
        "peak_share": speed * flops / peak,
    }


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
        # a copy: `to` moves the modules themselves, and who calls goes on with them on its GPU
        given = (copy.deepcopy(function).to(torch.device("cpu")), device.type, threads, ranks)
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
    keep_freed_memory()
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


def run_stages(stages: Sequence[Stage], quiet: bool = False) -> None:
    """Run stages side by side, each on its share of the threads; unless `quiet` the last has bars.

    The threads are torch's, which knows of a process that may use some of the cores only: more wait
    for each other. Whatever ends this process but SIGKILL ends the stages, on Linux that too.
    Raises InputError, naming the stage, if one fails; the others are ended.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))
    share = str(max(1, torch.get_num_threads() // len(stages)))
    env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": share}
    children: list[subprocess.Popen] = []
    with contextlib.ExitStack() as files:
        new = functools.partial(tempfile.TemporaryFile, "w+", errors="replace")
        hidden = [files.enter_context(new()) for _ in stages]
        try:
            for (name, (script, *arguments)), file in zip(stages, hidden, strict=True):
                print(f"\n== {name}\n{shlex.join(['uv', 'run', script, *arguments])}", flush=True)
                bars = file if quiet or name != stages[-1][0] else None
                line = [sys.executable, str(ROOT / script), *arguments]
                child = subprocess.Popen(line, env=env, stderr=bars, preexec_fn=_end_with_parent)
                children.append(child)
            while None in (states := [child.poll() for child in children]) and not any(states):
                time.sleep(0.1)
            for (name, _), state, file in zip(stages, states, hidden, strict=True):
                if state:
                    file.seek(0)
                    last = (file.read().strip().splitlines() or ["see above"])[-1]
                    raise InputError(f"stage {name!r} failed: {last.removeprefix('error: ')}")
        finally:
            for child in children:
                child.terminate()
                child.wait()
