"""Guidance, picking and the decode loop, against an oracle that knows the image."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.command import InputError
from models.method import Cache, Method, ModelConfig, groups_of
from models.orders import CHOSEN, Choice, sample_chance
from models.sampling import BLOCK, Plan, fill, generate, guidance_at, pick

VOCABULARY, GRID = 50, 4
TOKENS = GRID * GRID


class Oracle(Method):
    """Knows the image of every label; notes what it was told and asked."""

    any_order = parallel = True

    def __init__(self, image_BT: torch.Tensor):
        super().__init__(ModelConfig(vocab_size=VOCABULARY, grid=GRID))
        self.image_BT, self.told, self.asked = image_BT, [], []

    def cache(self, label_B):
        self.rows = len(label_B)
        return None

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        image_BT = self.image_BT.repeat(self.rows // len(self.image_BT), 1)
        assert torch.equal(codes_Bm, image_BT.gather(1, cells_Bm))
        self.told.append(cells_Bm)
        self.asked.append(next_cells_Bn)
        right_Bn1 = image_BT.gather(1, next_cells_Bn).unsqueeze(2)
        return torch.full((*next_cells_Bn.shape, VOCABULARY), -30.0).scatter(2, right_Bn1, 30.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, TOKENS - 1), st.data())
def test_an_oracle_decodes_to_its_image_for_any_order_and_grouping(seed, known, data):
    steps = data.draw(st.integers(1, TOKENS - known))
    cuts = data.draw(st.permutations(range(1, TOKENS - known)))[: steps - 1]
    edges = [0, *sorted(cuts), TOKENS - known]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    scale = data.draw(st.sampled_from([1.0, 2.5]))
    generator = torch.Generator().manual_seed(seed)
    image_BT = torch.randint(VOCABULARY, (3, TOKENS), generator=generator)
    uniform_BS, order_BS = sample_chance(seed, range(3), TOKENS)
    oracle = Oracle(image_BT)
    along_BS = image_BT.gather(1, order_BS)
    known_BS = along_BS.masked_fill(torch.arange(TOKENS) >= known, -1)
    inputs = torch.arange(3), order_BS, uniform_BS, sizes, [scale] * len(sizes)
    seen = []
    found_BT = generate(oracle, *inputs, known_BS=known_BS, watch=seen.append)
    assert torch.equal(found_BT, image_BT)
    for shown, seen_BT in zip(itertools.accumulate(sizes), seen, strict=True):
        hidden_BT = order_BS.argsort(1) >= known + shown
        assert torch.equal(seen_BT, image_BT.masked_fill(hidden_BT, -1))
    asked_BS = torch.cat(oracle.asked, dim=1)[:3]
    assert torch.equal(asked_BS, order_BS[:, known:])  # every unknown cell once, in the order
    told_BS = torch.cat(oracle.told, dim=1)[:3]
    assert torch.equal(told_BS, order_BS[:, : TOKENS - sizes[-1]])


@pytest.mark.parametrize("sizes", [[16, 1], [15], [8, 0, 8], [17, -1]])
def test_plans_that_do_not_fill_the_grid_are_refused(sizes):
    uniform_BS, order_BS = sample_chance(0, range(1), TOKENS)
    oracle = Oracle(torch.zeros(1, TOKENS).long())
    with pytest.raises(InputError, match="sum 16"):
        generate(oracle, torch.zeros(1).long(), order_BS, uniform_BS, sizes, [1.0] * len(sizes))


RAR_GUIDANCE = {  # scale, power -> at t = 0, 8, 16, 32, 48, 56, 63 of 64
    (16, 2.75): (1, 1.0004, 1.0181, 1.8031, 7.4044, 12.7674, 15.9336),
    (8, 1.2): (1, 1.1168, 1.6019, 3.7932, 6.6283, 7.6282, 7.9939),
}


@pytest.mark.parametrize("setting", RAR_GUIDANCE)
def test_power_cosine_equals_rars_values(setting):
    steps = (0, 8, 16, 32, 48, 56, 63)
    found = [guidance_at("power_cosine", *setting, t, 1, 64) for t in steps]
    assert found == pytest.approx(RAR_GUIDANCE[setting], abs=1e-4)


def test_the_other_schedules():
    assert [guidance_at("linear", 4, 0, q, 9, 64) for q in (0, 16, 32)] == [1, 1.75, 2.5]
    assert [guidance_at("constant", 4, 0, q, 1, 64) for q in (0, 63)] == [4, 4]
    assert guidance_at("power_cosine", 4, 0, 0, 1, 64) == 4  # 0^0 = 1
    done, found = 0, []
    for size in groups_of(64, 8, "arccos"):
        found.append(guidance_at("linear_after", 4, 0, done, size, 64))
        done += size
    of_arpg = [1.2813, 1.5156, 1.75, 2.0313, 2.3125, 2.6406, 3.0625, 4]
    assert found == pytest.approx(of_arpg, abs=1e-4)


def test_guidance_in_an_interval_runs_no_null_label_outside_of_it():
    """In steps 4 to 7 of 16 the batch is doubled; where that changes, all codes are fed anew."""
    oracle, order_BS = Oracle(torch.arange(TOKENS).repeat(2, 1)), torch.arange(TOKENS).repeat(2, 1)
    plan = Plan(cfg_scale=2.0, schedule="constant", cfg_from=0.25, cfg_to=0.5)
    sizes, scales = plan.groups(oracle)
    assert scales == [1.0] * 4 + [2.0] * 4 + [1.0] * 8
    inputs = torch.tensor([0, 1]), order_BS, torch.rand(2, TOKENS), sizes, scales
    assert torch.equal(generate(oracle, *inputs), oracle.image_BT)
    assert [len(cells_Bn) for cells_Bn in oracle.asked] == [2] * 4 + [4] * 4 + [2] * 8
    assert [cells_Bm.shape[1] for cells_Bm in oracle.told] == [0, 1, 1, 1, 4, 1, 1, 1, 8, *[1] * 7]


def uniforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_picked_frequencies_are_the_probabilities_at_a_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -math.inf, 0.5])
    for temperature in (1.0, 0.5):
        codes = pick(logits.expand(40_000, 1, 5), uniforms(40_000), temperature)
        frequency = torch.bincount(codes.flatten(), minlength=5) / 40_000
        assert (frequency - (logits / temperature).softmax(0)).abs().max() < 0.015
        assert frequency[3] == 0
    assert pick(logits.expand(9, 1, 5), uniforms(9), temperature=0).unique().tolist() == [2]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_top_k_keeps_the_k_largest(seed, k):
    generator = torch.Generator().manual_seed(seed)
    logits_BnV = torch.randn(30, 2, 9, generator=generator)
    before = logits_BnV.clone()
    uniform_Bn = torch.rand(30, 2, generator=generator)
    codes_Bn = pick(logits_BnV, uniform_Bn, top_k=k)
    place = (logits_BnV > logits_BnV.gather(2, codes_Bn.unsqueeze(2))).sum(2)
    assert (place < k).all()
    assert torch.equal(logits_BnV, before)


def test_a_large_batch_is_picked_as_its_rows_alone():
    logits_BnV = torch.randn(7, 10, 2000, generator=torch.Generator().manual_seed(0))
    uniform_Bn = torch.rand(7, 10, generator=torch.Generator().manual_seed(1))
    assert 1 < BLOCK // logits_BnV[0].numel() < 4  # three blocks, the last one shorter
    rows = zip(logits_BnV.split(1), uniform_Bn.split(1), strict=True)
    assert torch.equal(pick(logits_BnV, uniform_Bn), torch.cat([pick(*row) for row in rows]))


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for p, kept in ((0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        codes = pick(logits.expand(4000, 1, 4), uniforms(4000), top_p=p)
        assert set(codes.unique().tolist()) == kept, p


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_chance_picks_a_code_that_has_mass(uniform):
    logits = torch.tensor([-math.inf, 0.0, 1.0, -math.inf]).expand(1, 1, 4)
    code = pick(logits, torch.full((1, 1), uniform, dtype=torch.float64))
    assert code.item() in (1, 2)


@pytest.mark.parametrize(
    ("policy", "places"), [("confidence", [0, 1, 2]), ("entropy", [2, 0, 1]), ("margin", [2, 1, 0])]
)
def test_each_policy_has_its_own_measure_of_being_sure(policy, places):
    """The code drawn is the first: the likeliest of the cells 0 and 1, not of 2."""
    p_1lV = torch.tensor([[[0.6, 0.4, 0, 0, 0], [0.5, *[0.125] * 4], [0.1, 0.9, 0, 0, 0]]])
    none_113 = torch.zeros(1, 1, 3)
    choice = Choice(policy, 0.0, none_113, none_113)
    assert choice(0, (p_1lV + 1e-9).log(), none_113[0].long()).tolist() == [places]


class SureOracle(Oracle):
    """An oracle that is surer of some cells than of others: `sure_T` times as far from a tie."""

    def __init__(self, image_BT: torch.Tensor, sure_T: torch.Tensor):
        super().__init__(image_BT)
        self.sure_T = torch.nn.Parameter(sure_T, requires_grad=False)

    def cache(self, label_B):
        super().cache(label_B)
        return Cache()

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        logits_BnV = super().decode(cache, codes_Bm, cells_Bm, next_cells_Bn)
        return logits_BnV * self.sure_T[next_cells_Bn].unsqueeze(2)


@pytest.mark.parametrize("policy", CHOSEN)
@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_cells_that_the_model_is_surest_of_are_written_first(policy, known, scale, monkeypatch):
    monkeypatch.setattr(Cache, "rewind", lambda self, codes: None)
    generator = torch.Generator().manual_seed(1)
    image_BT = torch.randint(VOCABULARY, (3, TOKENS), generator=generator)
    sure_T = 0.05 + 0.01 * torch.randperm(TOKENS, generator=generator)
    oracle, open_T = SureOracle(image_BT, sure_T), torch.arange(TOKENS) >= known
    plan = Plan(order=policy, decode_steps=4, cfg_scale=scale, temperature=0.0)
    plan = replace(plan, choice_temperature=0.0)
    found_BT = fill(oracle, image_BT, open_T, torch.arange(3), plan, seed=0)
    assert torch.equal(found_BT, image_BT)
    told_BS = torch.cat([told[:3] for told in oracle.told], dim=1)
    sizes, _ = plan.groups(oracle, known)
    for row in told_BS.tolist():
        assert sorted(row[:known]) == [*range(known)]  # committed first, and never again
        surest = sure_T.masked_fill(~open_T, -1).argsort(descending=True).tolist()
        groups = itertools.pairwise([0, *itertools.accumulate(sizes[:-1])])
        for start, end in groups:
            assert set(row[known + start : known + end]) == set(surest[start:end])
    noisy = SureOracle(image_BT, sure_T)
    fill(noisy, image_BT, open_T, torch.arange(3), replace(plan, choice_temperature=50.0), seed=0)
    assert not torch.equal(torch.cat([told[:3] for told in noisy.told], dim=1), told_BS)
