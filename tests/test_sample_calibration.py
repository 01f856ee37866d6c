"""Likelihood over orders and of baselines, classes by Bayes, entropy, confidence in samples."""

import math

import pytest
import torch
from helpers import tiny

from metrics import sample_calibration
from metrics.calibration import bootstrap_weights
from metrics.likelihood import (
    baseline_bits,
    bits_per_code,
    ensemble,
    order_report,
    orders_for,
    orders_to_measure,
)
from metrics.sample_calibration import aurc, class_log_p, risk_coverage, spearman
from models.data import Codes
from models.method import ModelConfig
from models.orders import scan


def test_an_ensemble_of_orders_is_no_worse_than_a_random_one():
    bits_KN = 100 + 10 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    joint_N, geometric_N = ensemble(bits_KN)
    assert (joint_N <= geometric_N).all() and (joint_N >= bits_KN.min(0).values - 1e-9).all()
    by_hand = -math.log2(sum(2.0 ** -(b - 100) for b in bits_KN[:, 3].tolist()) / 5) + 100
    assert joint_N[3].item() == pytest.approx(by_hand)
    for one in ensemble(bits_KN[:1]):
        torch.testing.assert_close(one, bits_KN[0].double())
    far_N = ensemble(torch.tensor([[5000.0], [6000.0]]))[0]  # 2 ** -5000 is 0 in floats
    assert far_N.item() == pytest.approx(5001)


def test_orders_are_those_that_a_method_takes(method):
    model = tiny(method)
    orders = orders_to_measure(model, 3, seed=2)
    if not model.any_order:
        assert orders.keys() == {model.config.scan}
    else:
        assert {"raster", "reverse", "spiral_in", "random_0", "random_2"} < orders.keys()
        assert orders["reverse"].tolist() == [*range(15, -1, -1)]
        again = orders_to_measure(model, 3, seed=3)
        assert not torch.equal(orders["random_0"], again["random_0"])
        assert not torch.equal(orders["random_0"], orders["random_1"])
    assert all(sorted(order_S.tolist()) == [*range(16)] for order_S in orders.values())
    codes_NT = torch.randint(7, (9, 16))
    found = order_report(model, codes_NT, torch.arange(9) % 3, 3, batch=4)
    assert found["bits_per_image"].keys() == orders.keys()
    for name, row in found["bits_per_image"].items():
        curve = found["bits_per_step"][name]["value"]
        assert len(curve) == 16 and sum(curve) == pytest.approx(row["value"], rel=1e-5)
        assert row["images"] == 9 and 0 < row["se"] < row["value"]
    assert ("ensemble" in found) == model.any_order
    if model.any_order:
        mixed = found["ensemble"]["random"]
        assert mixed["orders"] == 3 and mixed["gain"]["low"] >= 0
        means = [found["bits_per_image"][f"random_{k}"]["value"] for k in range(3)]
        assert mixed["mean_of_logs"]["value"] == pytest.approx(sum(means) / 3)
        spread, sd = found["sd_over_random_orders"], torch.tensor(means).std().item()
        assert spread["of_their_means"]["value"] == pytest.approx(sd, rel=1e-4)
        assert spread["per_image"]["value"] >= spread["of_their_means"]["value"]


class Oracle(torch.nn.Module):
    """Codes of class y are independent with a known distribution: p(x | y) has a closed form."""

    def __init__(self, p_CV: torch.Tensor):
        super().__init__()
        self.log_p_CV = torch.nn.Parameter(p_CV.log(), requires_grad=False)
        self.config = ModelConfig(vocab_size=p_CV.shape[1], classes=len(p_CV), grid=2)

    def forward(self, codes_BT, label_B, order_BS):
        return self.log_p_CV[label_B].unsqueeze(1).expand(-1, codes_BT.shape[1], -1)


def test_classes_by_bayes_are_those_of_a_known_distribution():
    model = Oracle(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).double())
    codes_NT = torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0], [2, 1, 1, 2]])
    order_NS = scan("raster", 2).expand(3, -1)
    log_p_NC = class_log_p(model, codes_NT, order_NS, batch=2)
    expected = [[2**-6, 2**-7], [2**-4, 2**-8], [2**-8, 2**-6]]
    torch.testing.assert_close(log_p_NC.exp(), torch.tensor(expected).double())
    torch.testing.assert_close(
        log_p_NC.softmax(1)[:, 0], torch.tensor([2 / 3, 16 / 17, 1 / 5]).double()
    )


