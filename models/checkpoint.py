"""What trainings save and resume, and the generator as a file that all else samples from."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.optim.swa_utils import AveragedModel

from models.artifacts import (
    ROOT,
    as_written,
    load_checkpoint,
    remove_leftovers,
    restored,
    save_checkpoint,
)
from models.command import InputError
from models.data import Codes, load_codes
from models.method import DROPOUTS, Method, ModelConfig
from models.methods import build
from models.sampling import Plan

KIND = "generator"
RENAMED = {"codes": "vocab_size", "cfg": "cfg_scale", "steps": "decode_steps"}
"""Fields of a ModelConfig or Plan in files from before they had the names of today, old -> new."""
ADDED = {
    "order_seed": 0,
    "compile": False,
    "init": None,
    "cca": {"weight": 0.0, "beta": 0.25},
    "context_noise": 0.0,
}
"""Fields that the config of such a training lacks, with the value that says what was done then."""


def renewed(saved: dict) -> dict:
    """Return the fields of a saved ModelConfig or Plan by the names of today."""
    return {RENAMED.get(name, name): value for name, value in saved.items()}


def save_generator(path: Path, head: dict, model: Method, **more: Any) -> None:
    """Write a generator's weights under `head` (with its `method`), and `more` for resuming."""
    save_checkpoint(path, head, model_config=asdict(model.config), model=model.state_dict(), **more)


def resume(
    path: Path, head: dict, free: Iterable[str], model: Method, ema: AveragedModel, optimizers: list
) -> tuple[int, list[dict]]:
    """Load a run into model, EMA and optimizers; return (step, log rows), (0, []) without a file.

    Raises InputError if it is of another config (but for the fields `free`), or was exported.
    """
    if not path.exists():
        return 0, []
    saved = load_checkpoint(path, KIND, rerun=f"rm {path}, then this command")
    old = saved["header"]
    lacking = {"labels": head["inputs"].get("labels")}  # runs of before did not say theirs
    old |= {"config": ADDED | old["config"], "inputs": lacking | old["inputs"]}
    same_run(old, head, free, path)
    if "optimizers" not in saved:
        raise InputError(f"{path} was exported and cannot be trained on; choose another --out")
    fix = "choose another --out, or delete the file to start over"
    with as_written(path, "training state", fix):
        model.load_state_dict(saved["weights"])
        ema.module.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema.n_averaged.fill_(saved["step"])
        return int(saved["step"]), list(saved["rows"])


def load_state(path: Path, head: dict, free: Iterable[str], parts: dict) -> tuple[int, list[dict]]:
    """Load what a cut run saved into its parts (model, ..); return (step, log rows).

    Raises InputError unless it is of the run that `head` describes, but for the fields `free`.
    """
    fix = f"rm {path}, then this command"
    saved = load_checkpoint(path, f"{head['kind']} training state", fix)
    same_run(saved["header"], head, free, path)
    with as_written(path, "training state", f"run: {fix}"):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        return int(saved["step"]), list(saved["rows"])


def save_state(path: Path, head: dict, step: int, rows: list[dict], parts: dict) -> None:
    """Write what `load_state` reads."""
    states = {name: part.state_dict() for name, part in parts.items()}
    head = head | {"kind": f"{head['kind']} training state"}
    save_checkpoint(path, head, step=step, rows=rows, **states)


def same_run(saved: dict, wanted: dict, free: Iterable[str], path: Path) -> None:
    """Raise InputError if two headers differ in inputs, or in config but for the fields `free`.

    Each on its own: an input may bear the name of a path that is free, or of a weight that is not.
    """
    differ = []
    for part, ignored in (("config", free), ("inputs", ())):
        for key in sorted((saved[part].keys() | wanted[part].keys()) - set(ignored)):
            old, new = saved[part].get(key), wanted[part].get(key)
            differ += [f"{key} {old} -> {new}"] if old != new else []
    if differ:
        pairs = ", ".join(differ)
        raise InputError(
            f"{path} was made with another config ({pairs}); "
            "choose another --out, or delete the file to start over"
        )


