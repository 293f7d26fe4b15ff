"""Whether processes that hold the same weights have the same masks: only digests of masks are exchanged."""

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from ..engines.holdings import Holding
from ..engines.processes import gather, processes, rank
from ..errors import PruningStateError
from ..saved.masks import digest_of, pack


def compare_replicas(masks: Mapping[str, torch.Tensor], holdings: Mapping[str, Holding]) -> None:
    """Compare the masks of processes that hold the same shards of the tensors; every process must call it.

    For each kind of placement every process sends sixteen bytes: a digest of all masks together, and one of the shards
    that they belong to. Only if these differ is a digest of each tensor sent. Raises PruningStateError, on every
    process, naming the first tensor that differs and the ranks.
    """
    names_of: dict[str, list[str]] = {}
    for name in masks:
        if len(holdings[name].peers) < processes():  # otherwise no two processes hold the same shard
            names_of.setdefault(holdings[name].kind, []).append(name)
    if not names_of:
        return
    digests = {name: digest_of(pack(masks[name]).numpy().tobytes()) for names in names_of.values() for name in names}
    sent = [[_digest_of_parts(names, holdings), _digest_of_all(names, digests)] for names in names_of.values()]
    received = gather(torch.tensor(sent))
    for index, names in enumerate(names_of.values()):
        pairs = [tuple(of_rank[index].tolist()) for of_rank in received]
        if len({part for part, _ in pairs}) < len(set(pairs)):
            _raise_for(names, digests, [part for part, _ in pairs])


def _digest_of_parts(names: Sequence[str], holdings: Mapping[str, Holding]) -> int:
    parts = [(name, holdings[name].region.start, holdings[name].region.size) for name in names]
    return digest_of(json.dumps(parts).encode())


def _digest_of_all(names: Sequence[str], digests: Mapping[str, int]) -> int:
    return digest_of(torch.tensor([digests[name] for name in names]).numpy().tobytes())


def _raise_for(names: Sequence[str], digests: Mapping[str, int], parts: Sequence[int]) -> NoReturn:
    """Find the first of these tensors whose masks differ between ranks with the same shards, and raise."""
    of_each = torch.stack(gather(torch.tensor([digests[name] for name in names])))  # (rank, tensor)
    for index, name in enumerate(names):
        for part in dict.fromkeys(parts):
            ranks = [number for number, other in enumerate(parts) if other == part]
            different = [number for number in ranks if of_each[number, index] != of_each[ranks[0], index]]
            if different:
                raise PruningStateError(_message(name, ranks[0], different))
    raise AssertionError("digests differ together, and none alone")


def _message(name: str, first: int, different: Sequence[int]) -> str:
    others = f"rank{'s' if len(different) > 1 else ''} {', '.join(map(str, different))}"
    return (
        f"{name}: expected the same mask on all processes that hold the same weights, got other masks on {others} than "
        f"on rank {first} (this is rank {rank()}). Their weights differ: look for code that changes weights on some "
        "processes only, such as initialisation with different seeds, or loading different checkpoints."
    )
