"""A claim holds, or does not, by the interval of a difference; one without runs says so."""

import math
from functools import partial

import pytest
import torch

from metrics.claims import (
    CLAIMS,
    MARGIN,
    SEEDS,
    Claim,
    claims,
    frechet,
    minus,
    of_images,
    overfitting,
    reached,
    records,
)
from metrics.report import Run, own_bits, read_reports
from models.command import InputError


def test_the_interval_of_a_difference_is_that_of_two_means():
    generator = torch.Generator().manual_seed(0)
    draws_2MS = torch.randn(2, 4000, 10, generator=generator, dtype=torch.float64)
    spread_2M = draws_2MS.std(2)
    inside = 0
    for mean_2, sd_2 in zip(draws_2MS.mean(2).T.tolist(), spread_2M.T.tolist(), strict=True):
        a, b = ({"mean": m, "sd": sd, "seeds": 10} for m, sd in zip(mean_2, sd_2, strict=True))
        apart = minus(a, b)
        assert apart["low"] < apart["value"] == a["mean"] - b["mean"] < apart["high"]
        inside += apart["low"] <= 0 <= apart["high"]
    assert 0.94 < inside / 4000 < 0.98  # the true difference is 0


def test_a_difference_takes_each_sides_own_half():
    apart = minus({"value": 5, "low": 2, "high": 6}, {"value": 1, "low": 0, "high": 5})
    assert apart == {"value": 4, "low": 4 - math.hypot(3, 4), "high": 4 + math.hypot(1, 1)}
    se = minus({"mean": 5, "se": 1}, {"value": 1, "low": 1, "high": 1})
    assert se["high"] - 4 == pytest.approx(1.96)


def run_with(mean: float, sd: float = 0.001) -> Run:
    over = {"FD_c10": {"mean": mean, "sd": sd}}
    return Run("one", {"metrics": {"over_seeds": over, "seeds": [1, 2, 3]}}, [])


@pytest.mark.parametrize(
    ("wanted", "new", "verdict"),
    [
        ("kept", run_with(1.02), "yes"),
        ("kept", run_with(0.5), "yes"),
        ("kept", run_with(1.1), "no"),
        ("kept", run_with(1.02, 0.1), "not decided"),
        ("less", run_with(0.9), "yes"),
        ("less", run_with(1.1), "no, the opposite"),
        ("less", run_with(0.9, 1.0), "no difference found"),
        ("more", run_with(1.1), "yes"),
        ("more", run_with(1.1, 1.0), "no difference found"),
        ("more", None, "not run here"),
    ],
)
def test_a_verdict_is_what_the_interval_says(wanted, new, verdict):
    claim = Claim("", "", ("new", "old"), "", frechet, wanted)
    kept = {"old": run_with(1.0)} | ({"new": new} if new else {})
    assert claim.verdict(claim.difference(kept)) == verdict


def test_a_kept_quality_is_a_share_of_what_it_is_compared_with_and_else_a_difference():
    kept = {"new": run_with(2.06), "old": run_with(2.0)}
    for wanted, value in (("kept", 0.03), ("less", 0.06)):
        difference = Claim("", "", ("new", "old"), "", frechet, wanted).difference(kept)
        assert difference["value"] == pytest.approx(value)
    assert MARGIN == 0.05


def test_a_kept_quality_has_the_interval_of_a_ratio():
    """Of logarithms both sides count; of 2 and 1, each 10% up or down, the ratio is 14%."""
    new, old = ({"value": x, "low": x / 1.1, "high": x * 1.1} for x in (2, 1))
    run = partial(Run, "one", curve=[])
    kept = {"new": run({"metrics": new}), "old": run({"metrics": old})}
    claim = Claim("", "", ("new", "old"), "", lambda run: run.at("metrics"), "kept")
    found, factor = claim.difference(kept), 1.1 ** math.sqrt(2)
    assert found == pytest.approx({"value": 1, "low": 2 / factor - 1, "high": 2 * factor - 1})


