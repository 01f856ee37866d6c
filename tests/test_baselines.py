"""The baselines' bits against distributions whose entropy is known."""

import pytest
import torch

from metrics.likelihood import baseline_bits
from models.data import Codes

TOKENS, SIZE, CLASSES = 16, 8, 4


def codes_of(codes_NT: torch.Tensor, label_N: torch.Tensor) -> Codes:
    return Codes(codes_NT.unsqueeze(1), label_N, {"codebook_size": SIZE})


def split(make, images: int, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(images) % CLASSES
    return codes_of(make(label_N, generator), label_N)


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
