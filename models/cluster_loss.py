"""Codes in clusters of equal size, and a loss that asks for the right cluster besides the code.

Paper: Hu et al., "Improving Autoregressive Visual Generation with Cluster-Oriented Token
Prediction" (IAR), arXiv 2501.00880. Code: github.com/sjtuplayer/IAR.

Codes of one cluster look alike, so a code of the right cluster is a small mistake. The codes are
relabelled such that cluster j holds size * j .. size * j + size - 1. With p(cluster) the sum over
its members, cross-entropy splits exactly,

    CE(code) = CE_cluster + CE_within,

so adding weight * CE_cluster (IAR's L_CCE, weight 1) counts the choice of the cluster 1 + weight
times. It goes with every method: nothing but the logits is needed.

Differs from it in: the assignment is made in rounds instead of vector by vector, with the same
outcome; relabellings are permutations from the start, never found again by comparing vectors (which
fails for two equal codes); the order inside a cluster is the one the codes had: neither the loss
nor a network that learns its embeddings makes use of it.
"""

import torch
import torch.nn.functional as F

from models.command import InputError


def balanced_kmeans(
    vectors_VC: torch.Tensor, clusters: int, seed: int, iterations: int = 100
) -> torch.Tensor:
    """Return cluster_V, int64: V / clusters vectors in each, by k-means on the unit sphere.

    The centres start as random vectors and become the means of their members, until they stay or
    for `iterations`. Runs in float64 on the CPU. Raises InputError unless V is a multiple of
    `clusters`.
    """
    count = len(vectors_VC)
    if not 1 <= clusters <= count or count % clusters:
        raise InputError(f"expected {count} codes to be a multiple of {clusters} clusters")
    unit_VC = F.normalize(vectors_VC.detach().cpu().double(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centre_JC = unit_VC[torch.randperm(count, generator=generator)[:clusters]]
    for _ in range(iterations):
        cluster_V = nearest_with_room(torch.cdist(unit_VC, centre_JC).square(), count // clusters)
        mean_JC = unit_VC[cluster_V.argsort(stable=True)].unflatten(0, (clusters, -1)).mean(1)
        if torch.allclose(mean_JC, centre_JC, rtol=1e-5, atol=1e-8):
            break
        centre_JC = mean_JC
    return cluster_V


def nearest_with_room(distance_VJ: torch.Tensor, room: int) -> torch.Tensor:
    """Return cluster_V: as if the vectors came in line and took the nearest cluster with room.

    Who is nearest to any cluster comes first. Instead of one by one, in rounds: all ask for the
    nearest cluster that has not refused them, and each cluster keeps the first `room` in line. As
    all clusters have the same line, the end is the same (deferred acceptance, Gale & Shapley 1962).
    """
    line_V = distance_VJ.amin(1).argsort(stable=True)
    left_VJ = distance_VJ[line_V]  # rows in line; refused pairs become infinite
    place_V = torch.arange(len(left_VJ))
    cluster_V = left_VJ.argmin(1)
    while True:
        member_V = cluster_V.argsort(stable=True)  # cluster by cluster, in line inside each
        asked_V = cluster_V[member_V]
        refused_V = member_V[place_V - torch.searchsorted(asked_V, asked_V) >= room]
        if len(refused_V) == 0:
            return torch.empty_like(cluster_V).scatter(0, line_V, cluster_V)
        left_VJ[refused_V, cluster_V[refused_V]] = torch.inf
        cluster_V[refused_V] = left_VJ[refused_V].argmin(1)


def spread(vectors_VC: torch.Tensor, cluster_V: torch.Tensor) -> float:
    """Return the mean distance, on the unit sphere, from a code to the others of its cluster."""
    clusters = int(cluster_V.max()) + 1
    unit_VC = F.normalize(vectors_VC.detach().cpu().double(), dim=1)
    members_JMC = unit_VC[cluster_V.argsort(stable=True)].unflatten(0, (clusters, -1))
    distance_JMM = torch.cdist(members_JMC, members_JMC)
    size = members_JMC.shape[1]
    return (distance_JMM.sum() / (clusters * size * (size - 1))).item()


def relabelling(cluster_V: torch.Tensor) -> torch.Tensor:
    """Return new_of_old_V, a permutation with new // size the cluster, in old order inside each.

    The other way is old_of_new_V = new_of_old_V.argsort().
    """
    return cluster_V.argsort(stable=True).argsort()


def cluster_cross_entropy(
    logits_BSV: torch.Tensor, target_BS: torch.Tensor, size: int
) -> torch.Tensor:
    """Return the mean of -log p(cluster of the target), nats; code v is in cluster v // size.

    The logit of a cluster is the logsumexp of its members', so that its softmax is the sum of
    their probabilities. Raises ValueError unless V is a multiple of `size`.
    """
    if logits_BSV.shape[-1] % size:
        raise ValueError(f"expected V to be a multiple of {size}, got {logits_BSV.shape[-1]}")
    logits_BSJ = logits_BSV.unflatten(-1, (-1, size)).logsumexp(-1)
    return F.cross_entropy(logits_BSJ.flatten(0, 1), target_BS.flatten() // size)
