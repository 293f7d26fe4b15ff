"""What a language model says of each token of texts: its loss, by token, by position and by text."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ExplainError
from ..foreign.heap import give_back_freed_memory, large_tensors_reused
from ..publish.explanation import Answers, Compared
from ..structure.batches import on_model
from .resampling import Bootstrap, compared, estimate, ratio
from .samples import Reader, Row, asked, batches_of, lengths_of
from .slices import Group, Measured

IGNORED = -100  # where labels of transformers have no token

_LARGEST_EXPONENT = 709.0  # beyond it, exp overflows


@dataclass(frozen=True)
class Tokens:
    """What is known of each token that has a loss, of all texts one after another (arrays of one number a token).

    Attributes:
        text: the index of its text.
        token: its id.
        position: its index in the text; the first token of a text has no loss.
        pruned: its loss, in nats; `dense` is that of the dense model, or None.
        agrees: whether the most probable token is the same for both models (bool), or None.
        divergence: KL(dense || pruned) of what could come there, in nats, or None.
    """

    text: np.ndarray
    token: np.ndarray
    position: np.ndarray
    pruned: np.ndarray
    dense: np.ndarray | None = None
    agrees: np.ndarray | None = None
    divergence: np.ndarray | None = None


def ask_tokens(pruned: Reader, dense: Reader | None, rows: Sequence[Row], batch_size: int) -> Tokens:
    """Ask one model or both about each token of the texts, one batch at a time.

    Of the logits of a batch, those of one text at a time are made probabilities of. Both models get the same tokens.
    What is kept of each text is little and lives long: put where large logits have just been freed, it would leave the
    next ones no place, and memory would grow with each text.
    """
    found: dict[str, list[np.ndarray]] = {}
    with large_tensors_reused(), asked(pruned.model, dense.model if dense is not None else None):
        for indices in batches_of(lengths_of(rows), batch_size):
            batch = pruned.collate([dict(rows[index]) for index in indices])
            targets = _targets(batch)
            logits = [
                reader.model(**on_model(batch, reader.model)).logits for reader in (pruned, dense) if reader is not None
            ]
            for place, index in enumerate(indices):
                positions = (targets[place, 1:] != IGNORED).nonzero().squeeze(1)
                tokens = targets[place, 1:][positions]
                told = _of_text([one[place, :-1] for one in logits], positions, tokens)
                told |= {"text": np.full(len(tokens), index), "token": tokens.numpy()}
                told["position"] = _positions(batch, place, positions)
                for name, values in told.items():
                    found.setdefault(name, []).append(values)
            del logits  # before those of the next batch are there
            give_back_freed_memory()
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    if not all(np.isfinite(whole[name]).all() for name in ("pruned", "dense") if name in whole):
        raise ExplainError("model", "expected finite losses, got NaN or infinite ones; its training may have diverged")
    order = np.lexsort((whole["position"], whole["text"]))
    return Tokens(**{name: values[order] for name, values in whole.items()})


def _targets(batch: Mapping[str, Any]) -> torch.Tensor:
    """The token at each place of a batch; IGNORED for padding and what follows it, and where labels say so."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    tokens = (labels if isinstance(labels, torch.Tensor) else batch["input_ids"]).cpu().clone()
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        tokens[mask.cpu() == 0] = IGNORED
        tokens[:, 1:][mask.cpu()[:, :-1] == 0] = IGNORED
    return tokens


def _positions(batch: Mapping[str, Any], place: int, positions: torch.Tensor) -> np.ndarray:
    """The index in its text of the token after each of these places: padding on the left does not count."""
    mask = batch.get("attention_mask")
    start = int(mask[place].cpu().argmax()) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else 0
    return (positions + 1 - start).numpy()


