import dataclasses
import json
import re

import numpy as np
import pytest
import references
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bert
from transformers import HfArgumentParser, TrainingArguments

from hf_prune import Pruner
from hf_prune.config.arguments import PruningArguments
from hf_prune.config.pruning import CONFIG_NAME, FORMAT_VERSION, PruningConfig, load_configs, save_configs
from hf_prune.errors import ArgumentError, PruningConfigError, nearest
from hf_prune.methods.patterns import BLOCK_NORMS, Pattern
from hf_prune.methods.schedules import SCHEDULES
from hf_prune.methods.scopes import SCOPES
from hf_prune.methods.table import method_names

quick = settings(max_examples=40, deadline=None, derandomize=True)

FIELDS = [entry.name for entry in dataclasses.fields(PruningConfig)]


def problems_of(**values):
    with pytest.raises(PruningConfigError) as caught:
        PruningConfig(**values)
    lines = str(caught.value).splitlines()
    assert lines == [f"{field}: {message}" for field, message in caught.value.problems]
    return lines


@st.composite
def valid_configs(draw, with_no_end=True):
    """Any configuration that can be made."""
    shares = st.integers(0, 99).map(lambda part: part / 100)
    expressions = st.sampled_from([r".*\.weight", r"layers\.[0-3]\..*", "a", "é.*", "'quoted \"twice\"'"])
    begin, end = sorted(draw(st.tuples(shares, shares))) if draw(st.booleans()) else (5, draw(st.integers(5, 10**6)))
    values = {
        "schedule": draw(st.sampled_from(list(SCHEDULES))),
        "begin": begin,
        "end": draw(st.none() | st.just(end)) if with_no_end else end,
        "frequency": draw(st.sampled_from([0.01, 0.25, 1, 7.0])),
        "block_norm": draw(st.sampled_from(BLOCK_NORMS)),
        "targets": draw(st.none() | st.lists(expressions, min_size=1, max_size=3)),
        "exclude": draw(st.lists(expressions, max_size=3)),
        "pruning_seed": draw(st.integers(0, 2**64)),
    }
    values["shared_values"] = draw(st.none() | st.integers(2, 256) | st.sampled_from(["int8", "int4"]))
    if values["shared_values"] is not None:
        granularities = st.sampled_from([None, "tensor", "row", "rows:8", "group:32"])
        values["shared_values_granularity"] = draw(granularities)
    if isinstance(values["shared_values"], int):
        values["initial_shared_values"] = draw(st.none() | st.integers(values["shared_values"], 256))
    kind = draw(st.sampled_from(["keep", "n:m", "block", "unstructured"]))
    if kind == "keep":
        return PruningConfig(method="keep", **values)
    values["method"] = draw(st.sampled_from(["magnitude", "random"]))
    if kind == "n:m":
        return PruningConfig(pattern=draw(st.sampled_from(["1:4", "2:4", "4:8", "1:3"])), **values)
    initial, sparsity = sorted(draw(st.tuples(shares, shares)))
    values["sparsity"] = draw(st.sampled_from([sparsity, 0.999999]))
    values["initial_sparsity"] = draw(st.none() | st.just(initial))
    values["overrides"] = draw(st.none() | st.dictionaries(expressions, shares, min_size=1))
    values["scope"] = draw(st.sampled_from(list(SCOPES)))
    values["pattern"] = "block:4x1" if kind == "block" else "unstructured"
    return PruningConfig(**values)


# ---- What is allowed ----