def test_bits_of_two_trainings_differ_by_what_another_seed_changes():
    def run(name: str, bits: float) -> Run:
        bits = {"raster": {"mean": bits, "se": 0.001}}
        return Run(name, {"metrics": {"bits_per_image": bits, "own_order": "raster"}}, [])

    claim = Claim("", "", ("new", "old"), "", own_bits, "less")
    pair = {name: run(name, bits) for name, bits in (("new", 499.0), ("old", 500.0))}
    assert claim.difference(pair) is None  # nothing says what a seed changes
    seeds = {name: run(name, 500 + i) for names in SEEDS.values() for i, name in enumerate(names)}
    found, half = claim.difference(pair | seeds), 2.776 * math.sqrt(2)  # sd 1, 4 degrees of freedom
    assert found == pytest.approx({"value": -1, "low": -1 - half, "high": -1 + half})


def test_values_of_images_are_paired():
    noise_N = 100 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    rows = ({"rho": 0.4, "more": {"of_images": (noise_N + shift).tolist()}} for shift in (1, 0))
    runs = {name: Run(name, {"robustness": {"rows": [next(rows)]}}, []) for name in "ab"}
    claim = Claim("", "", ("a", "b"), "", of_images("robustness.rows", "more", rho=0.4), "more")
    difference = claim.difference(runs)
    assert difference["low"] == pytest.approx(1, abs=1e-4) and claim.verdict(difference) == "yes"
    runs["b"].files["robustness"]["inputs"] = {"test_codes": "others"}
    with pytest.raises(InputError, match="runs of one table differ in robustness.inputs"):
        claim.difference(runs)


def test_overfitting_is_what_held_out_codes_cost_more_than_the_last_trained_ones():
    rows = [{"train_bits": 9.0}] * 5 + [{"train_bits": 7.0 + k % 2} for k in range(10)]
    rows[3] = {"train_bits": 9.0, "heldout_bits": 20.0}
    rows[-1] |= {"heldout_bits": 8.0}
    assert overfitting(Run("a", {}, rows))["mean"] == 0.5


def test_every_claim_has_its_row_with_or_without_runs():
    kept = read_reports()
    for runs in ({}, kept):
        rows = claims(runs).split("\n\n")[0].splitlines()[2:]
        assert [row.split(" | ")[0] for row in rows] == [f"| {claim.text}" for claim in CLAIMS]
        assert all(row.endswith("| not run here |") for row in rows) == (runs == {})


def training(seed: int, speed: float, **changes) -> Run:
    """128 steps of 10 images of 64 codes, 2 GFLOP each, at two speeds; 512 bits after the last."""
    config = {"order": "raster", "method": "gpt", "model": "nano", "steps": 128, "batch": 10}
    config |= {"seed": seed, "out": f"results/record_fast_{seed}"} | changes
    head = {"config": config, "inputs": {"codes": "c"}, "git_commit": "0123456789"}
    head["machine"] = "one core"
    curve = [
        {
            "step": step,
            "images_per_second": s,
            "tokens_per_second": 64 * s,
            "gflops_per_second": 2 * s,
        }
        for step, s in ((64, speed), (96, 2 * speed), (128, 2 * speed))
    ]
    curve[0]["test_bits"], curve[2]["test_bits"] = 8.2, 8.0
    return Run(f"record_fast_{seed}", {"config": head}, curve)


def test_a_record_is_the_time_of_the_steps_until_the_target_over_seeds():
    runs = {
        run.name: run for run in (training(seed, speed) for seed, speed in enumerate((1, 2, 4)))
    }
    minutes, tflop = reached(runs["record_fast_0"], 520)
    assert (minutes, tflop) == pytest.approx(((640 + 320) / 60, 1280 * 2 / 1000))
    assert reached(runs["record_fast_0"], 525)[0] == pytest.approx(640 / 60)
    row = records(runs).splitlines()[2]
    assert "| fast | gpt | nano | 128 | 10 | 9.3 ± 6.1 | 2.6 ± 0.0 | one core | 0123456 |" in row
    with pytest.raises(InputError, match="never came down to 511 bits"):
        reached(runs["record_fast_0"], 511)
    for other, message in (
        (training(1, 1.0), "a record takes 3 seeds"),
        (training(2, 1.0, lr=1.0), "differ in config.config.lr"),
        (training(2, 1.0, order="hilbert"), "differ in config.config.order"),
    ):
        with pytest.raises(InputError, match=message):
            records(runs | {"record_fast_2": other})
