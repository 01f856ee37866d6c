"""What is replaced in a context and what that costs; misread samples; readings."""

import math

import pytest
import torch
from helpers import tiny

from metrics.likelihood import orders_for
from metrics.robustness import MisreadContext, context_report, misread_samples
from models.data import swap_codes
from models.method import Method, ModelConfig
from models.orders import sample_chance
from models.published.baseline_vqvae import BaselineConfig, BaselineVQVAE
from models.published.vq16 import VQ16, VQ16Config
from models.sampling import Plan, sample_codes
from models.tokenizer import nearest_codes
from models.vqvae import VQVAE, VQVAEConfig

CODES = 7


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_share_of_codes_is_replaced_by_others():
    codes_NT = torch.randint(CODES, (500, 16))
    before_NT = codes_NT.clone()
    found = {rho: swap_codes(codes_NT, rho, CODES, seeded(3)) for rho in (0.0, 0.1, 0.5, 1.0)}
    assert torch.equal(codes_NT, before_NT) and torch.equal(found[0.0], codes_NT)
    assert (found[1.0] != codes_NT).all()
    for rho, corrupted_NT in found.items():
        assert (corrupted_NT != codes_NT).double().mean().item() == pytest.approx(rho, abs=0.02)
        assert corrupted_NT.min() >= 0 and corrupted_NT.max() < CODES
    few_NT = found[0.1] != codes_NT  # nested, with the same new codes
    assert torch.equal(found[0.1][few_NT], found[0.5][few_NT])
    counts_V = torch.bincount((found[1.0] - codes_NT).flatten() % CODES, minlength=CODES)
    assert counts_V[0] == 0 and counts_V[1:].min() > 1200  # 8000 / 6 each
    assert not torch.equal(found[0.5], swap_codes(codes_NT, 0.5, CODES, seeded(4)))


def test_neighbours_are_the_nearest_other_codes():
    codebook_VC = torch.tensor([[0.0], [1.0], [1.5], [5.0], [5.1]])
    neighbours_VK = nearest_codes(codebook_VC, 2)
    expected = [{1, 2}, {2, 0}, {1, 0}, {4, 2}, {3, 2}]
    assert [set(row) for row in neighbours_VK.tolist()] == expected
    codes_NT = torch.randint(5, (200, 16))
    corrupted_NT = swap_codes(codes_NT, 1.0, neighbours_VK, seeded(0))
    for code, allowed in enumerate(expected):
        assert set(corrupted_NT[codes_NT == code].tolist()) == allowed


class Repeats(torch.nn.Module):
    """Says, 0.97 sure, that the next code in raster order is the last one again."""

    def __init__(self):
        super().__init__()
        self.config = ModelConfig(vocab_size=4, classes=1, grid=4)
        self.some = torch.nn.Parameter(torch.zeros(()))

    def forward(self, codes_BT, label_B, order_BS):
        p_BSV = torch.full((*codes_BT.shape, 4), 0.01).double()
        p_BSV[:, 0] = 0.25
        p_BSV[:, 1:].scatter_(2, codes_BT.gather(1, order_BS)[:, :-1, None], 0.97)
        return p_BSV.log()


def test_a_model_that_trusts_its_context_is_overconfident_by_what_was_replaced():
    codes_NT = torch.full((40, 16), 2)  # every image is one code: a clean context is right
    order_NS = torch.arange(16).expand(40, -1)
    clean, wrong = context_report(Repeats(), codes_NT, codes_NT[:, 0] * 0, order_NS, (0.0, 0.5))
    bits = 2 - 15 * math.log2(0.97)
    assert clean["bits_per_image"]["value"] == pytest.approx(bits)
    corrupted_NT = swap_codes(codes_NT, 0.5, 4, seeded(0))
    misled = (corrupted_NT[:, :-1] != codes_NT[:, :-1]).sum(1).double().mean().item()
    cost = misled * math.log2(97)
    assert wrong["more_bits_per_image"]["value"] == pytest.approx(cost)
    change = wrong["overconfidence_gap"]["value"] - clean["overconfidence_gap"]["value"]
    assert change == pytest.approx(misled / 16)
    assert wrong["ece_equal_width"]["value"] > 0.3


def test_misreading_nothing_is_plain_sampling_and_misreading_changes_samples(method):
    model, label_N = tiny(method), torch.arange(6) % 3
    plan = Plan(order="random" if model.any_order else model.config.scan, cfg_scale=3.0)
    plain_NT = sample_codes(model, label_N, plan, seed=5)
    wrapped = MisreadContext(model, 0.0, 5, range(6))
    assert torch.equal(sample_codes(wrapped, label_N, plan, seed=5), plain_NT)
    assert torch.equal(misread_samples(model, label_N, plan, 0.0, 5, batch=6), plain_NT)
    order_NS = orders_for(model, plan.order, 6, seed=5)
    inputs = (plain_NT, label_N, order_NS)
    assert torch.equal(wrapped(*inputs), model(*inputs))
    assert wrapped.groups(None) == model.groups(None)
    misread_NT = misread_samples(model, label_N, plan, 0.5, 5, batch=6)
    assert misread_NT.min() >= 0 and misread_NT.max() < CODES
    assert not torch.equal(misread_NT, plain_NT)
    rows_N = torch.arange(6)  # nothing is read before the first code
    assert torch.equal(misread_NT[rows_N, order_NS[:, 0]], plain_NT[rows_N, order_NS[:, 0]])
    assert torch.equal(misread_samples(model, label_N, plan, 0.5, 5, batch=4), misread_NT)