def test_defaults_are_those_that_the_docstring_gives_reasons_for():
    config = PruningConfig(sparsity=0.8)
    assert config.to_dict() == {
        "method": "magnitude",
        "sparsity": 0.8,
        "initial_sparsity": None,
        "schedule": "cubic",
        "begin": 0.1,
        "end": 0.5,
        "frequency": 0.01,
        "scope": "layer",
        "pattern": "unstructured",
        "block_norm": "l2",
        "targets": None,
        "exclude": [],
        "overrides": None,
        "penalty": None,
        "penalty_weight": None,
        "pruning_seed": 0,
        "adapters": None,
        "structure": None,
        "reconstruction": None,
        "round_to": None,
        "shared_values": None,
        "initial_shared_values": None,
        "shared_values_granularity": None,
        "target_speedup": None,
        "target_parameters": None,
        "target_latency": None,
        "target_batch_size": None,
        "target_length": None,
    }
    for name, value in config.to_dict().items():
        assert re.search(rf"^        {name}: ", PruningConfig.__doc__, re.MULTILINE), name
        if isinstance(value, float) and name != "sparsity":
            assert f"Default {value}: " in PruningConfig.__doc__, name


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("method", [method for method in method_names() if method != "keep"]),
        ("schedule", SCHEDULES),
        ("scope", SCOPES),
        ("block_norm", BLOCK_NORMS),
        ("pattern", ["unstructured", "block:16x16"]),
        ("sparsity", [0, 0.0, 0.5, 0.999999]),
        ("initial_sparsity", [None, 0, 0.25, 0.8]),
        ("begin", [0, 0.0, 0.999, 1, 7.0]),
        ("end", [None, 0.1, 0.999]),
        ("frequency", [0.001, 1, 10**6]),
        ("targets", [None, [], ["a"], ("a", "b")]),
        ("exclude", [[], ["a"], ("a",)]),
        ("overrides", [None, {}, {"a": 0}, '{"a": 0.5}', "{}", "null"]),
        ("pruning_seed", [0, -1, 2**70]),
        ("shared_values", [None, 2, 16, 256, "int8", "int4"]),
    ],
)
def test_every_allowed_value_of_every_field_is_taken(field, values):
    for value in values:
        others = {"end": None} if field == "begin" else {}
        PruningConfig(**{"sparsity": 0.8, **others, field: value})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *[("method", value, ["magnitude", "random", "keep"]) for value in ("magnitud", "", None, 3)],
        *[("schedule", value, list(SCHEDULES)) for value in ("cubik", "", None, 3)],
        *[("scope", value, ["layer", "global", "erk"]) for value in ("globl", "", None, 3)],
        *[("block_norm", value, ["l1", "l2"]) for value in ("l3", "", None, 2)],
        *[("pattern", value, ["unstructured", "2:4", "block:4x1"]) for value in ("2/4", "4:2", "block:0x4", "")],
        *[("pattern", value, ["unstructured", "2:4"]) for value in (None, 24, ["2:4"])],
        *[("sparsity", value, ["0 <= s < 1"]) for value in (1.0, 1, 80, -0.1, "0.5", True, float("nan"), float("inf"))],
        ("sparsity", None, ["0 <= s < 1"]),
        *[("initial_sparsity", value, ["0 <= s < 1"]) for value in (1.0, -0.1, "0.5", False, float("nan"))],
        ("initial_sparsity", 0.9, ["at most sparsity", "0.8"]),
        *[("begin", value, ["whole number", "0 <= x < 1"]) for value in (-1, -0.1, 1.5, "2", None, True, float("inf"))],
        *[("end", value, ["whole number", "0 <= x < 1"]) for value in (-1, -0.1, 1.5, "2", True, float("nan"))],
        *[("frequency", value, ["whole number", "0 < x < 1"]) for value in (0, 0.0, -1, 1.5, "2", None, True)],
        *[("targets", value, ["list of regular expressions"]) for value in ("a", 3, {"a": 1})],
        *[("exclude", value, ["list of regular expressions"]) for value in ("a", 3, None)],
        *[("overrides", value, ["mapping", "expression -> sparsity"]) for value in (["a"], 3, 0.5)],
        *[("pruning_seed", value, ["whole number"]) for value in (1.0, "1", None, True)],
        *[("shared_values", value, ["whole number from 2 to 256"]) for value in (1, 0, 257, 16.0, "1", "int2", True)],
    ],
)
def test_a_wrong_value_is_refused_by_field_value_and_what_is_allowed(field, value, allowed):
    [problem] = problems_of(**{"sparsity": 0.8, field: value})
    assert problem.startswith(f"{field}: expected ")
    assert f"got {value!r}" in problem
    assert all(words in problem for words in allowed)


