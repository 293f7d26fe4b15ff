"""The study that `study.py` writes: tables and pictures of explained models, with what can be said and what not."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hf_prune.publish.explanation import Compared, Estimate, Explanation, Slice

COLORS = {"weights": "#2b6cb5", "neurons": "#b5432b"}

# Points of accuracy beyond which the colour of a slice stays the same.
MOST_SHOWN = 12

INTRODUCTION = """# Study: who is hurt first?

What pruning does to a small classifier, all-MiniLM-L6-v2 on single sentences of film reviews (Rotten Tomatoes), when 50
to 95% of the weights of its layers, or of the neurons of its feed-forward networks, are removed while it is fine-tuned
for {trained}, with the dense model as a teacher (distilled) and with the labels alone. Shares of weights and of neurons
are not the same amount: neurons are two thirds of the weights of a layer. `make study` trains and explains all models,
and writes this page.

Intervals are of 95%, from a bootstrap over the {samples:,} test sentences: they say how far other sentences of the kind
would move a figure, and not how far another training would.{seeds} "Changed" are the answers that differ from the dense
model's, "right to wrong" those of them that it had right.
"""


@dataclass(frozen=True)
class Setting:
    """One pruned model: what is pruned, which share of it, and whether the dense model is its teacher."""

    way: str
    share: float
    distilled: bool
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.way}-{self.share:.0%}-{'distilled' if self.distilled else 'labels'}-{self.seed}"

    @property
    def words(self) -> str:
        """What is done, without the seed."""
        return f"{self.share:.0%} of the {self.way}, {'distilled' if self.distilled else 'labels alone'}"


@dataclass(frozen=True)
class Explained:
    """A pruned model and its explanation, which has its dense model's figures, too."""

    setting: Setting
    explanation: Explanation

    @property
    def accuracy(self) -> Compared:
        """The accuracy of both models."""
        return next(one for one in self.explanation.metrics if one.name == self.explanation.metric)


def write_study(found: Sequence[Explained], epochs: int, path: Path) -> None:
    """Write the study and its pictures, which lie beside it in a folder of its name."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    draw_answers(found, folder / "answers.png")
    draw_slices(found, folder / "slices.png")
    seeds = sorted({one.setting.seed for one in found})
    several = "" if len(seeds) == 1 else f" Each is the mean of {len(seeds)} trainings."
    text = [
        INTRODUCTION.format(
            trained="one more epoch" if epochs == 1 else f"{epochs} more epochs",
            samples=found[0].explanation.samples,
            seeds=several or " There is one training of each.",
        ),
        "## Accuracy and answers\n",
        f"![Accuracy and changed answers over the share that is pruned]({folder.name}/answers.png)\n",
        sentences_about_accuracy(found),
        table_of_answers(found),
        "## Which sentences\n",
        sentences_about_slices(found),
        f"![Change of accuracy on each kind of sentences, for each model]({folder.name}/slices.png)\n",
        table_of_slices(found),
        "## What cannot be said\n",
        CANNOT_BE_SAID,
    ]
    path.write_text("\n".join(text), encoding="utf-8")


CANNOT_BE_SAID = """- Where one label loses about what the other gains, the line between them has moved: the model gives
  one of the answers more often, which is not the same as knowing less. Label 0 is a negative review, label 1 a positive
  one.
- Slices overlap, and differ in more than what names them: long sentences have more negations.
- A slice that is not marked was not shown to be unharmed. Its interval says how much harm would have gone unseen.
- One task, one model, one schedule: nothing here says what a language model or another language loses.
"""


def table_of_answers(found: Sequence[Explained]) -> str:
    """A line for each model: accuracy, its difference from dense, answers that changed, and calibration."""
    columns = ["pruned", "seed", "accuracy", "difference from dense", "changed", "right to wrong", "calibration error"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for one in found:
        answers, accuracy = one.explanation.answers, one.accuracy
        assert accuracy.difference is not None
        assert answers.agreement is not None
        assert answers.to_wrong is not None
        assert answers.calibration is not None
        cells = [
            one.setting.words,
            str(one.setting.seed),
            percent(accuracy.pruned),
            points(accuracy.difference),
            f"{1 - answers.agreement.value:.1%}",
            percent(answers.to_wrong),
            percent(answers.calibration.error),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sentences_about_accuracy(found: Sequence[Explained]) -> str:
    """For each way, with and without a teacher, from which share on the accuracy is below the dense model's."""
    lines = []
    for way in dict.fromkeys(one.setting.way for one in found):
        for distilled in (True, False):
            some = [one for one in found if (one.setting.way, one.setting.distilled) == (way, distilled)]
            lower = [one.setting.share for one in some if is_lower(one.accuracy)]
            name = f"**{way}, {'distilled' if distilled else 'labels alone'}**"
            most = max(one.setting.share for one in some)
            if lower:
                lines.append(f"- {name}: less accurate than the dense model from {min(lower):.0%} on.")
            else:
                lines.append(f"- {name}: no loss of accuracy can be told, up to {most:.0%}.")
    return "A loss counts where the interval of the difference lies below zero.\n\n" + "\n".join(lines) + "\n"


def is_lower(accuracy: Compared) -> bool:
    """Whether the pruned model's accuracy is lower than the dense one's by more than other sentences would explain."""
    return accuracy.difference is not None and accuracy.difference.high is not None and accuracy.difference.high < 0


