"""Whether processes that hold the same weights have the same masks: a digest of each is compared, no mask is sent."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch

from .distributed import Holding, gather, processes, rank
from .mask_files import PruningStateError, pack


def compare_replicas(masks: Mapping[str, torch.Tensor], holdings: Mapping[str, Holding]) -> None:
    """Compare the masks of processes that hold the same parts of the tensors; every process must call it.

    Sixteen bytes a process are sent: digests of all masks together, and of the parts they are of. Only where they
    differ, one of each tensor is. Raises PruningStateError, on every process, naming the first tensor and the ranks.
    """
    if not masks or all(len(holding.peers) == processes() for holding in holdings.values()):
        return
    parts = _digest(
        json.dumps([(name, holdings[name].region.start, holdings[name].region.size) for name in masks]).encode()
    )
    digests = [_digest(pack(mask).numpy().tobytes()) for mask in masks.values()]
    together = _digest(torch.tensor(digests).numpy().tobytes())
    pairs = [tuple(pair.tolist()) for pair in gather(torch.tensor([parts, together]))]
    if len({part for part, _ in pairs}) == len(set(pairs)):
        return
    of_each = torch.stack(gather(torch.tensor(digests)))  # (rank, tensor)
    for index, name in enumerate(masks):
        for part in dict.fromkeys(part for part, _ in pairs):
            ranks = [number for number, (other, _) in enumerate(pairs) if other == part]
            different = [number for number in ranks if of_each[number, index] != of_each[ranks[0], index]]
            if different:
                raise PruningStateError(_message(name, ranks[0], different))


def _message(name: str, first: int, different: Sequence[int]) -> str:
    others = f"rank{'s' if len(different) > 1 else ''} {', '.join(map(str, different))}"
    return (
        f"{name}: expected the same mask on all processes that hold the same weights, {others} came to another than "
        f"rank {first} (this is rank {rank()}). Their weights differ: look for what changes weights on some processes "
        "only, such as weights that were drawn with different seeds, or another checkpoint."
    )


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
