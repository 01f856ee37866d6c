"""tools/reference.py: every run's commands, and the table of two of them from start to end."""

import json
from functools import partial

import pytest
import tyro
from helpers import script
from test_commands import config_of as kind_of

from models.artifacts import write_text
from models.command import InputError

tool = script("tools/reference.py")


@pytest.fixture
def config(cheap):
    """A budget of two steps; `changes` override it."""
    few = {"steps": 2, "batch": 4, "heldout": 10, "swept": 10, "num_samples": 20}
    return partial(cheap, tool.ReferenceConfig, cfg_scale=(1.0, 3.0), **few)


@pytest.fixture
def in_process(monkeypatch):
    """Run stages here, the configs as their command lines give them; return their names."""
    ran = []

    def run_stages(stages):
        for name, (path, *arguments) in stages:
            cfg = tyro.cli(kind_of(path), args=arguments)
            ran.append(name)
            script(path).main(cfg)

    monkeypatch.setattr(tool, "run_stages", run_stages)
    return ran


def test_two_runs_end_in_one_table_at_the_guidance_that_was_best(config, in_process, no_pictures):
    cfg = config(runs=("gpt_raster", "arpg_random"), together=2)
    table = tool.main(cfg)
    assert in_process[:3] == [
        "gpt_raster: training",
        "arpg_random: training",
        "gpt_raster: guidance",
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[:5]]
    guidance = rows[0].index("guidance")
    for name, row in zip(cfg.runs, rows[2:4], strict=True):
        sweep = tool.read_run(cfg.out / name).at("sweep.rows")
        best = min(sweep, key=lambda row: row["samples"]["FD_shapes"])["plan"]["cfg_scale"]
        assert row[0] == name.split("_")[0] and float(row[guidance]) == best
        assert tool.read_run(cfg.out / name).at("metrics.seeds") == [1]  # not those of the sweep
    assert tool.main(cfg) == table


def test_every_run_is_a_command_that_trains(config):
    for name, order in tool.RUNS.items():
        (_, (path, *arguments)), _ = tool.stages(config(), name)
        cfg = tyro.cli(kind_of(path), args=arguments)
        assert (cfg.method, cfg.order) == order and cfg.steps == 2


def test_a_tuned_run_trains_with_what_was_best(config, tmp_path):
    best = {"lr": 0.0123, "weight_decay": 1.5, "dropout": 0.25, "context_noise": 0.125}
    record = {"best": {"bits": 8.0, "pruned": False, "settings": best}}
    write_text(tmp_path / "tuning_gpt_raster/tuning.json", json.dumps(record))
    cfg = config(tuned=tmp_path)
    (_, (path, *arguments)), _ = tool.stages(cfg, "gpt_raster")
    trained = tyro.cli(kind_of(path), args=arguments)
    assert {name: getattr(trained, name) for name in best} == best
    with pytest.raises(InputError, match="found nothing; run: .* --method arpg --order random"):
        tool.stages(cfg, "arpg_random")
    write_text(tmp_path / "tuning_gpt_raster/tuning.json", "{}")
    with pytest.raises(InputError, match="no tuning that is whole"):
        tool.stages(cfg, "gpt_raster")
