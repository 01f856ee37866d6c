"""IAR: balanced clusters, relabelled codes, and the loss of the cluster."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import script
from test_training import config, results, same

from models.artifacts import load_array
from models.cluster_loss import (
    balanced_kmeans,
    cluster_cross_entropy,
    nearest_with_room,
    relabelling,
    spread,
)
from models.command import InputError
from models.data import load_codes
from models.tokenizer import load_tokenizer, save_tokenizer

stage, tool = script("train_c2i.py"), script("tools/cluster_codebook.py")


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def clustered(world, tmp_path_factory):
    """The world's codes in 8 clusters of 4."""
    out = tmp_path_factory.mktemp("clustered")
    tool.main(tool_config(world, out))
    return out


def tool_config(world, out, **changes):
    plain = tool.ClusterConfig(tokenizer=world.tokenizer, codes=world.codes, out=out)
    return replace(plain, **{"cluster_size": 4, **changes})


def test_code_is_cluster_and_within():
    generator = torch.Generator().manual_seed(0)
    logits_BSV = 3 * torch.randn(3, 5, 24, generator=generator, dtype=torch.float64)
    target_BS = torch.randint(24, (3, 5), generator=generator)
    within = torch.stack(
        [
            F.cross_entropy(logits_V[k // 6 * 6 : k // 6 * 6 + 6], k % 6)
            for logits_V, k in zip(logits_BSV.flatten(0, 1), target_BS.flatten(), strict=True)
        ]
    ).mean()
    whole = F.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten())
    cluster = cluster_cross_entropy(logits_BSV, target_BS, 6)
    torch.testing.assert_close(cluster + within, whole, rtol=0, atol=1e-10)
    p_BSV = logits_BSV.softmax(-1)
    mine = target_BS.unsqueeze(-1) // 6 == torch.arange(24) // 6
    expected = -(p_BSV * mine).sum(-1).log().mean()
    torch.testing.assert_close(cluster, expected, rtol=0, atol=1e-10)


def test_ends_of_the_cluster_size():
    """Clusters of one code are the codes; one cluster of all is never wrong."""
    logits_BSV, target_BS = torch.randn(2, 3, 8).double(), torch.tensor([[0, 1, 7], [5, 5, 2]])
    whole = F.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten())
    assert cluster_cross_entropy(logits_BSV, target_BS, 1).item() == pytest.approx(whole.item())
    assert cluster_cross_entropy(logits_BSV, target_BS, 8).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="multiple of 3, got 8"):
        cluster_cross_entropy(logits_BSV, target_BS, 3)


@pytest.mark.parametrize("seed", range(5))
def test_rounds_end_as_one_by_one(seed):
    """Vectors in line by their least distance each take the nearest cluster with room."""
    generator = torch.Generator().manual_seed(seed)
    distance_VJ = torch.rand(60, 5, generator=generator, dtype=torch.float64) ** 3
    distance_VJ[:, 0] /= 4  # one that everyone wants
    room, expected = [12] * 5, [-1] * 60
    for v in sorted(range(60), key=lambda v: distance_VJ[v].min()):
        for j in sorted(range(5), key=lambda j: distance_VJ[v, j]):
            if room[j]:
                room[j], expected[v] = room[j] - 1, j
                break
    assert nearest_with_room(distance_VJ, 12).tolist() == expected


def test_clusters_are_balanced_near_and_the_same_for_a_seed():
    vectors_VC = vectors(192)
    cluster_V = balanced_kmeans(vectors_VC, 12, seed=0)
    assert cluster_V.dtype == torch.int64 and cluster_V.bincount().tolist() == [16] * 12
    assert torch.equal(cluster_V, balanced_kmeans(vectors_VC, 12, seed=0))
    assert torch.equal(cluster_V, balanced_kmeans(5 * vectors_VC, 12, seed=0))  # directions only
    assert not torch.equal(cluster_V, balanced_kmeans(vectors_VC, 12, seed=1))
    random = spread(vectors_VC, torch.randperm(192) % 12)
    assert spread(vectors_VC, cluster_V) < 0.8 * random
    assert random == pytest.approx(torch.pdist(F.normalize(vectors_VC)).mean().item(), rel=0.05)
    for clusters in (0, 5, 193):
        with pytest.raises(InputError, match=f"multiple of {clusters} clusters"):
            balanced_kmeans(vectors_VC, clusters, seed=0)


