"""kill -9, Ctrl-C or SIGTERM at any moment of a stage: the same command makes it whole.

`--kills N` ends each command N times in each way; commands run in forks of a process that has
everything imported, so that they are ended at work and not at imports.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SPEEDS, save_tiny
from tiny_cifar import write_image_folder
from tiny_extractor import write_extractor

from models.artifacts import ROOT, save_checkpoint, sha256_of, write_text

TIMES = {"peak_memory_gb", "seconds", "git_commit", "command", "out", "device", *SPEEDS}
TIMES |= {"minutes", "resumed"}  # of a quickstart
"""what two equal runs may differ in, besides sha256s of files in which they do"""
PAGE_TIMES = re.compile(r"cell-id=\w+|in [\d.]+ minutes\.( Resumed at [^<]*)?")
LOG = Path(tempfile.gettempdir()) / f"stage-{os.getpid()}.log"
QUICK = ("2 tokenizer", "4 adamw")
"""commands that are killed with --kills 1"""
DRAWN_TIMES = ("curves.png", "sweep.png")


WARM = f"""
import json, os, signal, sys
import conftest  # --model tiny
from helpers import script
from test_commands import config_of
from models import command
import lightning_fabric, matplotlib.pyplot, torch, torch_fidelity, vector_quantize_pytorch
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
ends = signal.SIGINT, signal.SIGTERM
signal.pthread_sigmask(signal.SIG_BLOCK, ends)
def at_work(cfg):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
    main(cfg)
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
for line in sys.stdin:
    path, arguments = json.loads(line)
    if not (child := os.fork()):
        log = os.open({str(LOG)!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.argv = [path, *arguments]
        status, main, config = 1, script(path).main, config_of(path)
        print(os.getpid(), flush=True)
        os.dup2(log, 1), os.dup2(log, 2)
        try:
            command.run(at_work, config)
            status = 0
        except SystemExit as e:
            print(e, file=sys.stderr)
            os._exit(1)
        finally:
            sys.excepthook(*sys.exc_info()) if status else None
            os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""imports once, forks for each command; not pytest's own process, since torch's gradients end
where a process that has taken some forks"""


@pytest.fixture(scope="module")
def server():
    """Run a command in a process of its own, ended after `delay` seconds; return its status."""
    line = [sys.executable, "-c", WARM]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    process = subprocess.Popen(line, cwd=ROOT, env=env, text=True, **pipes)

    def run(path: str, arguments: list[str], how=signal.SIGKILL, delay: float | None = None) -> int:
        print(json.dumps([path, arguments]), file=process.stdin, flush=True)
        child = int(process.stdout.readline())
        if not select.select([process.stdout], [], [], delay)[0]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(child, how)
        return int(process.stdout.readline())

    yield run
    process.communicate()
    LOG.unlink()


def plain(value, names: dict[str, str]):
    """Return JSON or the contents of a checkpoint without times, names for sha256s of files."""
    if isinstance(value, dict):
        return {key: plain(item, names) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [plain(item, names) for item in value]
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    return names.get(value, value) if isinstance(value, str) else value


def contents(folder: Path) -> dict[str, object]:
    """Return everything in a folder, in a form that two equal runs share."""
    found, names = {}, {sha256_of(path): path.name for path in folder.rglob("*.pth")}
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".pth":
            found[name] = plain(torch.load(path, weights_only=True), names)
        elif path.suffix == ".json":
            found[name] = plain(json.loads(path.read_text()), names)
        elif path.suffix == ".jsonl":
            found[name] = [plain(json.loads(row), names) for row in path.read_text().splitlines()]
        elif path.suffix == ".html":
            found[name] = PAGE_TIMES.sub("", path.read_text())
        else:
            found[name] = None if path.name.endswith(DRAWN_TIMES) else path.read_bytes()
    return found


@pytest.fixture(scope="module")
def commands(world, tmp_path_factory) -> dict[str, tuple[str, list[str], str]]:
    """Return every stage at a size of about a second: script, flags, and the file in --out."""
    folder = tmp_path_factory.mktemp("inputs")
    images, ruler = write_image_folder(folder / "images"), folder / "extractor.pth"
    write_extractor(ruler, dataset="shapes")
    train = [f"--codes={world.codes}", f"--tokenizer={world.tokenizer}", "--model=tiny"]
    train += ["--batch=8", "--steps=8", "--eval-every=4", "--heldout=20", "--device=cpu"]
    checkpoint = save_tiny(folder / "last.pth", world, order="random")
    sample = [f"--checkpoint={checkpoint}", f"--tokenizer={world.tokenizer}", "--batch=20"]
    sample += [f"--data={world.data}", f"--extractor={ruler}", "--inception-weights=none"]
    sample += ["--decode-steps=4", "--num-samples=20", "--device=cpu"]
    tokenizer = [f"--data={world.data}", "--init=None", "--perceptual=0", "--steps=12"]
    tokenizer += ["--batch=16", "--model.width=8", "--model.codebook-size=32", "--model.blocks=1"]
    tokenizer += ["--warmup=2", "--save-every=3", "--log-every=3"]
    quick = ["--method=gpt", "--effort=0.001", "--images=200"]
    muon = ["--method=rar", "--order=anneal", "--optimizer=muon"]
    shapes = [f"--tokenizer={world.tokenizer}", f"--data={world.data}"]
    ruler = [f"--data={world.data}", "--width=4", "--epochs=2", "--batch=20"]
    return {
        "1 load": ("data/load_CIFAR10.py", [f"--source={images}"], ""),
        "2 tokenizer": ("tokenizer_vq/train_vqvae.py", tokenizer, "/t.pth"),
        "3 codes": ("tools/extract_latent_codes.py", shapes, ""),
        "4 adamw": ("train_c2i.py", [*train, "--order=random"], ""),
        "4 muon": ("train_c2i.py", [*train, *muon], ""),
        "5 evaluate": ("eval_c2i.py", [*sample, f"--codes={world.codes}", "--seeds=2"], ""),
        "sweep": ("tools/sweep_cfg.py", [*sample, "--cfg-scale", "1", "3", "--final=0"], ""),
        "extractor": ("tools/train_extractor.py", ruler, "/e.pth"),
        "quickstart": ("tools/quickstart.py", quick, ""),
    }


def test_runs_may_differ_in_times_and_in_nothing_else(tmp_path):
    def written(speed: float, minutes: str, fd=1.0, bits=2.0, checkpoint=None, page="") -> dict:
        rows = [{"bits": bits, "images_per_second": speed}]
        save_checkpoint(tmp_path / "last.pth", {"git_commit": minutes}, rows=rows)
        inputs = {"checkpoint": checkpoint or sha256_of(tmp_path / "last.pth"), "codes": "c"}
        record = {"images_per_second": speed, "minutes": minutes, "inputs": inputs, "FD": fd}
        write_text(tmp_path / "metrics.json", json.dumps(record))
        said = f'<div id="cell-id={speed:.0f}a"><p>learned, in {minutes}</p>{page}'
        write_text(tmp_path / "index.html", said)
        return contents(tmp_path)

    first = written(1, "1.0 minutes.")
    assert first == written(2, "2.0 minutes. Resumed at 2026-01-01 01:01: a part is older.")
    for name, change in {"FD": {"fd": 1.5}, "bits": {"bits": 2.5}, "page": {"page": "<p>"}}.items():
        assert first != written(1, "1.0 minutes.", **change), name
    assert first != written(1, "1.0 minutes.", checkpoint="of another file")


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name
)
def test_ended_at_any_moment_the_same_command_finishes(
    server, commands, tmp_path, pytestconfig, how
):
    kills, wrong = pytestconfig.getoption("--kills"), []
    rng = np.random.default_rng(pytestconfig.getoption("--first-case"))
    some = commands if kills > 1 else {name: commands[name] for name in QUICK}
    for name, (path, flags, file) in some.items():
        arguments = [*flags, f"--out={tmp_path}/{name}/out{file}"]
        began = time.perf_counter()
        assert server(path, arguments) == 0, f"{name}: {LOG.read_text()[-2000:]}"
        seconds = time.perf_counter() - began
        whole = contents(tmp_path / name)
        shutil.rmtree(tmp_path / name)
        for number in range(kills):
            statuses = []
            for _ in range(2):
                began = time.perf_counter()
                statuses.append(server(path, arguments, how, rng.uniform(0, seconds)))
                if not statuses[-1]:  # quicker than the first, which had a machine to share
                    seconds = min(seconds, time.perf_counter() - began)
                said = LOG.read_text(errors="replace")
                one_line = "\ninterrupted: " in f"\n{said}" and "Traceback" not in said
                if statuses[-1] and how != signal.SIGKILL and not one_line:
                    wrong.append(f"{name}, end {number}: {statuses}, {said[-2000:]}")
            statuses.append(server(path, arguments))
            now = contents(tmp_path / name)
            differ = [f for f in whole.keys() | now.keys() if whole.get(f, 0) != now.get(f, 0)]
            if statuses[-1] or differ:
                wrong.append(f"{name}, end {number}: {statuses}, other or more: {differ}")
            print(f"{how.name} {name}: {statuses} of {seconds:.1f} s")
            shutil.rmtree(tmp_path / name)
    assert not wrong, "\n".join(wrong)