@pytest.mark.parametrize("field", ["method", "schedule", "scope", "block_norm", "pattern"])
@pytest.mark.parametrize("value", [["cubic"], {"name": "cubic"}], ids=["list", "mapping"])
def test_a_list_or_mapping_where_a_name_belongs_is_refused_too(field, value):
    [problem] = problems_of(**{"sparsity": 0.8, field: value})
    assert problem.startswith(f"{field}: expected ")
    assert repr(value) in problem


@pytest.mark.parametrize("field", ["targets", "exclude"])
def test_an_expression_that_does_not_compile_is_refused(field):
    [problem] = problems_of(**{"sparsity": 0.8, field: ["a", "(b"]})
    assert problem.startswith(f"{field}: expected a regular expression, got '(b'")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(" * 3000 + ")" * 3000, "(it has too many levels of groups)"),
        ("a{99999999999999999999}", "too large)"),
        ("a" * 10_001, "(it has more than 10,000 characters)"),
    ],
)
def test_expressions_beyond_what_re_can_hold_are_problems(text, why):
    assert problems_of(sparsity=0.5, exclude=[text])[0].endswith(why)


def test_expressions_that_take_long_to_compile_are_one_problem():
    slow = [r"(?i:[\0-\U0010ffff])" * 50 + str(number) for number in range(10_000)]
    [problem] = problems_of(sparsity=0.5, exclude=slow)
    assert problem == "exclude: expected regular expressions that are ready within 2 seconds, got slower ones"


@pytest.mark.parametrize("field", ["targets", "exclude", "overrides"])
@pytest.mark.parametrize("expression", [3, None, b"a", re.compile("a")], ids=["int", "none", "bytes", "compiled"])
def test_an_expression_that_is_no_string_is_refused(field, expression):
    value = {expression: 0.5} if field == "overrides" else [expression]
    [problem] = problems_of(**{"sparsity": 0.8, field: value})
    assert problem.startswith(f"{field}: expected ")
    assert repr(expression) in problem


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"a": 1.0}, ["0 <= s < 1", "'a'", "got 1.0"]),
        ({"a": "0.5"}, ["0 <= s < 1", "'a'", "got '0.5'"]),
        ({"a": None}, ["0 <= s < 1", "'a'", "got None"]),
        ({"(a": 0.5}, ["a regular expression", "'(a'"]),
        ("{a: 0.5}", ["a JSON object", "'{a: 0.5}'"]),
        ("", ["a JSON object", "''"]),
        ("[1]", ["a mapping", "[1]"]),
        ("0.5", ["a mapping", "0.5"]),
        ('"a"', ["'a'"]),
        ('""', ["''"]),
    ],
)
def test_overrides_are_checked_inside(overrides, parts):
    [problem] = problems_of(sparsity=0.8, overrides=overrides)
    assert problem.startswith("overrides: expected ")
    assert all(part in problem for part in parts)


@pytest.mark.parametrize("target", [{"target_speedup": 3}, {"target_parameters": 0.5}, {"target_latency": 2.5}])
def test_a_target_needs_no_sparsity_and_is_reached_with_taylor(target):
    config = PruningConfig(**target)
    assert config.method == "taylor"
    assert config.has_target
    assert PruningConfig.from_dict(config.to_dict()) == config
    structure = config.for_structure("neurons", 0.75)
    assert structure == PruningConfig(structure="neurons", method="taylor", sparsity=0.75)
    assert not PruningConfig(sparsity=0.5).has_target


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"structure": "neurons"}, "structure"),
        ({"sparsity": 0.5}, "sparsity"),
        ({"initial_sparsity": 0.5}, "initial_sparsity"),
        ({"targets": ["a"]}, "targets"),
        ({"exclude": ["a"]}, "exclude"),
        ({"scope": "erk"}, "scope"),
        ({"overrides": {"a": 0.5}}, "overrides"),
        ({"pattern": "block:4x1"}, "pattern"),
        ({"method": "movement"}, "method"),
        ({"method": "keep"}, "method"),
        ({"adapters": "sparse_base"}, "adapters"),
        ({"target_parameters": 0.5}, "target_parameters"),
        ({"shared_values": 16}, "shared_values"),
    ],
)
def test_what_a_target_finds_cannot_be_said_beside_it(other, named):
    problems = problems_of(target_speedup=3, **other)
    assert {problem.split(":")[0] for problem in problems} == {named}


