#!/usr/bin/env -S uv run
"""Tune what a method is trained with: trials of equal operations, judged by held-out bits.

codes -> results/tuning_<method>_<order>/{study.db, tuning.json, tuning.png}

Every method gets as many trials of as many operations, so that none is tuned better than another;
the first trial is the defaults of this tool. The search is Optuna's TPE, and what is worse than the
median at the same share of the training is cut (its MedianPruner). Test images are not looked at. A
cut study goes on with its next trial. `tools/reference.py --tuned` trains with what was best.
"""

import contextlib
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from tqdm import tqdm

from metrics.likelihood import split_bits
from metrics.pictures import save_figure
from metrics.plots import plot_tuning
from metrics.report import Run, show, write_record
from models import command, machine, training
from models.artifacts import ROOT, header
from models.checkpoint import locked, same_run
from models.command import InputError
from models.data import load_codes, split_heldout
from models.method import SIZES
from models.methods import METHODS, build
from models.orders import OrderName
from models.training import OptimizerName
from train_c2i import TrainConfig, describe, model_config, train_step

if TYPE_CHECKING:
    import optuna

SPACE = {
    "lr": {"low": 3e-4, "high": 2e-2, "log": True},
    "weight_decay": {"low": 1e-2, "high": 3.0, "log": True},
    "dropout": {"low": 0.0, "high": 0.4},
    "context_noise": {"low": 0.0, "high": 0.4},
}
"""Flags of train_c2i.py and the range each is searched in. Label dropping is not: bits under the
label would be best without any, and guidance cannot do without."""
CHECKS = 8
"""times in a trial that it is judged"""
STARTUP = 4
"""trials that nothing is cut in"""


def searched(name: str) -> command.Range:
    """Return the range of a flag, which that of the first trial has to be in."""
    return command.Range(SPACE[name]["low"], SPACE[name]["high"])


@dataclass(frozen=True)
class TuneConfig(command.Config):
    """Tune what a method is trained with."""

    method: Literal[tuple(METHODS)] = "randar"
    order: OrderName | Path | None = None
    """as in train_c2i.py, but for adaptive"""
    model: Literal[tuple(SIZES)] = "nano"
    codes: Path = ROOT / "data/codes"
    """from stage 3"""
    out: command.OutFolder | None = None
    """default results/tuning_<method>_<order>"""
    trials: command.Count = 16
    tflop: Annotated[float, command.Range(1e-6, 1e9)] = 40.0
    """10^12 operations of a trial: 3,000 steps of 64 of a nano RandAR are 167"""
    batch: command.Batch = 64
    optimizer: OptimizerName = "muon"
    lr: Annotated[float, searched("lr")] = 3e-3
    """of the first trial, as the next three"""
    weight_decay: Annotated[float, searched("weight_decay")] = 0.05
    dropout: Annotated[float, searched("dropout")] = 0.0
    context_noise: Annotated[float, searched("context_noise")] = 0.0
    heldout: command.Count = 2000
    seed: command.Seed = 0
    """of the training, alike in every trial, and of the search"""
    device: command.DeviceName = "auto"

    def check(self) -> None:
        if self.order == "adaptive":
            raise InputError("expected --order of no calibration: adaptive cannot be tuned")


FREE = ("codes", "out", "trials", "device")
"""fields that may change between two halves of a study"""


class Trials:
    """Trainings of one method on one machine, that differ in the flags of SPACE."""

    def __init__(self, cfg: TuneConfig):
        shared = asdict(cfg).keys() & asdict(TrainConfig()).keys() - {"out"}
        order = cfg.order or METHODS[cfg.method].scans[0]
        self.cfg = TrainConfig(**{k: getattr(cfg, k) for k in shared} | {"order": order})
        self.fabric = machine.start_fabric(machine.pick_device(cfg.device))
        codes = load_codes(cfg.codes, "train").to(self.fabric.device)
        self.train, self.heldout = split_heldout(codes, cfg.heldout, cfg.seed)
        self.head = header("tuning", "tools/tune.py", cfg, describe(self.cfg, codes)["inputs"])
        model = build(cfg.method, model_config(self.cfg, codes)).to(self.fabric.device)
        step = cfg.batch * training.flops(model, cfg.batch)
        self.steps = max(CHECKS, round(cfg.tflop * 1e12 / step))

    def bits(self, trial: "optuna.Trial") -> float:
        """Train with what the trial suggests; return bits a held-out code, or raise TrialPruned."""
        import optuna

        settings = {name: trial.suggest_float(name, **space) for name, space in SPACE.items()}
        cfg = replace(self.cfg, steps=self.steps, **settings)
        torch.manual_seed(cfg.seed)
        model = build(cfg.method, model_config(cfg, self.train)).to(self.fabric.device)
        optimizers = training.make_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
        net, *optimizers = self.fabric.setup(model, *optimizers)
        ema = training.averaged(model, cfg.ema)
        bar = tqdm(range(cfg.steps), f"trial {trial.number + 1}", unit="step")
        for step in bar:
            train_step(cfg, self.fabric, net, model, None, optimizers, self.train, 0.0, step)
            ema.update_parameters(model)
            if (step + 1) * CHECKS % cfg.steps >= CHECKS:
                continue
            heldout = {"bits": self.heldout}
            bits = split_bits(ema.module, heldout, cfg.policy.sampled)["bits"]
            bar.set_postfix(bits=f"{bits:.3f}")
            if not math.isfinite(bits):
                raise optuna.TrialPruned
            trial.report(bits, step + 1)
            if trial.should_prune():
                raise optuna.TrialPruned
        return bits