def test_class_posteriors_of_the_true_distribution_are_calibrated():
    p_CV = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).double()
    generator = torch.Generator().manual_seed(0)
    label_N = torch.randint(2, (8000,), generator=generator)
    codes_NT = p_CV[label_N].multinomial(4, replacement=True, generator=generator)
    log_p_NC = class_log_p(Oracle(p_CV), codes_NT, scan("raster", 2).expand(8000, -1), 4000)
    right = sample_calibration.class_report(log_p_NC, label_N)
    assert right["before"]["ece_equal_width"]["value"] < 0.03
    assert right["temperature"]["value"] == pytest.approx(1, rel=0.1)
    sure = sample_calibration.class_report(4 * log_p_NC, label_N)
    assert sure["temperature"]["value"] == pytest.approx(4, rel=0.1)
    assert sure["before"]["ece_equal_width"]["value"] > 0.1
    assert sure["after"]["ece_equal_width"]["value"] < 0.03
    assert sure["after"]["accuracy"] == sure["before"]["accuracy"]
    assert sure["before"]["accuracy"]["images"] == 4000


def test_orders_together_are_brute_force():
    generator = torch.Generator().manual_seed(0)
    log_p_KNC = 3 * torch.randn(5, 400, 3, generator=generator).double() - 300
    label_N = torch.randint(3, (400,), generator=generator)
    found = sample_calibration.order_ensembles(log_p_KNC, label_N)
    assert found.keys() == {"1", "2", "4"} and found["1"]["logs"] == found["1"]["probabilities"]
    for count in (2, 4):
        some_kNC = (log_p_KNC[:count] + 300).exp()
        joint = {"probabilities": some_kNC.mean(0), "logs": some_kNC.log().mean(0).exp()}
        for kind, p_NC in joint.items():
            p_N = p_NC[torch.arange(400), label_N] / p_NC.sum(1)
            of = found[str(count)][kind]
            assert of["nll_bits"]["value"] == pytest.approx(-p_N.log2().mean().item())
            right = (p_NC.argmax(1) == label_N).double().mean().item()
            assert of["accuracy"]["value"] == pytest.approx(right)
    kinds = [found[count]["logs"]["nll_bits"]["value"] for count in ("2", "4")]
    assert kinds != [found[count]["probabilities"]["nll_bits"]["value"] for count in ("2", "4")]


def test_own_samples_are_of_the_distribution_whose_entropy_is_measured(method):
    """Sampler and likelihood agree: the NLL of own samples is their entropy, up to chance."""
    model = tiny(method)
    order = "random" if model.any_order else model.config.scan
    codes_NT, own = sample_calibration.own_samples(
        model, torch.arange(600) % 3, order, seed=1, batch=200
    )
    other = sample_calibration.own_samples(model, torch.arange(600) % 3, order, seed=2, batch=600)[
        1
    ]
    assert codes_NT.shape == (600, 16)
    order_NS = orders_for(model, order, 600, seed=1)
    bits_NS = bits_per_code(model, codes_NT, torch.arange(600) % 3, order_NS)
    torch.testing.assert_close(own.nats_NS / math.log(2), bits_NS, rtol=1e-4, atol=1e-4)
    found = sample_calibration.entropy_report(own, other)
    check = found["sampler_check_bits_per_image"]
    assert abs(check["value"]) < check["high"] - check["low"] < 2
    difference = found["difference_bits_per_image"]
    assert abs(difference["value"]) < difference["high"] - difference["low"]
    assert sum(found["difference_bits_per_step"]["value"]) == pytest.approx(difference["value"])
    wrong = sample_calibration.entropy_report(
        own._replace(entropy_NS=own.entropy_NS + math.log(2)), other
    )
    assert wrong["difference_bits_per_image"]["low"] > 10