@pytest.mark.parametrize("adapters", ["sparse_base", "sparse_merge"])
def test_weights_that_are_saved_without_adapters_share_no_values(adapters):
    [problem] = problems_of(sparsity=0.5, shared_values=4, adapters=adapters)
    assert problem == f"shared_values: must not be set with adapters={adapters!r}, got 4"
    assert PruningConfig(sparsity=0.5, shared_values=4, adapters="sparse_adapters").shared_values == 4


def test_a_target_with_numbers_for_each_layer_becomes_shares_of_layers():
    config = PruningConfig(target_speedup=3, target_length=64, scope="global")
    overrides = {r"layer\.0\..*": 0.5}
    assert config.for_structure("heads", 0.25, overrides=overrides) == PruningConfig(
        structure="heads", method="taylor", sparsity=0.25, overrides=overrides
    )


def test_a_batch_size_and_a_length_are_those_of_a_target():
    PruningConfig(target_latency=2, target_batch_size=8, target_length=64)
    problems = problems_of(sparsity=0.5, target_batch_size=8, target_length=64)
    assert [problem.split(":")[0] for problem in problems] == ["target_batch_size", "target_length"]


def test_all_errors_are_told_at_once():
    wrong = {
        "method": "magnitud",
        "sparsity": 1.5,
        "initial_sparsity": -1,
        "schedule": "cubik",
        "begin": 1.5,
        "end": -1,
        "frequency": 0,
        "scope": "everywhere",
        "pattern": "2/4",
        "block_norm": "l3",
        "targets": "a",
        "exclude": ["("],
        "overrides": {"a": 2},
        "penalty": "l3",
        "penalty_weight": -1,
        "pruning_seed": 0.5,
        "adapters": "sparse",
        "structure": "rows",
        "reconstruction": "least",
        "round_to": 1,
        "target_speedup": 1,
        "target_parameters": -0.5,
        "target_latency": 0,
        "shared_values": 1,
        "initial_shared_values": 1,
        "shared_values_granularity": "column",
        "target_batch_size": 0,
        "target_length": 1.5,
    }
    assert set(wrong) == set(FIELDS)
    problems = problems_of(**wrong)
    assert sorted(problem.split(":")[0] for problem in problems) == sorted(wrong)


def test_a_number_of_parameters_is_whole_or_a_share():
    [problem] = problems_of(target_parameters=1.5)
    assert problem.startswith("target_parameters: expected a whole number of parameters, or a share of the model's")
    for number in (0.5, 1e6):
        assert PruningConfig(target_parameters=number).target_parameters == number


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"begin": 0.8, "end": 0.7}, "end"),
        ({"begin": 100, "end": 99}, "end"),
        ({"begin": 0.2, "end": 0}, "end"),
    ],
)
def test_an_end_before_the_begin_is_refused_where_both_have_one_unit(values, field):
    [problem] = problems_of(sparsity=0.8, **values)
    assert problem.startswith(f"{field}: expected at least begin")
    assert all(f"{value:g}" in problem for value in values.values())


@pytest.mark.parametrize("field", ["sparsity", "initial_sparsity", "begin", "end", "frequency"])
def test_a_number_too_large_for_a_float_is_refused(field):
    with pytest.raises(PruningConfigError) as caught:
        PruningConfig(**{"sparsity": 0.8} | {field: 10**400})
    assert caught.value.problems[0][0] == field


@pytest.mark.parametrize("field", ["method", "schedule", "scope", "pattern", "block_norm", "penalty", "adapters"])
@pytest.mark.parametrize("value", [["l1"], {"l1": 1}, 1])
def test_a_choice_that_is_no_text_is_refused(field, value):
    with pytest.raises(PruningConfigError) as caught:
        PruningConfig(**{"sparsity": 0.8} | {field: value})
    assert caught.value.problems[0][0] == field


def test_one_shot_and_keep_have_no_end():
    assert PruningConfig(sparsity=0.8, schedule="one_shot", begin=0.9).window(100) == (90, 90, 1)
    assert PruningConfig(method="keep", begin=0.9).window(100) == (90, 90, 1)