def finished(study: "optuna.Study") -> list:
    """Return the trials that were trained to their end, or cut by the pruner."""
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]


@contextlib.contextmanager
def stored(path: Path) -> Iterator[None]:
    """Raise what SQLite cannot do as one line: OSError, or InputError for another kind of file."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as e:
        cause = e
        while cause is not None and not isinstance(cause, sqlite3.Error):
            cause = getattr(cause, "orig", None) or cause.__cause__
        if isinstance(cause, sqlite3.OperationalError):  # a full disk must not cost what is there
            raise OSError(f"cannot use {path}: {cause}; the trials in it are untouched") from None
        raise InputError(f"{path} is no study of this command ({e}); run: rm {path}") from None


def open_study(cfg: TuneConfig, path: Path, trials: Trials) -> "optuna.Study":
    """Return the study in a file, new or gone on with; a trial that was killed does not count.

    Raises InputError for a study of other codes, of another config, or no study.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(STARTUP, n_warmup_steps=trials.steps // 4)
    where = {"storage": f"sqlite:///{path}", "study_name": "tuning"}
    try:
        study = optuna.create_study(**where, pruner=pruner, load_if_exists=True)
        if "head" in study.user_attrs:
            same_run(study.user_attrs["head"], trials.head, FREE, path)
        study.set_user_attr("head", trials.head)
    except (KeyError, TypeError) as e:
        raise InputError(f"{path} is no study of this command ({e}); run: rm {path}") from None
    if all(trial.state.name in ("FAIL", "RUNNING") for trial in study.trials):  # it was killed
        study.enqueue_trial({name: getattr(cfg, name) for name in SPACE})
    return study


def main(cfg: TuneConfig) -> dict:
    """Run the trials that are missing; write, tell and return what tuning.json holds."""
    import optuna

    trials = Trials(cfg)
    name = f"tuning_{cfg.method}_{Path(trials.cfg.policy.name).stem}"
    out = cfg.out or ROOT / "results" / name
    with locked(out), stored(out / "study.db"):
        study = open_study(cfg, out / "study.db", trials)
        while (done := len(finished(study))) < cfg.trials:
            # a sampler of one seed would begin again with the same trials when a study goes on
            sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=cfg.seed + done)
            study.sampler = sampler
            study.optimize(trials.bits, n_trials=1)
        rows = [
            {"bits": t.value, "pruned": t.state.name == "PRUNED", "settings": t.params}
            for t in finished(study)
        ]
        whole = [row for row in rows if not row["pruned"]]
        if not whole:
            raise InputError(f"no trial in {out} had finite bits; choose another --out and --lr")
        numbers = {"method": cfg.method, "order": trials.cfg.policy.name, "steps": trials.steps}
        numbers |= {"trials": rows, "best": min(whole, key=lambda row: row["bits"])}
        record = write_record(out / "tuning.json", numbers, cfg, trials.head["inputs"])
        save_figure(plot_tuning([Run(name, {"tuning": record}, [])]), out / "tuning.png")
    best, first = record["best"], record["trials"][0]["bits"]
    flags = " ".join(f"--{key.replace('_', '-')} {x:.3g}" for key, x in best["settings"].items())
    print(f"{best['bits']:.4f} bits a held-out code, in the first trial {show(first, 4)}: {flags}")
    print(f"-> {out}")
    return record


if __name__ == "__main__":
    command.run(main, TuneConfig)