def test_rank_correlation_by_hand():
    x_RN = torch.tensor([[1.0, 2, 3, 4, 5], [1, 1, 2, 3, 3], [2, 2, 2, 2, 2], [5, 4, 3, 2, 1]])
    y_RN = torch.tensor([[5.0, 6, 7, 8, 7], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 8, 9, 50, 51]])
    # 1: ranks 0 1 2.5 4 2.5, by Pearson of ranks; 2: 0.5 0.5 2 3.5 3.5
    expected = [8 / math.sqrt(10 * 9.5), 9 / math.sqrt(9 * 10), 0, -1]
    once_1N, pairs = torch.ones(1, 5, dtype=torch.float64), list(zip(x_RN, y_RN, strict=True))
    found = [spearman(x_N, y_N, once_1N).item() for x_N, y_N in pairs]
    assert found == pytest.approx(expected)


def test_statistics_of_a_resample_are_those_of_the_images_it_drew():
    draw = torch.Generator().manual_seed(0)
    confidence_N = torch.randint(20, (30,), generator=draw).double()  # some are equal
    quality_N = torch.rand(30, generator=draw, dtype=torch.float64)
    weight_RN, once_1N = bootstrap_weights(30, 50), torch.ones(1, 30, dtype=torch.float64)
    for statistic in (spearman, aurc):
        found_R = statistic(confidence_N, quality_N, weight_RN)
        for weight_N, found in zip(weight_RN, found_R, strict=True):
            drawn_N = torch.arange(30).repeat_interleave(weight_N.long())
            alone = statistic(confidence_N[drawn_N], quality_N[drawn_N], once_1N)
            assert found.item() == pytest.approx(alone.item())


def test_risk_and_coverage_by_hand():
    quality_N = torch.tensor([0.0, 1.0, 0.5, 1.0])
    confidence_N = torch.tensor([-9.0, 4.0, 2.0, 3.0])
    assert risk_coverage(confidence_N, quality_N).tolist() == [0, 0, 0.5 / 3, 1.5 / 4]
    found = sample_calibration.quality_report(confidence_N, quality_N)
    assert found["aurc"]["value"] == pytest.approx((0.5 / 3 + 1.5 / 4) / 4)  # that curve's mean
    assert found["aurc_oracle"]["value"] == found["aurc"]["value"]
    assert found["risk"]["value"] == pytest.approx(1.5 / 4) and found["risk"]["images"] == 4
    backwards = sample_calibration.quality_report(-confidence_N, quality_N)
    assert backwards["aurc"]["value"] > backwards["risk"]["value"] > found["aurc"]["value"]
    quality_N = torch.rand(500, generator=torch.Generator().manual_seed(0))
    blind = sample_calibration.quality_report(quality_N.roll(7), quality_N)
    assert blind["spearman"]["low"] < 0 < blind["spearman"]["high"]
    assert blind["aurc"]["low"] < blind["risk"]["value"] < blind["aurc"]["high"]


TOKENS, SIZE, CLASSES = 16, 8, 4


def split(make, images: int, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(images) % CLASSES
    return Codes(make(label_N, generator).unsqueeze(1), label_N, {"codebook_size": SIZE})


def uniform(label_N, generator):
    return torch.randint(SIZE, (len(label_N), TOKENS), generator=generator)


def by_class_and_cell(label_N, generator):
    """One of two codes, which two is told by the label and the cell: 1 bit a code."""
    start_NT = label_N.unsqueeze(1) * 3 + torch.arange(TOKENS)
    return (start_NT + torch.randint(2, start_NT.shape, generator=generator)) % SIZE


def a_walk(label_N, generator):
    """Each code is the one before or the next: 3 bits, then 15 of 1 bit."""
    steps_NT = torch.randint(2, (len(label_N), TOKENS), generator=generator)
    steps_NT[:, 0] = torch.randint(SIZE, (len(label_N),), generator=generator)
    return steps_NT.cumsum(1) % SIZE


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (uniform, {"class_position": 48, "raster_bigram": 48}),
        (by_class_and_cell, {"class_position": 16, "raster_bigram": 48}),
        (a_walk, {"class_position": 48, "raster_bigram": 18}),
    ],
)
def test_bits_are_the_entropy_of_what_a_baseline_can_see(make, expected):
    found = baseline_bits(split(make, 4000, 0), split(make, 1000, 1))
    assert found["uniform"] == TOKENS * 3
    if make is by_class_and_cell:  # the code before tells something of the next: only a bound
        assert 16 < found.pop("raster_bigram") < expected.pop("raster_bigram")
    for name, bits in expected.items():
        assert found[name] == pytest.approx(bits, rel=0.015)