@pytest.mark.parametrize("scope", ["global", "erk"])
def test_n_of_m_is_refused_over_several_tensors(scope):
    [problem] = problems_of(pattern="2:4", scope=scope)
    assert problem.startswith("scope: expected 'layer'")
    assert "'2:4'" in problem
    assert f"got '{scope}'" in problem


@pytest.mark.parametrize(("pattern", "sparsity"), [("1:4", 0.75), ("2:4", 0.5), ("4:8", 0.5), ("1:3", 2 / 3)])
def test_n_of_m_fixes_the_sparsity(pattern, sparsity):
    assert PruningConfig(pattern=pattern).sparsity == pytest.approx(sparsity)
    assert PruningConfig(pattern=pattern, sparsity=PruningConfig(pattern=pattern).sparsity).pattern == pattern
    [problem] = problems_of(pattern=pattern, sparsity=0.8)
    assert problem.startswith("sparsity: expected ")
    assert str(sparsity) in problem
    assert "got 0.8" in problem
    [problem] = problems_of(pattern=pattern, overrides={"a": 0.5})
    assert problem.startswith("overrides: must not be set")


def test_n_of_m_cannot_start_above_the_sparsity_that_it_fixes():
    assert PruningConfig(pattern="2:4", initial_sparsity=0.25).initial_sparsity == 0.25
    [problem] = problems_of(pattern="2:4", initial_sparsity=0.9)
    assert problem.startswith("initial_sparsity: expected at most sparsity (0.5), got 0.9")


def test_keep_takes_no_sparsities():
    problems = problems_of(method="keep", sparsity=0.5, initial_sparsity=0.1, overrides={"a": 0.5})
    assert [problem.split(":")[0] for problem in problems] == ["sparsity", "initial_sparsity", "overrides"]
    assert all("'keep'" in problem for problem in problems)
    assert PruningConfig(method="keep").sparsity is None


def test_keep_is_the_same_configuration_after_a_round_trip_whatever_the_pattern():
    config = PruningConfig(method="keep", pattern="2:4")
    assert PruningConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("method", "magnitud", "magnitude"),
        ("schedule", "cubick", "cubic"),
        ("schedule", "oneshot", "one_shot"),
        ("scope", "globl", "global"),
        ("block_norm", "l22", "l2"),
    ],
)
def test_the_nearest_name_is_offered(field, value, hint):
    [problem] = problems_of(**{"sparsity": 0.8, field: value})
    assert problem.endswith(f"; did you mean {hint!r}?")


def test_no_name_is_offered_when_none_is_near():
    assert nearest("zzzz", method_names()) == ""
    assert nearest("magnitde", method_names()) == "; did you mean 'magnitude'?"
    [problem] = problems_of(sparsity=0.8, method="zzzz")
    assert "did you mean" not in problem


def test_unknown_fields_are_all_told_with_the_nearest_names():
    with pytest.raises(PruningConfigError) as caught:
        PruningConfig.from_dict({"sparsty": 0.8, "zzzz": 1, "seed": 0})
    assert caught.value.problems[:2] == [
        ("sparsty", "unknown field; did you mean 'sparsity'?"),
        ("zzzz", "unknown field"),
    ]
    assert caught.value.problems[2][0] == "seed"


def test_a_configuration_is_frozen_and_shares_nothing_with_what_it_was_made_from():
    targets, overrides = ["a"], {"a": 0.5}
    config = PruningConfig(sparsity=0.8, targets=targets, overrides=overrides)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.9
    targets.append("b")
    overrides["b"] = 0.1
    config.to_dict()["targets"].append("c")
    config.to_dict()["overrides"]["c"] = 0.1
    assert config.targets == ["a"]
    assert config.overrides == {"a": 0.5}


def test_a_changed_copy_is_checked_again():
    config = PruningConfig(sparsity=0.8)
    assert dataclasses.replace(config, sparsity=0.9).sparsity == 0.9
    with pytest.raises(PruningConfigError, match=r"^sparsity: "):
        dataclasses.replace(config, sparsity=1.9)


def test_whole_numbers_and_floats_are_the_same_configuration():
    whole = PruningConfig(sparsity=0, begin=10, end=20, frequency=2)
    assert whole == PruningConfig(sparsity=0.0, begin=10.0, end=20.0, frequency=2.0)
    assert isinstance(whole.begin, float)


