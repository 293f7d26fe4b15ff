"""YAML that takes long, much memory or many calls without limits, or that PyYAML ends in other errors than its own."""

from itertools import pairwise


def bomb(value="[x, x, x, x, x, x, x, x, x]", row="{name}: &{name} [{nine}]\n"):
    """Nine values, repeated nine times at each of eight levels: hundreds of millions."""
    rows = [row.format(name=name, nine=", ".join([f"*{inner}"] * 9)) for inner, name in pairwise("abcdefghi")]
    return f"a: &a {value}\n{''.join(rows)}"


REPEATED = "found aliases that repeat more than 100,000 values"
HOSTILE = {
    "aliases": (bomb(), REPEATED),
    "merges": (
        bomb("{x: 1}", "{name}: &{name} {{<<: [{nine}]}}\n"),
        "found aliases that repeat more than 100,000 values",
    ),
    "itself": ("a: &a [*a]\ntask: *a\n", "found a value that contains itself"),
    "itself below": ("a: &a {b: [{c: *a}]}\n", "found a value that contains itself"),
    "a long integer": ("seed: " + "9" * 5000, "which cannot be read as int"),
    "an integer beyond floats": ("seed: 1" + "0" * 309, "which cannot be read as int"),
    "deep lists": ("a: " + "[" * 5000 + "]" * 5000, "found more than 100 levels of nesting"),
    "deep mappings": ("{a: " * 5000, "found more than 100 levels of nesting"),
    "deep blocks": ("- " * 5000, "found more than 100 levels of nesting"),
    "a list as a key": ("? [a, b]\n: 1\n", "found a list or a mapping as a key, which must be a name"),
    "an alias of a list as a key": ("a: &a [1]\n? *a\n: 2\n", "found a list or a mapping as a key"),
    "a date that is none": ("a: 2001-13-45", "found '2001-13-45', which cannot be read as timestamp"),
    "a tag that does not fit": ("a: !!int x", "found 'x', which cannot be read as int"),
    "a boolean that is none": ("a: !!bool x", "found 'x', which cannot be read as bool"),
    "sexagesimals": ("a: 1" + ":59" * 3000, "which cannot be read as int"),
}