def sentences_about_slices(found: Sequence[Explained]) -> str:
    """For each way, from which share on which slices are worse than chance explains, and in how many models."""
    lines = []
    for way in dict.fromkeys(one.setting.way for one in found):
        of_way = [one for one in found if one.setting.way == way]
        hurt: dict[str, list[float]] = {}
        for one in of_way:
            for part in one.explanation.slices:
                if part.is_worse:
                    hurt.setdefault(name_of(part), []).append(one.setting.share)
        if not hurt:
            lines.append(f"- **{way}**, none in any of {len(of_way)} models.")
        for share in sorted({min(shares) for shares in hurt.values()}):
            names = [f"{name} ({len(shares)})" for name, shares in hurt.items() if min(shares) == share]
            lines.append(f"- **{way}**, from {share:.0%} on: {', '.join(sorted(names))}.")
    return (
        "Kinds of sentences on which a pruned model is worse than its dense one, where all kinds are tested together "
        "(McNemar's test, Holm's method, 5%), by the smallest share at which that was found; in brackets in how many "
        "models:\n\n" + "\n".join(lines) + "\n"
    )


def table_of_slices(found: Sequence[Explained]) -> str:
    """A line for each kind of sentences: how many, dense accuracy, and the mean differences at each share."""
    shares = sorted({one.setting.share for one in found})
    ways = list(dict.fromkeys(one.setting.way for one in found))
    columns = [(way, share) for way in ways for share in shares]
    header = ["kind of sentences", "sentences", "dense", *(f"{way} {share:.0%}" for way, share in columns)]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for name, compared in slices_of(found[0].explanation).items():
        assert compared.dense is not None
        cells = []
        for way, share in columns:
            some = [one for one in found if (one.setting.way, one.setting.share) == (way, share)]
            changes = [change_of(one, name) for one in some]
            marked = any(part.is_worse for one in some for part in one.explanation.slices if name_of(part) == name)
            cells.append(f"{100 * statistics.mean(changes):+.1f}{'*' if marked else ''}".replace("-", "−"))
        lines.append(f"| {name} | {compared.samples:,} | {compared.dense.value:.1%} | " + " | ".join(cells) + " |")
    note = "Points of accuracy, means of the models distilled and not. *: worse than chance explains in one of them.\n"
    return "\n".join(lines) + "\n\n" + note


def name_of(part: Slice) -> str:
    """What a slice is called."""
    return f"{part.by}: {part.value}"


def slices_of(explanation: Explanation) -> dict[str, Compared]:
    """The slices by name, in the order of the names."""
    return {name_of(part): part.metric for part in sorted(explanation.slices, key=name_of)}


def change_of(one: Explained, name: str) -> float:
    """The difference from dense on a slice."""
    difference = slices_of(one.explanation)[name].difference
    assert difference is not None
    return difference.value


def percent(value: Estimate) -> str:
    """`74.0% (70.1 to 77.6)`."""
    return f"{value.value:.1%} ({100 * (value.low or 0):.1f} to {100 * (value.high or 0):.1f})"


def points(value: Estimate) -> str:
    """`−2.1 points (−4.0 to −0.3)`."""
    ends = f"({100 * (value.low or 0):+.1f} to {100 * (value.high or 0):+.1f})"
    return f"{100 * value.value:+.1f} points {ends}".replace("-", "−")


def draw_answers(found: Sequence[Explained], path: Path) -> None:
    """Accuracy with intervals, and the share of answers that changed, over the share that is pruned."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_lines(found, left, lambda one: one.accuracy.pruned)
    dense = found[0].accuracy.dense
    assert dense is not None
    left.axhline(dense.value, color="#555555", linestyle=":", label="dense")
    left.set_ylabel("accuracy on the test split")
    draw_lines(found, right, lambda one: one.explanation.answers.to_wrong)
    right.set_ylabel("answers from right to wrong")
    for axis in (left, right):
        axis.set_xlabel("share that is pruned")
        axis.set_xticks(sorted({one.setting.share for one in found}))
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_lines(found: Sequence[Explained], axis: Axes, value_of: Callable[[Explained], Estimate | None]) -> None:
    """A line for each way with and without a teacher, with intervals; the first seed."""
    first = found[0].setting.seed
    for way, color in COLORS.items():
        for distilled, style in ((True, "-o"), (False, "--s")):
            aside = 0.004 * (("weights", "neurons").index(way) + (0.5 if distilled else -0.5) - 0.5)
            some = [
                one
                for one in found
                if (one.setting.way, one.setting.distilled, one.setting.seed) == (way, distilled, first)
            ]
            values = [value for value in map(value_of, some) if value is not None]
            shares = [one.setting.share + aside for one in some]
            below = [value.value - (value.low or value.value) for value in values]
            above = [(value.high or value.value) - value.value for value in values]
            label = f"{way}, {'distilled' if distilled else 'labels alone'}"
            axis.errorbar(
                shares,
                [value.value for value in values],
                yerr=(below, above),
                fmt=style,
                color=color,
                markersize=4,
                capsize=2,
                linewidth=1,
                label=label,
            )


def draw_slices(found: Sequence[Explained], path: Path) -> None:
    """A cell for each model and kind of sentences: how many points of accuracy it lost there."""
    names = list(slices_of(found[0].explanation))
    values = [[100 * change_of(one, name) for name in names] for one in found]
    figure = Figure(figsize=(1.5 + 0.55 * len(names), 2 + 0.3 * len(found)), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(values, cmap="RdBu", vmin=-MOST_SHOWN, vmax=MOST_SHOWN, aspect="auto")
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(found)), [one.setting.words for one in found], fontsize=7)
    for row, one in enumerate(found):
        worse = {name_of(part) for part in one.explanation.slices if part.is_worse}
        for column, name in enumerate(names):
            if name in worse:
                axis.text(column, row, "*", ha="center", va="center", fontsize=9, color="black")
    figure.colorbar(image, label="points of accuracy, pruned - dense", extend="both")
    figure.savefig(path, dpi=110, metadata={"Software": None})