class Deaf(Method):
    """Says that all codes are alike, whatever it reads, and keeps what it read."""

    any_order = parallel = True

    def __init__(self):
        super().__init__(ModelConfig(vocab_size=CODES, classes=3, grid=4))
        self.some, self.calls = torch.nn.Parameter(torch.zeros(())), []

    def cache(self, label_B):
        return None

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        self.calls.append((codes_Bm, cells_Bm))
        return torch.zeros(*next_cells_Bn.shape, CODES)


def read_by(rho: float, samples: int = 300, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes written, codes read, -1 where not) of a deaf model's samples."""
    model, label_N = Deaf(), torch.arange(samples) % 3
    plan = Plan(order="random", **({"cfg_scale": 2.0, "schedule": "constant"} | more))
    written_NT = misread_samples(model, label_N, plan, rho, 7, batch=samples)
    codes, cells = (torch.cat(parts, dim=1) for parts in zip(*model.calls, strict=True))
    read = torch.full((len(codes), 16), -1).scatter(1, cells, codes)
    cond_NT, *uncond_NT = read.split(samples)
    assert all(torch.equal(cond_NT, half_NT) for half_NT in uncond_NT)
    return written_NT, cond_NT


def test_a_share_of_the_codes_is_misread_and_the_clean_ones_are_written():
    found = {rho: read_by(rho) for rho in (0.0, 0.2, 0.6, 1.0)}
    clean_NT, read_NT = found[0.0]
    unread_NT, misread = read_NT == -1, {}
    assert (unread_NT.sum(1) == 1).all()  # the last one
    for rho, (written_NT, read_NT) in found.items():
        assert torch.equal(written_NT, clean_NT) and read_NT.max() < CODES
        misread[rho] = (read_NT != clean_NT) & ~unread_NT
        share = misread[rho].sum() / (~unread_NT).sum()
        assert share.item() == pytest.approx(rho, abs=0.03)
    assert not misread[0.0].any() and (misread[1.0] | unread_NT).all()
    assert (misread[0.6] | ~misread[0.2]).all()  # nested, and as the same codes
    assert torch.equal(found[0.2][1][misread[0.2]], found[0.6][1][misread[0.2]])
    steps_M = (found[1.0][1] - clean_NT)[~unread_NT] % CODES
    counts_V = torch.bincount(steps_M, minlength=CODES)
    assert counts_V[0] == 0 and counts_V[1:].min() > 600  # 4500 / 6 each


def test_what_is_misread_hangs_on_sample_and_cell_alone():
    written_NT, read_NT = read_by(0.3)
    few_NT, read_few_NT = read_by(0.3, cfg_scale=1.0, decode_steps=4)
    assert torch.equal(few_NT, written_NT)  # a deaf model's samples do not hang on the groups
    both_NT = (read_few_NT >= 0) & (read_NT >= 0)
    assert torch.equal(read_few_NT[both_NT], read_NT[both_NT]) and both_NT.sum() == 3000
    many, part, other = (
        MisreadContext(Deaf(), 0.3, seed, rows)
        for seed, rows in ((7, range(300)), (7, range(4, 9)), (8, range(300)))
    )
    assert torch.equal(many.chance_BT[4:9], part.chance_BT)
    assert torch.equal(many.step_BT[4:9], part.step_BT)
    assert not torch.equal(many.chance_BT, other.chance_BT)
    uniform_BS, _ = sample_chance(7, range(300), 16)  # not the chance that picks the codes
    together = torch.stack((uniform_BS.flatten(), many.chance_BT.flatten()))
    assert abs(torch.corrcoef(together)[0, 1]) < 0.05


def test_the_codebook_is_what_the_tokenizer_compares_with():
    ours = VQVAE(VQVAEConfig(codebook_size=12, width=8, blocks=1))
    codebook_VC = torch.nn.functional.normalize(torch.randn(12, 8), dim=-1)
    ours.quantizer.codebook_VC.copy_(codebook_VC)
    assert torch.equal(ours.quantizer.nearest(ours.codebook_VC), torch.arange(12))
    baseline = BaselineVQVAE(BaselineConfig(12, 4, 8, 4, 1))
    assert torch.equal(baseline._vq_vae.nearest(baseline.codebook_VC), torch.arange(12))
    vq16 = VQ16(VQ16Config(12, 4, 32, (1, 1), 32, 4))
    torch.testing.assert_close(vq16.codebook_VC.norm(dim=1), torch.ones(12))
