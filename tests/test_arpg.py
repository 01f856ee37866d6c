"""What is ARPG's own; the truths of the contract are in test_methods.py."""

from typing import get_args

import pytest
import torch
from reference_arpg import reference_logits

from models import arpg
from models.arpg import ARPG
from models.command import InputError
from models.methods import METHODS, build
from models.orders import Grouping, mixed_order, scan
from models.sampling import Plan, sample_codes
from models.training import parameters
from models.transformer import ModelConfig

CODES, CLASSES, GRID, BATCH, HEADS, WIDTH = 7, 3, 4, 3, 2, 16
TOKENS = GRID * GRID


def tiny(layers: int = 4, dropout: float = 0.0) -> ARPG:
    """A model in float64 and eval mode, with random weights everywhere."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=CODES,
        classes=CLASSES,
        grid=GRID,
        layers=layers,
        heads=HEADS,
        width=WIDTH,
        token_dropout=dropout,
        residual_dropout=dropout,
        ffn_dropout=dropout,
    )
    model = build("arpg", config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, labels (the null label among them) and random orders."""
    generator = torch.Generator().manual_seed(2)
    codes_BT = torch.randint(CODES, (BATCH, TOKENS), generator=generator)
    order_BS = mixed_order(scan("raster", GRID), BATCH, 1.0, generator)
    return codes_BT, torch.tensor([0, 2, CLASSES]), order_BS