def test_the_pattern_is_read():
    assert PruningConfig(pattern="2:4").parsed_pattern == Pattern("n:m", 2, 4)


# ---- Steps ----


@pytest.mark.parametrize(
    ("values", "total", "expected"),
    [
        ({}, 1000, (100, 500, 10)),
        ({}, 5, (0, 2, 1)),
        ({"begin": 2, "end": 14, "frequency": 2}, 14, (2, 14, 2)),
        ({"begin": 0, "end": None, "frequency": 0.5}, 10, (0, 10, 5)),
        ({"begin": 1, "end": 1}, 10, (1, 1, 1)),
        ({"begin": 3, "end": 0.5}, 10, (3, 5, 1)),
        ({"begin": 0.25, "end": 0.75}, 10, (2, 8, 1)),
        ({"begin": 10, "schedule": "one_shot"}, 10, (10, 10, 1)),
    ],
)
def test_the_window_in_optimizer_steps(values, total, expected):
    assert PruningConfig(sparsity=0.8, **values).window(total) == expected


@quick
@given(config=valid_configs(), total=st.integers(1, 10**6))
def test_the_window_agrees_with_the_reference_or_is_refused(config, total):
    begin = references.steps_of(config.begin, total)
    at_once = config.schedule == "one_shot" or config.method == "keep"
    end = begin if at_once else references.steps_of(config.end, total)
    if begin <= end <= total:
        assert config.window(total) == (begin, end, max(references.steps_of(config.frequency, total), 1))
    else:
        with pytest.raises(PruningConfigError, match=str(total)):
            config.window(total)


@pytest.mark.parametrize(
    ("values", "total", "field", "parts"),
    [
        ({"begin": 2, "end": 15}, 14, "end", ["14", "15"]),
        ({"begin": 2, "end": 1234568}, 1234567, "end", ["1234567", "1234568"]),
        ({"begin": 15, "schedule": "one_shot"}, 14, "begin", ["14", "15"]),
        ({"begin": 0.5, "end": 6}, 14, "end", ["7", "6"]),
        ({"begin": 15, "end": None}, 14, "begin", ["14", "15"]),
        ({"begin": 400}, 14, "begin", ["14", "400"]),
    ],
)
def test_a_window_that_does_not_lie_in_training_is_refused(values, total, field, parts):
    with pytest.raises(PruningConfigError) as caught:
        PruningConfig(sparsity=0.8, **values).window(total)
    [(key, problem)] = caught.value.problems
    assert key == field
    assert all(part in problem for part in parts)


# ---- Round trips ----


@quick
@given(config=valid_configs())
def test_round_trip_through_a_dict(config):
    values = config.to_dict()
    assert list(values) == FIELDS
    assert PruningConfig.from_dict(values) == config
    assert PruningConfig(**json.loads(json.dumps(values))) == config


@quick
@given(config=valid_configs())
def test_round_trip_through_yaml(config):
    assert PruningConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert PruningConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict(), allow_unicode=True))) == config


