"""The colours of heat maps: from the colour of a page to blue, so that they differ in lightness alone, for any eye."""

STEPS = 20

# From no zeros to nothing but zeros, on a light and on a dark page.
_LIGHT = ("#f4f6f8", "#a9c8e8", "#4f8fc9", "#1d5a9b", "#0b2f5c")
_DARK = ("#23282e", "#27496b", "#2f74ab", "#6fb1e3", "#d5ebfb")


def step_of(value: float) -> int:
    """The place in the palette of a value between 0 and 1: the ends are for exactly 0 and 1 alone."""
    if value <= 0:
        return 0
    return STEPS if value >= 1 else min(max(round(value * STEPS), 1), STEPS - 1)


def palette(is_dark: bool) -> list[tuple[str, str]]:
    """(background, colour of text on it) for every step; black or white, whichever has the higher contrast."""
    anchors = [_channels(color) for color in (_DARK if is_dark else _LIGHT)]
    colors = []
    for step in range(STEPS + 1):
        place = step / STEPS * (len(anchors) - 1)
        low = min(int(place), len(anchors) - 2)
        mixed = tuple(a + (b - a) * (place - low) for a, b in zip(anchors[low], anchors[low + 1], strict=True))
        text = max(("#000000", "#ffffff"), key=lambda one: contrast(_channels(one), mixed))
        colors.append((_hex(mixed), text))
    return colors


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The contrast of two colours, whose channels are between 0 and 255, as WCAG 2 defines it: 1 to 21."""
    lights = sorted((_luminance(one), _luminance(other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(channels: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (one / 255 for one in channels)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(color: str) -> tuple[float, ...]:
    return tuple(float(int(color[place : place + 2], 16)) for place in (1, 3, 5))


def _hex(channels: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(channel):02x}" for channel in channels)
