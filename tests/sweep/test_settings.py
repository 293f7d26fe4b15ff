"""What is swept, from `KEY=VALUE` of the command line, and the names of points."""

import json
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.errors import RecipeError
from hf_prune.sweep.plan import name_of
from hf_prune.sweep.settings import Range, Values, parse_settings, split_values


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.5,0.7", ["0.5", "0.7"]),
        ("0.5, 0.7 ,0.9", ["0.5", "0.7", "0.9"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("{a: 1, b: [2, 3]},null", ["{a: 1, b: [2, 3]}", "null"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("['a]',b],c", ["['a]',b]", "c"]),
        ("don't,do", ["don't", "do"]),
        ("one", ["one"]),
        ("", [""]),
    ],
)
def test_commas_within_brackets_and_quotes_separate_nothing(text, parts):
    assert split_values(text) == parts


VALUES = st.recursive(
    st.integers(-99, 99) | st.booleans() | st.text("ab,[]'\"{}:\\ #", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=2),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=4))
def test_values_that_are_written_in_yaml_come_back(values):
    texts = [json.dumps(value) for value in values]
    assert [yaml.safe_load(text) for text in split_values(",".join(texts))] == values


def test_what_has_one_value_is_fixed_and_the_rest_is_swept_in_order():
    fixed, swept = parse_settings(
        [
            "training.seed=1",
            "pruning.sparsity=0.5,0.7",
            "pruning.targets=[a,b]",
            "training.learning_rate=1e-5..1e-3:log",
            "training.max_steps=10..20",
        ]
    )
    assert fixed == ["training.seed=1", "pruning.targets=[a,b]"]
    assert swept == [
        Values("pruning.sparsity", ("0.5", "0.7")),
        Range("training.learning_rate", 1e-5, 1e-3, is_whole=False, log=True),
        Range("training.max_steps", 10, 20, is_whole=True, log=False),
    ]
    assert list(map(str, swept)) == [
        "pruning.sparsity=0.5,0.7",
        "training.learning_rate=1e-05..0.001:log",
        "training.max_steps=10..20",
    ]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["sparsity"], "expected KEY=VALUE, or KEY=VALUE,VALUE"),
        (["=1,2"], "expected KEY=VALUE, or KEY=VALUE,VALUE"),
        (["a=1,,2"], "a: expected a value before and after each comma, got '1,,2'"),
        (["a=1,2,"], "a: expected a value before and after each comma"),
        (["a=1,2", "a=3,4"], "a: is set more than once"),
        (["a=2..1"], "a: expected LOW..HIGH with LOW below HIGH, got '2..1'"),
        (["a=0..1:log"], "a: expected bounds above 0 for :log"),
        (["output_dir=x,y"], "output_dir: must not be swept"),
    ],
)
def test_what_is_written_wrongly_is_refused(overrides, problem):
    with pytest.raises(RecipeError, match=f"^command line: {re.escape(problem)}"):
        parse_settings(overrides)


def test_points_are_named_by_their_settings():
    assert name_of({"pruning.sparsity": "0.5", "pruning.method": "wanda"}) == "sparsity=0.5,method=wanda"
    assert name_of({"pruning.0.sparsity": "0.5", "pruning.1.sparsity": "0.7"}) == (
        "pruning.0.sparsity=0.5,pruning.1.sparsity=0.7"
    )


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), min_size=2, max_size=6, unique=True))
def test_names_of_different_settings_differ_and_are_safe_as_folders(texts):
    names = [name_of({"pruning.targets": text}) for text in texts]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_.,=+-]{1,90}", name) for name in names)