@dataclass(frozen=True)
class Generator:
    """A trained method as read from disk."""

    model: Method
    """fp32, in eval mode"""
    header: dict
    """with `method`, `config` (of its training), `inputs`, and the file's own `sha256`"""

    @property
    def order(self) -> str:
        """The order it was trained for: `random`, or the scan that it started from or ended in."""
        trained = self.header["config"].get("order")
        return "random" if trained == "random" else self.model.config.scan

    @property
    def sampling(self) -> dict:
        """Fields of a `sampling.Plan` that whoever exported the file recommends; may be empty."""
        plan = renewed(self.header.get("sampling", {}))
        # files of before hold every field, and 1.0 was the default of this one then, not a finding
        return {k: v for k, v in plan.items() if (k, v) != ("choice_temperature", 1.0)}


def load_generator(path: Path) -> Generator:
    """Read a generator. Raises InputError if it is missing, broken, or of an unknown method."""
    saved = load_checkpoint(path, KIND, rerun="uv run train_c2i.py")
    head = saved["header"]
    with as_written(path, KIND, "run: uv run train_c2i.py"):
        config = ModelConfig(**renewed(saved["model_config"]))
        model = restored(lambda: build(head["method"], config), saved["model"])
        classes = head.get("classes", [""] * config.classes)
        names = (head["config"].get("order", ""), head.get("dataset", ""), *classes)
        if len(classes) != config.classes or not all(isinstance(name, str) for name in names):
            raise ValueError(f"order, dataset and {config.classes} classes are no names")
        Plan(**renewed(head.get("sampling", {})))
    return Generator(model.requires_grad_(False).eval(), head)


def start_from(path: Path, model: Method, tokenizer: str) -> Method:
    """Give a new model the weights of a generator; return that one, frozen, on the same device.

    Raises InputError unless it is of the same class and config, but for dropout, and of codes of
    the tokenizer with this sha256.
    """
    first = load_generator(path)
    same = type(first.model) is type(model) and first.header["inputs"]["tokenizer"] == tokenizer
    configs = [{**asdict(one.config), **dict.fromkeys(DROPOUTS)} for one in (first.model, model)]
    if not same or configs[0] != configs[1]:
        raise InputError(
            f"expected --init of the --method, --model, --order and tokenizer asked for, got {path}"
        )
    model.load_state_dict(first.model.state_dict())
    return first.model.to(next(model.parameters()).device)


def load_codes_of(made_with: dict, folder: Path, split: str, whose: Path) -> Codes:
    """Read codes that must be as those of the generator `whose`, whose header is `made_with`.

    Raises InputError, with the command that makes the right ones, for codes of another tokenizer or
    of another --search, or as `load_codes`. Codes that differ only by rounding (of another machine)
    are read, and a line says so.
    """
    codes = load_codes(folder, split)
    head, inputs, search = codes.header, made_with["inputs"], made_with.get("search")
    same = head["inputs"].get("tokenizer") == inputs["tokenizer"]
    if not same or (search is not None and head["config"].get("search", 0) != search):
        flags = f" --search {search}" * bool(search) + " --out NEW"
        raise InputError(
            f"{folder} holds codes of another {'--search' if same else 'tokenizer'} than {whose} "
            f"was trained on; run: uv run tools/extract_latent_codes.py --tokenizer ITS{flags}, "
            "then give --codes NEW"
        )
    if split == "train" and inputs.get("codes") not in (None, head["sha256"]):
        print(
            f"{folder} differs from the codes that {whose} was trained on: other images, or the "
            "rounding of another machine"
        )
    return codes


def results_of(checkpoint: Path) -> Path:
    """Return the default folder of what measures a generator: results/<name of its run or file>."""
    # resolved: from inside of a run, last.pth is a path without a folder
    name = checkpoint.resolve().parent.name if checkpoint.stem == "last" else checkpoint.stem
    return ROOT / "results" / name


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
            if os.stat(file.name).st_ino != os.fstat(file.fileno()).st_ino:
                raise BlockingIOError  # unlinked by who held it: the next one locks another file
        except (BlockingIOError, FileNotFoundError):
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