def test_clusters_that_are_there_are_found():
    """Also when codes are equal, as dead ones can be."""
    corner_JC = torch.eye(8)[:4]
    vectors_VC = corner_JC.repeat(10, 1)
    found_V = balanced_kmeans(vectors_VC, 4, seed=3)
    assert found_V.bincount().tolist() == [10] * 4
    noisy_VC = vectors_VC + 0.05 * vectors(40)
    together = [spread(noisy_VC, balanced_kmeans(noisy_VC, 4, seed)) for seed in range(20)]
    assert min(together) < 0.35


def test_relabelling_is_a_permutation_with_clusters_side_by_side():
    cluster_V = torch.tensor([2, 0, 1, 0, 2, 1])
    new_of_old_V = relabelling(cluster_V)
    assert new_of_old_V.tolist() == [4, 0, 2, 1, 5, 3]
    assert torch.equal(new_of_old_V // 2, cluster_V)
    assert torch.equal(new_of_old_V[new_of_old_V.argsort()], torch.arange(6))


def test_new_codes_decode_to_the_same_images_bit_for_bit(world, clustered):
    old, about = load_tokenizer(world.tokenizer)
    new, header = load_tokenizer(clustered / "tokenizer.pth")
    for split in ("train", "test"):
        before, after = load_codes(world.codes, split), load_codes(clustered, split)
        assert torch.equal(before.label_N, after.label_N)
        assert not torch.equal(before.codes_NAT, after.codes_NAT)
        one, other = before.codes_NAT[:16, 1], after.codes_NAT[:16, 1]
        assert torch.equal(old.decode(one), new.decode(other))
        assert after.header["inputs"]["tokenizer"] == header["sha256"] != about["sha256"]
        assert after.header["cluster_size"] == 4
        same_keys = ("codebook_size", "grid", "classes", "dataset")
        assert all(before.header[key] == after.header[key] for key in same_keys)
    assert header["inputs"]["train_images"] == about["inputs"]["train_images"]
    assert header["inputs"]["tokenizer"] == about["sha256"]
    assert header["dataset"] == about["dataset"]


def test_the_whole_codebook_state_is_relabelled(world, clustered):
    """What training would go on from: vectors, running sums, and counts of uses."""
    old, new = (load_tokenizer(path)[0] for path in (world.tokenizer, clustered / "tokenizer.pth"))
    new_of_old_V = torch.from_numpy(
        load_array(clustered / "relabelling.npy", "relabelling", "", np.int64, 1)[0]
    )
    inverse_V = torch.from_numpy(
        load_array(clustered / "inverse.npy", "inverse", "", np.int64, 1)[0]
    )
    assert new_of_old_V.dtype == torch.int64
    assert torch.equal(new_of_old_V[inverse_V], torch.arange(32))
    moved = 0
    for (name, before), after in zip(
        old.state_dict().items(), new.state_dict().values(), strict=True
    ):
        if before.ndim > 1 and before.shape[:2] == (1, 32) and name.startswith("quantizer"):
            assert torch.equal(before[:, inverse_V], after), name
            moved += 1
        else:
            assert torch.equal(before, after), name
    assert moved == 3
    vectors_VC = new.quantizer.codebook_VC
    own_V = torch.arange(32) // 4
    assert spread(vectors_VC, own_V) < spread(vectors_VC, torch.arange(32) % 8)


def test_tool_writes_what_it_should_and_the_same_again(world, clustered, tmp_path, capsys):
    names = {path.name for path in clustered.iterdir()}
    arrays = ("train_codes", "test_codes", "train_labels", "test_labels", "relabelling", "inverse")
    expected = {f"{name}.npy{end}" for name in arrays for end in ("", ".json")}
    assert names == expected | {"tokenizer.pth", "clusters.png"}
    assert (clustered / "clusters.png").read_bytes().startswith(b"\x89PNG")
    tool.main(tool_config(world, tmp_path / "again"))
    assert "8 clusters of 4: mean distance within" in capsys.readouterr().out
    for name in arrays:
        one, other = (np.load(folder / f"{name}.npy") for folder in (clustered, tmp_path / "again"))
        assert np.array_equal(one, other)


def test_patches_are_those_of_the_codes(world):
    model, _ = load_tokenizer(world.tokenizer)
    patches_VHWC = tool.patches(model)
    assert patches_VHWC.shape == (32, 4, 4, 3) and patches_VHWC.dtype == np.uint8
    image_3HW = model.decode(torch.full((1, 64), 5))[0, :, 16:20, 16:20]
    difference = image_3HW.permute(1, 2, 0).numpy() * 255 - patches_VHWC[5]
    assert abs(difference).max() < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster_size": 5}, "--cluster-size to divide the 32 codes.*got 5"),
        ({"cluster_size": 64}, "--cluster-size to divide the 32 codes.*got 64"),
        ({"out": "codes"}, "would overwrite --codes"),
        ({"codes": "nowhere"}, "extract_latent_codes"),
    ],
)
def test_tool_refuses_before_writing(world, tmp_path, changes, message):
    where = {"codes": world.codes, "nowhere": tmp_path / "nowhere"}
    changes = {key: where.get(value, value) for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        tool.main(tool_config(world, **{"out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists() and not (world.codes / "tokenizer.pth").exists()


def test_tool_refuses_codes_of_another_tokenizer(world, tmp_path):
    model, about = load_tokenizer(world.tokenizer)
    save_tokenizer(tmp_path / "other.pth", model, about | {"producer": "another"})
    with pytest.raises(InputError, match="another tokenizer than.*extract_latent_codes"):
        tool.main(tool_config(world, tmp_path / "out", tokenizer=tmp_path / "other.pth"))
    assert not (tmp_path / "out").exists()


def test_training_with_clusters_resumes_and_learns_something_else(
    world, clustered, tmp_path, monkeypatch
):
    here, small = replace(world, codes=clustered), {"steps": 2, "eval_every": 1}
    whole = config(here, tmp_path / "whole", cluster_weight=0.5, **small)
    stage.main(whole)
    rows = [json.loads(row) for row in (whole.out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert 0 < row["cluster_bits"] < row["train_bits"]
    assert rows[0]["train_bits"] == pytest.approx(math.log2(32))  # plain bits, the term left out
    assert rows[0]["cluster_bits"] == pytest.approx(math.log2(8))

    train_step, taken = stage.train_step, []

    def cut_at_step_1(*args):
        taken.append(args[-1])
        if len(taken) == 2:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(stage, "train_step", cut_at_step_1)
    with pytest.raises(KeyboardInterrupt):
        stage.main(replace(whole, out=tmp_path / "cut"))
    stage.main(replace(whole, out=tmp_path / "cut"))
    assert taken == [0, 1, 1]
    assert same(results(whole.out), results(tmp_path / "cut"))

    plain = config(here, tmp_path / "plain", **small)
    stage.main(plain)
    assert "cluster_bits" not in results(plain.out)["rows"][-1]
    assert not same(results(whole.out)["weights"], results(plain.out)["weights"])
    with pytest.raises(InputError, match=r"cluster_weight 0\.5 -> 0\.0"):
        stage.main(replace(plain, out=whole.out))


def test_cluster_weight_needs_clusters(world, tmp_path):
    with pytest.raises(InputError, match=r"tools/cluster_codebook.py --codes .*--out as --codes"):
        stage.main(config(world, tmp_path / "run", cluster_weight=1.0))
    assert not (tmp_path / "run").exists()