@quick
@given(config=valid_configs())
def test_round_trip_through_files(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("config") / "made" / "by save"
    config.save_pretrained(directory)
    assert PruningConfig.from_pretrained(directory) == config
    assert PruningConfig.from_pretrained(str(directory)) == config


@quick
@given(config=valid_configs(with_no_end=False))
def test_round_trip_through_the_command_line(config):
    words = []
    for name, value in config.to_dict().items():
        if value is None or value == []:
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += value
        else:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    [parsed] = HfArgumentParser(PruningConfig).parse_args_into_dataclasses(words)
    assert parsed == config


@quick
@given(config=valid_configs())
def test_round_trip_through_the_argument_parser_as_a_dict(config):
    [parsed] = HfArgumentParser(PruningConfig).parse_dict(config.to_dict())
    assert parsed == config


@quick
@given(configs=st.lists(valid_configs(), max_size=3))
def test_round_trip_of_several_configurations_in_one_file(configs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("configs")
    save_configs(configs, directory)
    assert load_configs(directory) == configs
    assert load_configs(str(directory)) == configs


def test_numbers_of_numpy_are_written_as_plain_ones(tmp_path):
    config = PruningConfig(sparsity=np.float64(0.5), begin=np.float64(0.25), overrides={"a": np.float64(0.5)})
    assert yaml.safe_load(yaml.safe_dump(config.to_dict())) == config.to_dict()
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config


def test_the_command_line_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((TrainingArguments, PruningConfig))
    words = ["--output_dir", str(tmp_path), "--seed", "7", "--sparsity", "0.8", "--pruning_seed", "3"]
    words += ["--targets", "a.*", "b", "--exclude", "c", "--overrides", '{"a.*": 0.5}', "--begin", "5", "--end", "0.9"]
    args, config = parser.parse_args_into_dataclasses(words)
    assert args.seed == 7
    assert config == PruningConfig(
        sparsity=0.8,
        pruning_seed=3,
        targets=["a.*", "b"],
        exclude=["c"],
        overrides={"a.*": 0.5},
        begin=5,
        end=0.9,
    )


def test_a_dict_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((TrainingArguments, PruningConfig))
    values = {"output_dir": str(tmp_path), "max_steps": 3, "sparsity": 0.8, "overrides": {"a": 0.5}, "end": None}
    args, config = parser.parse_dict(values)
    assert args.max_steps == 3
    assert config == PruningConfig(sparsity=0.8, overrides={"a": 0.5}, end=None)


def test_no_field_has_the_name_of_a_training_argument():
    assert not set(FIELDS) & {entry.name for entry in dataclasses.fields(TrainingArguments)}


def test_every_field_has_help_on_the_command_line():
    text = HfArgumentParser(PruningConfig).format_help()
    for entry in dataclasses.fields(PruningConfig):
        assert f"--{entry.name}" in text
        assert entry.metadata["help"].split()[0] in text


def test_wrong_values_on_the_command_line_are_all_told():
    with pytest.raises(PruningConfigError) as caught:
        HfArgumentParser(PruningConfig).parse_args_into_dataclasses(["--sparsity", "1.5", "--method", "magnitud"])
    assert [field for field, _ in caught.value.problems] == ["method", "sparsity"]


def parsed(*words):
    [arguments] = HfArgumentParser(PruningArguments).parse_args_into_dataclasses(list(words))
    return arguments


def test_a_script_without_a_sparsity_trains_dense_and_is_told_what_it_does_not_use(caplog):
    assert parsed().config is None
    assert not caplog.records
    assert parsed("--method", "wanda", "--pattern", "block:4x1", "--exclude", "a").config is None
    assert "Training is dense, as no sparsity is set. Not used: method, pattern, exclude." in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        ["--sparsity", "0.8", "--method", "wanda", "--exclude", "a", "--overrides", '{"b": 0.5}'],
        ["--sparsity", "0"],
        ["--pattern", "2:4"],
        ["--method", "keep"],
    ],
)
def test_a_script_that_prunes_gets_the_configuration(words):
    [expected] = HfArgumentParser(PruningConfig).parse_args_into_dataclasses(words)
    assert type(parsed(*words).config) is PruningConfig
    assert parsed(*words).config == expected


@pytest.mark.parametrize("words", [["--sparsity", "1.5"], ["--pattern", "2:x"]])
def test_wrong_values_of_a_script_are_told(words):
    with pytest.raises(PruningConfigError, match=words[0].removeprefix("--")):
        parsed(*words)


def test_arguments_are_no_configuration():
    with pytest.raises(ArgumentError, match=r"config: expected a PruningConfig, got PruningArguments; pass its"):
        Pruner(bert(), PruningArguments())


# ---- Files ----


def test_the_file_says_its_format_version_and_holds_all_fields(tmp_path):
    PruningConfig(sparsity=0.8).save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_NAME).read_text(encoding="utf-8"))
    assert CONFIG_NAME == "pruning_config.json"
    assert content == {"format_version": FORMAT_VERSION, "configs": [PruningConfig(sparsity=0.8).to_dict()]}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        PruningConfig.from_pretrained(tmp_path)


