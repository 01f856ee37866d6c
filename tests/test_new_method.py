"""Adding a method is one file and one line: a toy gets every stage and every truth for free."""

import importlib
import sys

import pytest
import test_methods as truths
import test_methods_sampling as sampled
from helpers import eval_config, log_of, script, train_config

from models.methods import METHODS

TOY = '''
"""Toy: the code of a cell follows from the label and a bag of the codes that are known."""

import torch.nn.functional as F
from torch import nn

from models.method import Method


class Toy(Method):
    any_order = parallel = True

    def __init__(self, config):
        super().__init__(config)
        self.label = nn.Embedding(config.classes + 1, config.width)
        self.code = nn.Embedding(config.vocab_size, config.width)
        self.cell = nn.Embedding(config.tokens, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)

    def bag(self, codes_BS, cells_BS):
        return self.code(codes_BS) * self.cell(cells_BS)

    def forward(self, codes_BT, label_B, order_BS):
        seen_BSD = self.bag(codes_BT.gather(1, order_BS), order_BS).cumsum(1)
        known_BSD = F.pad(seen_BSD[:, :-1], (0, 0, 1, 0)) + self.label(label_B).unsqueeze(1)
        return self.head(known_BSD * self.cell(order_BS))

    def cache(self, label_B):
        return [self.label(label_B)]

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        cache[0] = cache[0] + self.bag(codes_Bm, cells_Bm).sum(1)
        return self.head(cache[0].unsqueeze(1) * self.cell(next_cells_Bn))
'''

TRUTHS = [
    (truths.test_no_step_sees_its_own_or_a_later_code, [(False,), (True,)]),
    (truths.test_label_matters_from_the_first_step, [()]),
    (truths.test_decoding_one_cell_at_a_time_is_teacher_forcing, [(0,), (5,)]),
    (truths.test_groups_see_the_committed_codes_as_in_teacher_forcing, [()]),
    (truths.test_probabilities_of_all_grids_sum_to_one, [()]),
    (truths.test_first_loss_is_log_of_the_codebook, [()]),
    (truths.test_one_batch_is_memorised, [()]),
    (sampled.test_a_sample_is_the_same_whatever_batch_it_is_in, [(1.0, 0.0), (3.0, 0.25)]),
    (sampled.test_what_was_least_likely_is_drawn_anew_given_all_others, [(0, 1), (6, 5)]),
    (sampled.test_every_cell_is_asked_for_once_in_every_number_of_steps, [()]),
]


@pytest.fixture
def toy(tmp_path, monkeypatch) -> str:
    """Write the module, and add the line."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "toy", importlib.import_module("toy").Toy)
    yield "toy"
    del sys.modules["toy"]


@pytest.mark.parametrize(("truth", "cases"), TRUTHS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_toy_is_held_to_the_truths(toy, truth, cases):
    for case in cases:
        truth(toy, *case)


def test_a_toy_is_trained_sampled_and_evaluated(toy, world, tmp_path):
    train = script.__wrapped__("train_c2i.py")  # anew: its --method lists METHODS
    plain = vars(train_config(world, tmp_path / "run", model="nano", steps=30, batch=16))
    toys = {"method": toy, "order": "anneal", "lr": 1e-2, "ema": 0.5, "eval_every": 10}
    run = train.main(train.TrainConfig(**plain | toys))
    rows = log_of(run / "metrics.jsonl")
    assert rows[-1]["test_bits"] < rows[0]["test_bits"] - 0.02
    out = tmp_path / "out"
    found = script("eval_c2i.py").main(eval_config(world, run / "last.pth", out, decode_steps=7))
    assert found["bits_per_image"].keys() == {"raster", "random"}
    assert (out / "samples.png").exists()
