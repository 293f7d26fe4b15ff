"""Where the parts of a page's pictures are: reliability pictures, and the bars of drift by depth."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..publish.explanation import Bin, Calibration, Drift
from ..publish.explanation_words import as_share, number, percent
from .page_rows import scale_of

_LEFT, _RIGHT, _TOP, _BOTTOM, _COUNTS, _WIDTH, _HEIGHT = 44, 310, 8, 206, 46, 320, 296


@dataclass(frozen=True)
class Bar:
    """The samples of a bin: the bar of its accuracy, where its mean confidence is, and how many they are."""

    x: float
    width: float
    y: float
    height: float
    at: float
    ideal: float
    count_y: float
    count_height: float
    told: str


@dataclass(frozen=True)
class Reliability:
    """A reliability picture, in units of its own `width` and `height`; `across` and `up` are (place, text) of ticks."""

    bars: list[Bar]
    bins: list[Bin]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    diagonal: tuple[float, float, float, float]
    error: str
    told: str
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM
    width: int = _WIDTH
    height: int = _HEIGHT


def lowest_confidence(calibrations: Sequence[Calibration]) -> float:
    """Where pictures of several models begin: at a tenth below every confidence, for they have the same axes."""
    lows = [one.low for calibration in calibrations for one in calibration.bins if one.samples]
    return int(10 * min(lows, default=0.0) + 1e-9) / 10 if min(lows, default=0.0) < 0.95 else 0.9


def reliability(calibration: Calibration, lowest: float, name: str) -> Reliability:
    """The picture of a model's calibration: confidence across from `lowest` to 1, accuracy up from 0 to 1."""

    def x(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (value - lowest) / (1 - lowest), 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value, 1)

    most = max((one.samples for one in calibration.bins), default=0)
    bars = []
    for one in calibration.bins:
        if not one.samples:
            continue
        left, tall = x(max(one.low, lowest)), round(_COUNTS * one.samples / most, 1)
        told = f"{one.samples:,} samples: mean confidence {percent(one.confidence)}, {percent(one.accuracy)} right"
        bars.append(
            Bar(
                x=left + 0.5,
                width=round(x(one.high) - left - 1, 1),
                y=y(one.accuracy),
                height=round(_BOTTOM - y(one.accuracy), 1),
                at=x(one.confidence),
                ideal=y(one.confidence),
                count_y=round(_HEIGHT - 18 - tall, 1),
                count_height=tall,
                told=told,
            )
        )
    step = 0.1 if 1 - lowest <= 0.6 else 0.2
    marks = [round(lowest + place * step, 1) for place in range(round((1 - lowest) / step) + 1)]
    error = as_share(calibration.error)
    return Reliability(
        bars=bars,
        bins=list(calibration.bins),
        across=[(x(mark), f"{mark:.0%}") for mark in marks if mark <= 1],
        up=[(y(mark / 4), f"{mark / 4:.0%}") for mark in range(5)],
        diagonal=(x(lowest), y(lowest), x(1.0), y(1.0)),
        error=error,
        told=f"Share answered right by confidence, {name} model; expected calibration error {error}",
    )


@dataclass(frozen=True)
class DriftBars:
    """Bars of how far hidden states moved: (layer, figure, width in percent or None where the layer is gone)."""

    words: str
    rows: list[tuple[str, str, float | None]]
    ticks: list[tuple[float, str]]


_MEASURES = {
    "distance": "the mean of |pruned − dense|² / |dense|², 0 where nothing changed",
    "cka": "1 − linear CKA, 0 where both spaces are alike up to rotation and scale",
}


def drift_bars(drift: Sequence[Drift]) -> DriftBars | None:
    """The drift by depth; None where nothing was measured."""
    moved = [one.moved for one in drift if one.moved is not None]
    if not moved:
        return None
    measures = dict.fromkeys(one.by for one in drift if one.moved is not None)
    scale = scale_of([0.0, *moved], as_percent=False)
    rows: list[tuple[str, str, float | None]] = []
    for one in drift:
        if one.moved is None:
            rows.append((str(one.layer), "layer removed", None))
        else:
            rows.append((str(one.layer), number(one.moved), _share(one.moved, scale.high)))
    farthest = max((one for one in drift if one.moved is not None), key=lambda one: one.moved or 0.0)
    how = " or, where their widths differ, ".join(_MEASURES[one] for one in measures)
    words = (
        "How far the hidden states of the pruned model are from those of the dense one, after each layer of the dense "
        f"model: {how}. The largest distance is {number(farthest.moved or 0.0)}, after layer {farthest.layer}."
    )
    ticks = [(tick, text) for tick, text in _ticks(scale.high)]
    return DriftBars(words, rows, ticks)


def _share(value: float, high: float) -> float:
    return round(100 * max(value, 0.0) / high, 2) if high > 0 else 0.0


def _ticks(high: float) -> list[tuple[float, str]]:
    return [(100 * share, f"{share * high:.3g}") for share in (0.0, 0.5, 1.0)]
