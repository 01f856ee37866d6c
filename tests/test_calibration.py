"""Calibration of predicted codes, against predictors whose calibration is known."""

import math

import pytest
import torch
from helpers import numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import calibration
from metrics.calibration import ClassBins, Predictions, calibration_report, collect
from metrics.sample_calibration import best_temperature, temperature_report


def drawn(logits_NSV: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Targets drawn from the prediction's own probabilities: it is calibrated by construction."""
    generator = torch.Generator().manual_seed(seed)
    return logits_NSV.softmax(-1).flatten(0, 1).multinomial(1, generator=generator).view(
        logits_NSV.shape[:2]
    )  # fmt: skip


def random_logits(*shape: int, seed: int = 1, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def tokens_of(confidence_NS: torch.Tensor, correct_NS: torch.Tensor) -> Predictions:
    other_NS = torch.zeros_like(confidence_NS)
    return Predictions(confidence_NS.double(), correct_NS.double(), other_NS, other_NS, other_NS)


def test_a_calibrated_predictor_has_no_ece_but_chance():
    logits_NSV = random_logits(2000, 50, 8)
    target_NS = drawn(logits_NSV)
    class_bins = ClassBins(8, 2000)
    tokens = collect([(logits_NSV, target_NS)], class_bins=class_bins)
    found = calibration_report(tokens)
    for kind in ("ece_equal_width", "ece_equal_mass"):  # 15 bins of 6,667: sd of each 0.005
        assert found[kind]["value"] < 0.008
        chance = found[f"{kind}_if_calibrated"]
        assert chance["low"] < found[kind]["value"] < 1.5 * chance["high"]
    assert class_bins.ece()["value"] < 0.008
    gap = found["overconfidence_gap"]
    assert gap["low"] < 0 < gap["high"] and found["tokens"] == 100_000
    # for a calibrated predictor E[nll] = E[entropy] and E[Brier] = 1 - E[sum p^2]
    assert found["nll_nats"]["value"] == pytest.approx(found["entropy_nats"]["value"], abs=0.01)
    expected = 1 - logits_NSV.softmax(-1).square().sum(-1).mean().item()
    assert found["brier"]["value"] == pytest.approx(expected, abs=0.01)
    assert found["nll_bits"]["value"] == pytest.approx(found["nll_nats"]["value"] / math.log(2))


def test_a_known_overconfidence_is_found_exactly():
    """Always says 0.9, right 6 times in 10: the ECE is 0.3 however the bins are."""
    p_V = torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64)
    logits_NSV = p_V.log().expand(10, 10, 3)
    target_NS = (torch.arange(10) >= 6).long().expand(10, 10)
    class_bins = ClassBins(3, 10)
    found = calibration_report(collect([(logits_NSV, target_NS)], class_bins=class_bins))
    for name in ("ece_equal_width", "ece_equal_mass", "overconfidence_gap"):
        assert found[name]["value"] == pytest.approx(0.3, abs=1e-12)
        assert found[name]["low"] == pytest.approx(found[name]["high"])  # images are all alike
    assert found["accuracy"]["value"] == 0.6 and found["reliability"]["count"] == [100]
    brier = 0.6 * (0.1**2 + 2 * 0.05**2) + 0.4 * (0.9**2 + 0.95**2 + 0.05**2)
    assert found["brier"]["value"] == pytest.approx(brier)
    nats = -0.6 * math.log(0.9) - 0.4 * math.log(0.05)
    assert found["nll_nats"]["value"] == pytest.approx(nats)
    # class 0: 0.9 against 0.6; class 1: 0.05 against 0.4; class 2: 0.05 against 0
    assert class_bins.ece()["value"] == pytest.approx((0.3 + 0.35 + 0.05) / 3, abs=1e-7)


def test_bins_by_hand():
    """Confidences 0.1 .. 0.6 in two bins of equal mass and of equal width."""
    confidence_NS = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    correct_NS = torch.tensor([[0, 0, 1, 1, 1, 0]])
    tokens = tokens_of(confidence_NS, correct_NS)
    mass = calibration.equal_mass_edges(tokens.confidence_NS, 2)  # |0.6 - 1| and |1.5 - 2|, of 6
    assert calibration.ece(tokens, mass)["value"] == pytest.approx((0.4 + 0.5) / 6)
    # (0, 0.5] holds five: |1.5 - 3|, and |0.6 - 0|
    halves = calibration.equal_width_edges(2)
    tokens = tokens_of(torch.tensor([[0.125, 0.25, 0.375, 0.5, 0.5, 0.625]]), correct_NS)
    assert calibration.ece(tokens, halves)["value"] == pytest.approx((1.25 + 0.625) / 6)
    table = calibration.reliability(tokens, halves)
    assert table["count"] == [5, 1]
    assert table["confidence"]["value"] == [0.35, 0.625]
    assert table["accuracy"]["value"] == [0.6, 0.0]
    # 30 tokens say 0.6 and are right 0.5; 70 say 0.9 and are right 0.7: ties share a bin
    confidence_NS = torch.tensor([0.6] * 30 + [0.9] * 70).double().view(10, 10)
    correct_NS = torch.tensor([1, 0] * 15 + [1] * 49 + [0] * 21).view(10, 10)
    tokens = tokens_of(confidence_NS, correct_NS)
    edges = calibration.equal_mass_edges(tokens.confidence_NS)
    assert calibration.ece(tokens, edges)["value"] == pytest.approx(0.3 * 0.1 + 0.7 * 0.2)


def test_a_uniform_model_needs_exactly_the_logarithm_of_the_codebook():
    for codes in (7, 1024):
        tokens = collect([(torch.zeros(3, 64, codes), torch.randint(codes, (3, 64)))])
        for nats_NS in (tokens.nats_NS, tokens.entropy_NS):
            bits_N = nats_NS.sum(1) / math.log(2)
            assert bits_N.tolist() == pytest.approx([64 * math.log2(codes)] * 3, rel=1e-13)
        assert tokens.confidence_NS.flatten().tolist() == pytest.approx([1 / codes] * 192)
    uniform = best_temperature(lambda: [(torch.zeros(3, 64, 7), torch.zeros(3, 64).long())])
    assert uniform == {"value": 1.0, "low": 0.01, "high": 100.0, "images": 3}


@pytest.mark.parametrize("factor", [0.25, 3.0, 20.0])
def test_the_best_temperature_undoes_a_factor(factor):
    logits_NSV = random_logits(400, 50, 8)
    target_NS = drawn(logits_NSV)
    wrong_NSV = factor * logits_NSV
    found = best_temperature(lambda: [(wrong_NSV, target_NS)])
    assert found["value"] == pytest.approx(factor, rel=0.02)
    assert found["low"] < found["value"] < found["high"]
    assert found["high"] / found["low"] < 1.1 and found["images"] == 400


def test_temperature_is_reported_on_images_it_was_not_fitted_on():
    logits_NSV = 3 * random_logits(400, 50, 8)
    target_NS = drawn(logits_NSV / 3)
    asked = []

    def batches(rows_N):
        asked.append(rows_N)
        return [(logits_NSV[rows_N], target_NS[rows_N])]

    found = temperature_report(batches, 400)
    fits, reports = asked[:-2], asked[-2:]
    assert all(torch.equal(rows_N, fits[0]) for rows_N in fits)
    assert not set(fits[0].tolist()) & set(reports[0].tolist())
    assert set(fits[0].tolist()) | set(reports[1].tolist()) == set(range(400))
    assert {0, 1} == set((fits[0] % 2).tolist())  # not by parity: labels may go by row number
    gain = found["nll_nats_before"]["value"] - found["nll_nats_after"]["value"]
    assert gain > 0.1 and found["gain_bits_per_image"]["images"] == 200
    assert found["gain_bits_per_image"]["value"] == pytest.approx(gain * 50 / math.log(2))
    assert found["ece_equal_width_before"]["value"] > 0.2
    assert found["ece_equal_width_after"]["value"] < 0.03


def test_intervals_are_over_images_not_tokens():
    """Tokens of an image are copies: more of them make no interval narrower."""
    generator = torch.Generator().manual_seed(3)
    correct_N1 = (torch.rand(300, 1, generator=generator) < 0.7).double()
    confidence_N1 = (0.5 + 0.4 * torch.rand(300, 1, generator=generator)).double()
    reports = [
        calibration_report(tokens_of(confidence_N1.expand(-1, S), correct_N1.expand(-1, S)))
        for S in (1, 64)
    ]
    for name in ("accuracy", "ece_equal_width", "ece_equal_mass", "overconfidence_gap"):
        for end in ("value", "low", "high"):
            assert reports[1][name][end] == pytest.approx(reports[0][name][end])
    accuracy, sd = reports[1]["accuracy"], correct_N1.std().item() / 300**0.5
    width = (accuracy["high"] - accuracy["low"]) / (2 * 1.96)
    assert width == pytest.approx(sd, rel=0.1) and accuracy["images"] == 300


def test_the_interval_of_an_ece_holds_what_as_many_images_give_on_average():
    """Of a calibrated model too, whose ECE is chance alone."""
    edges = calibration.equal_width_edges()
    for wrong in (0.0, 0.02):
        found = []
        for seed in range(60):
            generator = torch.Generator().manual_seed(seed)
            p_NS = torch.rand(150, 16, generator=generator, dtype=torch.float64) * 0.9
            correct_NS = torch.rand(150, 16, generator=generator) < p_NS - wrong
            found.append(calibration.ece(tokens_of(p_NS, correct_NS), edges))
        mean = sum(one["value"] for one in found) / len(found)
        inside = sum(one["low"] <= mean <= one["high"] for one in found)
        assert inside >= 0.88 * len(found), (wrong, inside)
        assert all(0 <= one["low"] <= one["value"] <= one["high"] for one in found)


def test_streaming_gives_what_one_batch_gives():
    logits_NSV = random_logits(50, 16, 9).float()
    target_NS = drawn(logits_NSV, seed=5)

    def report(logits_NSV, batch, temperature):
        class_bins = ClassBins(9, 50)
        batches = zip(logits_NSV.split(batch), target_NS.split(batch), strict=True)
        tokens = collect(batches, temperature, class_bins)
        return calibration_report(tokens) | {"class_wise": class_bins.ece()}

    one, many = report(logits_NSV, 50, 1.7), report(logits_NSV, 7, 1.7)
    scaled = report(logits_NSV / 1.7, 50, 1.0)
    for other in (many, scaled):
        assert numbers(other) == pytest.approx(numbers(one), abs=2e-6)
    assert one["class_wise"]["low"] < one["class_wise"]["high"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_ece_is_a_share_and_knows_no_order_of_tokens(pairs, bins, random):
    def errors(pairs):
        tokens = tokens_of(*(torch.tensor(x, dtype=torch.float64)[None] for x in zip(*pairs)))  # noqa: B905
        edges = calibration.equal_width_edges(bins), calibration.equal_mass_edges(
            tokens.confidence_NS, bins
        )  # fmt: skip
        gap = abs((tokens.confidence_NS - tokens.correct_NS).mean().item())
        return [calibration.ece(tokens, e)["value"] for e in edges], gap

    before, gap = errors(pairs)
    shuffled = random.sample(pairs, len(pairs))
    assert errors(shuffled)[0] == pytest.approx(before, abs=1e-12)
    assert all(gap - 1e-9 <= error <= 1 + 1e-9 for error in before)  # Jensen, over the bins