def test_a_file_of_several_configurations_is_not_one(tmp_path):
    save_configs([PruningConfig(sparsity=0.8), PruningConfig(method="keep")], tmp_path)
    with pytest.raises(
        PruningConfigError, match=r"pruning_config\.json: expected one configuration, got 2.*load_confi"
    ):
        PruningConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["expected JSON"]),
        (b'{"format_version": 1, "confi', ["expected JSON"]),
        (b"\xff\xfe{}", []),
        (b'{"format_version": 2, "configs": []}', ["format_version 1", "got 2"]),
        (b'{"format_version": "1", "configs": []}', ["format_version 1", "got '1'"]),
        (b'{"configs": []}', ["format_version 1", "got None"]),
        (b"[]", ["format_version 1"]),
        (b"null", ["format_version 1"]),
        (b'{"format_version": 1}', ["configs"]),
        (b'{"format_version": 1, "configs": null}', ["configs"]),
        (b'{"format_version": 1, "configs": {"sparsity": 0.8}}', ["configs"]),
        (b'{"format_version": 1, "configs": [3]}', []),
        (b'{"format_version": 1, "configs": [{"sparsity": 1.5}]}', ["sparsity: expected 0 <= s < 1, got 1.5"]),
        (b'{"format_version": 1, "configs": [{"sparsty": 0.5}]}', ["did you mean 'sparsity'?"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_its_name(content, words, tmp_path):
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(PruningConfigError) as caught:
        load_configs(tmp_path)
    for line in str(caught.value).splitlines():
        assert line.startswith(f"{tmp_path / CONFIG_NAME}: ")
    assert all(part in str(caught.value) for part in words)


def test_a_share_of_few_steps_begins_after_a_step_for_methods_that_read_one():
    config = PruningConfig(method="wanda", sparsity=0.5, begin=0.02, end=0.6)
    assert config.window(4)[0] == 1
    assert config.window(100)[0] == 2
    with pytest.raises(PruningConfigError, match="begin: expected 1 or more for 'wanda'"):
        PruningConfig(method="wanda", sparsity=0.5, begin=0, end=0.6).window(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "movement"}, "method: expected one of magnitude, random, activation, wanda, taylor, got"),
        (
            {"method": "keep", "sparsity": None},
            "method: expected one of magnitude, random, activation, wanda, taylor, got",
        ),
        (
            {"structure": "experts", "method": "activation"},
            "method: expected one of magnitude, random, taylor, got 'activation'",
        ),
        ({"pattern": "2:4"}, "pattern: expected 'unstructured' with the structure 'neurons', got '2:4'"),
        ({"scope": "erk"}, "scope: expected 'layer' or 'global' with the structure 'neurons', got 'erk'"),
        (
            {"structure": "layers", "scope": "global"},
            "scope: expected 'layer' with the structure 'layers', got 'global'",
        ),
        ({"adapters": "sparse_base"}, "adapters: must not be set with the structure 'neurons', got 'sparse_base'"),
        ({"shared_values": 16}, "shared_values: must not be set with a structure, got 16"),
        (
            {"structure": "layers", "overrides": {"a": 0.5}},
            "overrides: expected None with the structure 'layers', got {'a': 0.5}",
        ),
    ],
)
def test_what_a_structure_cannot_be_pruned_with_is_refused(changes, message):
    problems = problems_of(**{"sparsity": 0.5, "structure": "neurons", **changes})
    assert any(problem.startswith(message) for problem in problems), problems


@pytest.mark.parametrize("structure", ["neurons", "heads"])
def test_shares_of_layers_are_said_by_overrides(structure):
    config = PruningConfig(structure=structure, sparsity=0.5, overrides='{"a": 0.25}')
    assert config.overrides == {"a": 0.25}
    assert PruningConfig.from_dict(config.to_dict()) == config


def test_a_method_of_structures_is_refused_without_one():
    [problem] = problems_of(sparsity=0.5, method="activation")
    assert problem.startswith("method: expected one of magnitude")


def test_a_vocabulary_is_no_structure_and_what_removes_it_is_named():
    with pytest.raises(PruningConfigError, match=r"structure: .* got 'vocabulary'.*hf_prune\.shrink_vocabulary"):
        PruningConfig(structure="vocabulary", sparsity=0.5)
    with pytest.raises(PruningConfigError, match=r"sparsity: expected 0 <= s < 1, got None; or set a target"):
        PruningConfig(structure="neurons")