def _of_text(logits: Sequence[torch.Tensor], positions: torch.Tensor, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Losses of the tokens, and how both models differ there, from the logits (length, vocabulary) of one text."""
    log_probabilities = []
    told = {}
    for name, one in zip(("pruned", "dense"), logits, strict=False):
        chosen = torch.log_softmax(one[positions.to(one.device)].float(), dim=-1)
        at = tokens.to(one.device)[:, None]
        told[name] = -chosen.gather(1, at).squeeze(1).double().cpu().numpy()
        log_probabilities.append(chosen)
    if len(log_probabilities) == 2:
        now, before = log_probabilities[0], log_probabilities[1].to(log_probabilities[0].device)
        told["agrees"] = (now.argmax(1) == before.argmax(1)).cpu().numpy()
        told["divergence"] = (before.exp() * (before - now)).sum(1).double().clamp_min(0).cpu().numpy()
    return told


class AskedTokens:
    """The figures of a language model, or of two, on all texts and on resamples of the texts.

    Texts are what is resampled: the losses of the tokens of one text are not independent.
    """

    def __init__(self, tokens: Tokens, texts: int, bootstrap: Bootstrap):
        self.tokens, self.texts, self.bootstrap = tokens, texts, bootstrap

    def _of_texts(self, values: np.ndarray) -> np.ndarray:
        """The sums of values of tokens in each text."""
        return np.bincount(self.tokens.text, weights=values, minlength=self.texts)

    def _means(self, columns: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The means over tokens, of all texts and of each resample of texts."""
        count = self._of_texts(np.ones(len(self.tokens.text)))
        sums = self.bootstrap.sums(np.stack([count, *map(self._of_texts, columns)], axis=1))
        return [ratio(one, sums[:, 0]) for one in sums.T[1:]]

    def metrics(self) -> list[Compared]:
        """The mean loss of a token, in nats, and perplexity, its `exp`, where that is finite."""
        models = [values for values in (self.tokens.pruned, self.tokens.dense) if values is not None]
        losses, number = self._means(models), len(self.tokens.text)
        found = [compared("loss", number, losses)]
        if max(float(np.nanmax(one)) for one in losses) < _LARGEST_EXPONENT:
            found.append(compared("perplexity", number, [np.exp(one) for one in losses]))
        return found

    def answers(self) -> Answers:
        """How often the most probable token is the same, and how far the distributions are apart."""
        if self.tokens.agrees is None or self.tokens.divergence is None:
            return Answers()
        agreement, divergence = self._means([self.tokens.agrees, self.tokens.divergence])
        return Answers(agreement=estimate(agreement), divergence=estimate(divergence))

    def losses(self) -> list[np.ndarray]:
        """The mean losses, of all texts and of each resample, of the pruned and the dense model."""
        return self._means([values for values in (self.tokens.pruned, self.tokens.dense) if values is not None])

    def measured(self, groups: Sequence[Group], of_tokens: Sequence[Group]) -> list[Measured]:
        """The sums that slices are compared by, of groups of texts and groups of tokens."""
        whole = [Group(one.by, one.value, one.inside[self.tokens.text]) for one in groups]
        return [self._measured(one) for one in (*whole, *of_tokens)]

    def _measured(self, group: Group) -> Measured:
        dense = self.tokens.dense
        return Measured(
            group.by,
            group.value,
            of=self._of_texts(group.inside),
            pruned=self._of_texts(group.inside * self.tokens.pruned),
            dense=self._of_texts(group.inside * dense) if dense is not None else None,
        )

    def groups(self, counts: Mapping[int, int]) -> list[Group]:
        """Groups of tokens: about tenths by how often a token occurs, and positions in a text by powers of two."""
        return [*groups_of_frequency(self.tokens.token, counts), *groups_of_positions(self.tokens.position)]


def count_tokens(rows: Sequence[Row]) -> Counter[int]:
    """How often each token occurs in texts."""
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(row["input_ids"])
    return counts


def groups_of_frequency(tokens: np.ndarray, counts: Mapping[int, int]) -> list[Group]:
    """About tenths of the tokens, by how often each occurs in what was counted; the most frequent ones first."""
    often = np.array([counts.get(int(token), 0) for token in tokens])
    ends = np.unique(np.quantile(often, np.linspace(0.1, 1, 10), method="inverted_cdf"))
    found = []
    for place, high in enumerate(ends):
        inside = (often <= high) & (often > ends[place - 1] if place else True)
        low = int(often[inside].min())
        words = f"seen {low:,} times" if low == high else f"seen {low:,} to {int(high):,} times"
        found.append(Group("token frequency", words, inside))
    return found[::-1]


def groups_of_positions(positions: np.ndarray) -> list[Group]:
    """Tokens by their index in the text: 1, 2 to 3, 4 to 7, and so on."""
    found = []
    for power in range(math.floor(math.log2(max(int(positions.max()), 1))) + 1):
        low, high = 2**power, min(2 ** (power + 1) - 1, int(positions.max()))
        inside = (positions >= low) & (positions <= high)
        found.append(Group("position", f"{low}" if low == high else f"{low} to {high}", inside))
    return found