def published_keys(codes: int, classes: int, layers: int, width: int, hidden: int) -> dict:
    """The published state dict, from its documented layout."""
    keys = {"embeddings.weight": (codes + classes + 3, width)}
    for half, projections in (("self_dec", "to_q to_k to_v proj"), ("cross_dec", "to_q proj")):
        for i in range(layers // 2):
            at = f"layers.{half}.{i}."
            keys |= {f"{at}attn.{name}.weight": (width, width) for name in projections.split()}
            keys |= {f"{at}ffn.{name}.weight": (hidden, width) for name in ("w1", "w3")}
            keys[f"{at}ffn.w2.weight"] = (width, hidden)
            keys |= {f"{at}{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
    keys["layers.norm.weight"] = (width,)
    keys |= {f"layers.{name}.weight": (width, width) for name in ("to_k", "to_v")}
    return keys | {"norm.weight": (width,), "head.weight": (codes, width)}


@pytest.mark.parametrize(
    ("layers", "heads", "width", "hidden", "total"),
    [(24, 16, 1024, 2816, 319_845_376), (36, 20, 1280, 3584, 718_997_760)],
)
def test_published_sizes_and_keys(layers, heads, width, hidden, total):
    """ARPG-L and ARPG-XL."""
    config = ModelConfig(
        vocab_size=16384, classes=1000, grid=16, layers=layers, heads=heads, width=width
    )
    with torch.device("meta"):
        model = build("arpg", config)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == published_keys(16384, 1000, layers, width, hidden)
    assert list(found) == list(published_keys(16384, 1000, layers, width, hidden))
    assert parameters(model) == total


def test_logits_are_those_of_the_formulas():
    """An independent float64 reference, given random weights under the published names."""
    model = tiny()
    generator = torch.Generator().manual_seed(3)
    weights = {
        key: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for key, shape in published_keys(CODES, CLASSES, 4, WIDTH, 256).items()
    }
    model.load_state_dict(weights)
    codes_BT, label_B, order_BS = draw()
    expected_BSV = reference_logits(weights, codes_BT, label_B, order_BS, HEADS, CLASSES)
    assert expected_BSV.std() > 0.1
    torch.testing.assert_close(model(codes_BT, label_B, order_BS), expected_BSV, rtol=0, atol=1e-9)


def test_token_by_token_decoding_is_forward_in_training_mode():
    model = tiny()
    codes_BT, label_B, order_BS = draw()
    codes_BS = codes_BT.gather(1, order_BS)
    forced_BSV = model.train()(codes_BT, label_B, order_BS)
    cache = model.eval().cache(label_B)
    for s in range(TOKENS):
        new = slice(max(s - 1, 0), s)
        decoded_B1V = model.decode(cache, codes_BS[:, new], order_BS[:, new], order_BS[:, s, None])
        torch.testing.assert_close(decoded_B1V[:, 0], forced_BSV[:, s], rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_a_code_moves_the_logits_of_all_later_steps_and_of_no_other(training):
    model = tiny().train(training)
    codes_BT, label_B, order_BS = draw()
    before_BSV = model(codes_BT, label_B, order_BS)
    for s in range(TOKENS):
        cell_B1 = order_BS[:, s : s + 1]
        changed_BT = codes_BT.scatter(1, cell_B1, (codes_BT.gather(1, cell_B1) + 1) % CODES)
        moved_BSV = (model(changed_BT, label_B, order_BS) - before_BSV).abs()
        assert moved_BSV[:, : s + 1].max() == 0
        assert (moved_BSV[:, s + 1 :].amax(-1) > 1e-9).all()


@pytest.mark.parametrize("sizes", [[TOKENS], [1, 3, 2, 6, 4], [7, 9], [5, 1, 10]])
def test_every_cell_of_a_group_depends_on_the_committed_codes_alone(sizes):
    """In any grouping, each cell gets the logits that forward gives it if it comes next."""
    model = tiny()
    codes_BT, label_B, order_BS = draw()
    cache, done = model.cache(label_B), 0
    cells = order_BS.split([0, *sizes], dim=1)
    for i, size in enumerate(sizes):
        decoded_BnV = model.decode(cache, codes_BT.gather(1, cells[i]), cells[i], cells[i + 1])
        assert decoded_BnV.shape == (BATCH, size, CODES)
        for j in range(size):
            steps = list(range(TOKENS))
            steps[done], steps[done + j] = steps[done + j], steps[done]
            forced_BSV = model(codes_BT, label_B, order_BS[:, steps])
            torch.testing.assert_close(decoded_BnV[:, j], forced_BSV[:, done], rtol=0, atol=1e-10)
        done += size


def test_a_cell_is_not_moved_by_the_others_that_are_asked():
    """Asked alone, first, last, twice, or again without a commit: the same logits."""
    model = tiny()
    codes_BT, label_B, order_BS = draw()
    known_Bm, none_B0 = order_BS[:, :5], order_BS[:, :0]
    cache = model.cache(label_B)
    asked_Bn = order_BS[:, 5:]
    together_BnV = model.decode(cache, codes_BT.gather(1, known_Bm), known_Bm, asked_Bn)
    for picked in ([0], [3], [7, 2], [10, 4, 4, 0]):
        some_Bn = asked_Bn[:, picked]
        again_BnV = model.decode(cache, none_B0, none_B0, some_Bn)
        fresh = model.cache(label_B)
        alone_BnV = model.decode(fresh, codes_BT.gather(1, known_Bm), known_Bm, some_Bn)
        for found_BnV in (again_BnV, alone_BnV):
            torch.testing.assert_close(found_BnV, together_BnV[:, picked], rtol=0, atol=1e-10)
    assert cache.slots == 6  # the class and five codes


def test_the_class_token_is_reached_through_its_value_alone(monkeypatch):
    """Its rotation is zero: no query prefers or avoids it, in any layer of either pass."""
    seen = []

    def spy(q_BHSK, k_BHLK, v_BHLK, start, attend=arpg.attend):
        seen.append((q_BHSK, k_BHLK, v_BHLK))
        return attend(q_BHSK, k_BHLK, v_BHLK, start)

    monkeypatch.setattr(arpg, "attend", spy)
    model = tiny()
    model(*draw())
    codes_BT, label_B, order_BS = draw()
    model.decode(model.cache(label_B), codes_BT[:, :3], order_BS[:, :3], order_BS[:, 3:])
    assert len(seen) == 8
    for call, (q_BHSK, k_BHLK, v_BHLK) in enumerate(seen):
        assert k_BHLK[:, :, 0].abs().max() == 0
        assert k_BHLK[:, :, 1:].abs().amax(-1).min() > 0
        assert v_BHLK[:, :, 0].abs().amax(-1).min() > 0
        pass_2 = call % 4 >= 2
        assert (q_BHSK[:, :, 0].abs().max() == 0) != pass_2
    assert torch.equal(seen[2][1], seen[3][1])  # one set of keys for all of pass 2


@pytest.mark.parametrize("grouping", get_args(Grouping))
def test_sampling_writes_each_cell_once_in_every_number_of_steps(grouping, monkeypatch):
    model = tiny(layers=2)
    asked = []

    def spy(cache, codes_Bm, cells_Bm, next_cells_Bn):
        asked.append(next_cells_Bn)
        return ARPG.decode(model, cache, codes_Bm, cells_Bm, next_cells_Bn)

    monkeypatch.setattr(model, "decode", spy)
    label_N = torch.tensor([0, 2])
    for steps in range(1, TOKENS + 1):
        asked.clear()
        plan = Plan(
            order="random",
            decode_steps=steps,
            grouping=grouping,
            cfg_scale=2.0,
            schedule="constant",
        )
        codes_NT = sample_codes(model, label_N, plan, seed=steps)
        assert codes_NT.min() >= 0 and codes_NT.max() < CODES
        assert len(asked) == steps
        cells_BS = torch.cat(asked, dim=1)
        assert torch.equal(cells_BS.sort(1).values, torch.arange(TOKENS).expand(4, TOKENS))


def test_dropout_is_on_the_content_in_training_only():
    """Token dropout alone: the label and the codes are hit, the query never."""
    model = tiny()
    codes_BT, label_B, order_BS = draw()
    whole_BSV = model(codes_BT, label_B, order_BS)
    model.token_dropout.p = 1.0
    assert torch.equal(model(codes_BT, label_B, order_BS), whole_BSV)
    dropped_BSV = model.train()(codes_BT, label_B, order_BS)
    assert not torch.allclose(dropped_BSV, whole_BSV)
    # no content at all: what is left is the query's own vector, the same for every cell
    assert torch.allclose(dropped_BSV, dropped_BSV[:1, :1].expand_as(dropped_BSV))
    assert dropped_BSV.std(-1).min() > 0.1


@pytest.mark.parametrize("part", ["attn", "ffn"])
def test_dropout_is_in_every_layer(part):
    for half in ("self_dec", "cross_dec"):
        for i in range(2):
            model = tiny().train()
            whole_BSV = model(*draw())
            getattr(getattr(model.layers, half)[i], part).dropout.p = 0.5
            assert not torch.allclose(model(*draw()), whole_BSV)


def test_ids_out_of_range_are_not_another_vector():
    """A code V would be the query in the published table, a label C + 1 its unused row."""
    model = tiny()
    codes_BT, label_B, order_BS = draw()
    code_V, label_C1 = torch.full_like(codes_BT, CODES), torch.full_like(label_B, CLASSES + 1)
    for bad in ((code_V, label_B), (codes_BT, label_C1)):
        with pytest.raises(IndexError):
            model(*bad, order_BS)


def test_logits_are_fp32_under_bf16_autocast():
    model = tiny().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*draw()).dtype == torch.float32


def test_odd_numbers_of_layers_are_refused():
    assert METHODS["arpg"].any_order and METHODS["arpg"].parallel
    with pytest.raises(InputError, match=r"^arpg .* even number of layers, got 3$"):
        build("arpg", ModelConfig(layers=3))
