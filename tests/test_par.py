"""PAR: its groups, its mask, its sequence, and the published sizes."""

import pytest
import torch
from reference_par import reference_logits

from models.command import InputError
from models.methods import METHODS, build, check_order
from models.orders import region_scan
from models.par import group_mask
from models.sampling import Plan, generate, sample_codes
from models.training import parameters
from models.transformer import ModelConfig

CODES, BATCH = 7, 2


def tiny(grid: int, regions: int, dropout: float = 0.0, layers: int = 2):
    """A PAR in float64 with random weights, the head too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": CODES, "classes": 3, "layers": layers, "heads": 2, "width": 16}
    dropouts = dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), dropout)
    model = build("par", ModelConfig(grid=grid, regions=regions, **sizes, **dropouts)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def draw(grid: int, regions: int):
    """Return (codes_BT, label_B, order_BS); one label is the null label."""
    codes_BT = torch.randint(
        CODES, (BATCH, grid**2), generator=torch.Generator().manual_seed(grid + regions)
    )
    return codes_BT, torch.tensor([1, 3]), region_scan(grid, regions).expand(BATCH, -1)


def decoded(model, codes_BT, label_B, order_BS, sizes, known: int = 0):
    """Decode with the true codes, `known` of them committed first; return logits of the rest."""
    cache, codes_BS = model.cache(label_B), codes_BT.gather(1, order_BS)
    cells = order_BS.split([known, *sizes], dim=1)
    commits = codes_BS.split([known, *sizes], dim=1)
    steps = zip(commits[:-1], cells[:-1], cells[1:], strict=True)
    return torch.cat([model.decode(cache, *step) for step in steps], dim=1)


CASES = [(4, 4), (8, 4), (8, 16), (4, 16), (6, 9)]


@pytest.mark.parametrize(("grid", "regions"), [(4, 4), (8, 4), (8, 16)])
def test_agrees_with_the_formulas(grid, regions):
    model = tiny(grid, regions)
    codes_BT, label_B, order_BS = draw(grid, regions)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    expected_BSV = reference_logits(weights, codes_BT, label_B, 2, regions)
    found_BSV = model(codes_BT, label_B, order_BS).detach()
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=0, atol=1e-9)


def test_mask_is_causal_first_then_whole_blocks():
    """The layout of 16 slots and 4 regions, row by row."""
    seen = [1, 2, 3, 4, 8, 8, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16]
    expected = torch.tensor([[column < end for column in range(16)] for end in seen])
    assert torch.equal(group_mask(16, 4), expected)


@pytest.mark.parametrize(("grid", "regions"), CASES)
def test_decoding_in_groups_is_teacher_forcing_in_every_cell(grid, regions):
    model, drawn = tiny(grid, regions), draw(grid, regions)
    forced_BSV = model(*drawn)
    for sizes in (model.groups(None), model.groups(grid**2)):
        found_BSV = decoded(model, *drawn, sizes)
        torch.testing.assert_close(found_BSV, forced_BSV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("known", [1, 3, 4, 5, 8, 10, 15])
def test_known_codes_are_committed_at_once(known):
    """And a group that they reach into is served in any parts."""
    model, drawn = tiny(4, 4), draw(4, 4)
    rest = 16 - known
    forced_BSV = model(*drawn)[:, known:]
    ones = max(0, 4 - known)
    whole = [*[1] * ones, *[(rest - ones) % 4 or 4], *[4] * ((rest - ones - 1) // 4)]
    for sizes in ([1] * rest, whole):
        found_BSV = decoded(model, *drawn, sizes, known)
        torch.testing.assert_close(found_BSV, forced_BSV, rtol=0, atol=1e-10)


def test_codes_of_a_group_do_not_see_each_other():
    model, (codes_BT, label_B, order_BS) = tiny(4, 4), draw(4, 4)
    before_BSV = model(codes_BT, label_B, order_BS)
    for step in range(4, 16):
        cell_B1 = order_BS[:, step : step + 1]
        changed_BT = codes_BT.scatter(1, cell_B1, (codes_BT.gather(1, cell_B1) + 1) % CODES)
        after_BSV = model(changed_BT, label_B, order_BS)
        end = (step // 4 + 1) * 4
        assert torch.equal(before_BSV[:, :end], after_BSV[:, :end])
        for later in range(end, min(end + 4, 16)):  # all of the next group see it
            assert not torch.allclose(before_BSV[:, later], after_BSV[:, later])


@pytest.mark.parametrize(
    ("grid", "regions", "steps"), [(24, 4, 147), (24, 16, 51), (8, 4, 19), (8, 16, 19), (2, 4, 4)]
)
def test_numbers_of_steps(grid, regions, steps):
    sizes = {"vocab_size": 3, "classes": 2, "layers": 1, "heads": 1, "width": 4}
    model = build("par", ModelConfig(grid=grid, regions=regions, **sizes))
    tokens = grid**2
    own = model.groups(None)
    assert own == [1] * regions + [regions] * (tokens // regions - 1)
    assert len(own) == steps and sum(own) == tokens and model.groups(steps) == own
    assert model.groups(tokens) == [1] * tokens
    with pytest.raises(InputError, match=rf"{steps} steps, or in {tokens} .*got --decode-steps 3$"):
        model.groups(3)


def test_groups_of_one_take_no_more_runs_of_the_network(monkeypatch):
    model, runs = tiny(4, 4), []
    run = model._run
    monkeypatch.setattr(model, "_run", lambda *args: runs.append(args[2:4]) or run(*args))
    for sizes in (model.groups(None), model.groups(16)):
        runs.clear()
        decoded(model, *draw(4, 4), sizes)
        assert runs == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 8), (8, 12), (12, 16)]


def test_samples_do_not_depend_on_how_a_group_is_asked_for():
    model, label_N = tiny(4, 4), torch.tensor([0, 1, 2, 0])
    plans = [
        Plan(order="regions", decode_steps=steps, schedule="constant") for steps in (None, 7, 16)
    ]
    codes = [sample_codes(model, label_N, plan, seed=1) for plan in plans]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_cells_of_two_groups_are_refused_and_leave_the_cache_as_it_was():
    model, (codes_BT, label_B, order_BS) = tiny(4, 4), draw(4, 4)
    cache, codes_BS = model.cache(label_B), codes_BT.gather(1, order_BS)
    for known, asked, most in ((0, 2, 1), (3, 2, 1), (4, 5, 4), (6, 3, 2)):
        with pytest.raises(ValueError, match=f"at most {most} cells.*asked for {asked}"):
            cells = order_BS[:, known : known + asked]
            model.decode(cache, codes_BS[:, :known], order_BS[:, :known], cells)
    none = order_BS[:, :0]
    found_B1V = model.decode(cache, none, none, order_BS[:, :1])
    torch.testing.assert_close(found_B1V, model(codes_BT, label_B, order_BS)[:, :1])
    with pytest.raises(ValueError, match="at most"):
        generate(model, label_B, order_BS, torch.rand(BATCH, 16), [8, 8], [1.0, 1.0])


def test_other_orders_and_numbers_of_regions_are_refused():
    model, (codes_BT, label_B, _) = tiny(8, 16), draw(8, 16)
    with pytest.raises(ValueError, match="order of its 16 regions"):
        model(codes_BT, label_B, region_scan(8, 4).expand(BATCH, -1))
    for regions in (0, 1, 2, 3, 9):
        with pytest.raises(InputError, match=f"regions.*square of a divisor of 8, got {regions}$"):
            build("par", ModelConfig(regions=regions))
    check_order("par", "regions")
    for order in ("raster", "random", "subsample"):
        with pytest.raises(InputError, match="--order regions"):
            check_order("par", order)


def test_order_is_that_of_the_regions_whatever_the_scan():
    assert METHODS["par"].scans == ("regions",)
    assert build("par", ModelConfig(layers=1, scan="raster")).config.scan == "regions"


def test_specials_learn_and_are_dropped_like_codes():
    model, drawn = tiny(4, 4, dropout=0.5).train(), draw(4, 4)
    loss, _ = model.loss(model(*drawn), drawn[0], drawn[2])
    loss.backward()
    gradient = model.spe_tok_embeddings.special_embeddings.weight.grad
    assert gradient.shape == (3, 16) and (gradient != 0).any(1).all()


@pytest.mark.parametrize(
    ("layers", "heads", "width", "hidden", "regions", "total"),
    [
        (12, 12, 768, 2048, 4, 110_890_752),
        (36, 20, 1280, 3584, 4, 774_703_360),
        (36, 20, 1280, 3584, 16, 774_718_720),
    ],
)
def test_published_sizes_and_keys(layers, heads, width, hidden, regions, total):
    """PAR-B and PAR-XL with four regions; with sixteen, 12 rows more."""
    shape = {"vocab_size": 16384, "classes": 1000, "grid": 24, "regions": regions}
    with torch.device("meta"):
        model = build("par", ModelConfig(layers=layers, heads=heads, width=width, **shape))
    expected = {
        "cls_embedding.embedding_table.weight": (1001, width),
        "tok_embeddings.weight": (16384, width),
        "spe_tok_embeddings.special_embeddings.weight": (regions - 1, width),
        "norm.weight": (width,),
        "output.weight": (16384, width),
    }
    for i in range(layers):
        expected |= {
            f"layers.{i}.attention.wqkv.weight": (3 * width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.feed_forward.w1.weight": (hidden, width),
            f"layers.{i}.feed_forward.w3.weight": (hidden, width),
            f"layers.{i}.feed_forward.w2.weight": (width, hidden),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
        }
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert parameters(model) == total
