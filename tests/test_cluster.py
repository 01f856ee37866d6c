"""IAR: balanced clusters, relabelled codes, and the loss of the cluster."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import other_codes, script

from models.artifacts import load_array, sha256_of
from models.cluster_loss import balanced_kmeans, nearest_with_room, spread
from models.command import InputError
from models.data import load_codes
from models.tokenizer import CODES_OF, decodes, load_tokenizer, save_tokenizer

tool = script("tools/cluster_codebook.py")


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
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


def test_new_codes_decode_to_the_same_images_bit_for_bit(world, clustered):
    old, about = load_tokenizer(world.tokenizer)
    new, header = load_tokenizer(clustered.tokenizer)
    for split in ("train", "test"):
        before, after = load_codes(world.codes, split), load_codes(clustered.codes, split)
        assert torch.equal(before.label_N, after.label_N)
        assert not torch.equal(before.codes_NAT, after.codes_NAT)
        one, other = before.codes_NAT[:16, 1], after.codes_NAT[:16, 1]
        assert torch.equal(old.decode(one), new.decode(other))
        assert after.header["inputs"]["tokenizer"] == header["sha256"] != about["sha256"]
        assert after.header["cluster_size"] == 4
    assert header["inputs"]["train_images"] == about["inputs"]["train_images"]
    assert header["inputs"]["tokenizer"] == about["sha256"]
    assert header["dataset"] == about["dataset"]


def test_codes_of_another_numbering_are_no_longer_those_of_the_tokenizer_before(world, tmp_path):
    """A decoder trained for them decodes its own numbering only."""
    model, head = load_tokenizer(world.tokenizer)
    sha256 = head.pop("sha256")
    save_tokenizer(tmp_path / "decoder.pth", model, head | {CODES_OF: sha256})
    assert decodes(load_tokenizer(tmp_path / "decoder.pth")[1], sha256)
    made_by = sha256_of(tmp_path / "decoder.pth")
    codes = other_codes(world, tmp_path / "codes", tokenizer=made_by)
    tool.main(tool.ClusterConfig(tmp_path / "decoder.pth", codes, tmp_path / "out", 4))
    assert not decodes(load_tokenizer(tmp_path / "out/tokenizer.pth")[1], sha256)


def test_the_whole_codebook_state_is_relabelled(world, clustered):
    """What training would go on from: vectors, running sums, and counts of uses."""
    old, new = (load_tokenizer(path)[0] for path in (world.tokenizer, clustered.tokenizer))
    new_of_old_V, inverse_V = (
        torch.from_numpy(load_array(clustered.codes / f"{name}.npy", name, "", np.int64, 1)[0])
        for name in ("relabelling", "inverse")
    )
    assert torch.equal(new_of_old_V[inverse_V], torch.arange(32))
    moved, after = 0, new.state_dict()
    for name, before in old.state_dict().items():
        if before.ndim > 1 and before.shape[:2] == (1, 32) and name.startswith("quantizer"):
            assert torch.equal(before[:, inverse_V], after[name]), name
            moved += 1
        else:
            assert torch.equal(before, after[name]), name
    assert moved == 3
    assert (clustered.codes / "clusters.png").read_bytes().startswith(b"\x89PNG")
    cluster_V = balanced_kmeans(old.quantizer.codebook_VC, 8, seed=0)
    assert torch.equal(new_of_old_V // 4, cluster_V)  # side by side


def test_tool_refuses_before_writing(world, clustered, tmp_path):
    config = tool.ClusterConfig(world.tokenizer, world.codes, tmp_path / "out", cluster_size=4)
    for changes, message in (
        ({"cluster_size": 5}, "--cluster-size to divide the 32 codes.*got 5"),
        ({"cluster_size": 64}, "--cluster-size to divide the 32 codes.*got 64"),
        ({"codes": tmp_path / "nowhere"}, "extract_latent_codes"),
        ({"tokenizer": clustered.tokenizer}, "another tokenizer than.*extract_latent_codes"),
    ):
        with pytest.raises(InputError, match=message):
            tool.main(replace(config, **changes))
    assert not (tmp_path / "out").exists()
