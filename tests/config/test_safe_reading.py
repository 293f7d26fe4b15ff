"""JSON and YAML that is broken or hostile is refused before it takes time or memory."""

import json

import pytest
import yaml
from hostile import HOSTILE

from hf_prune.config.safe_json import DEEPEST, parse_json, read_json
from hf_prune.config.safe_yaml import LimitedLoader


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_error_before_anything_is_made_of_it(name):
    text, words = HOSTILE[name]
    with pytest.raises(yaml.MarkedYAMLError) as error:
        yaml.load(text, LimitedLoader)
    assert words in error.value.problem
    assert error.value.problem_mark is not None
    assert len(error.value.problem.splitlines()) == 1


def test_yaml_within_the_limits_is_what_pyyaml_reads():
    text = "a: &a {b: [1, 2.5, x, 2001-01-02]}\nc: {<<: *a, d: *a}\ne: !!set {f, g}\nh: 1" + "0" * 300 + "\n"
    text += "i: " + "[" * (DEEPEST - 2) + "]" * (DEEPEST - 2)
    assert yaml.load(text, LimitedLoader) == yaml.safe_load(text)
    aliases = "a: &a x\nb: [" + "*a, " * 5000 + "]"
    assert len(yaml.load(aliases, LimitedLoader)["b"]) == 5000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "at most 100 levels of nesting"),
        ("[" * 101 + "]" * 101, "at most 100 levels of nesting"),
        ('{"a":' * 500 + "1" + "}" * 500, "at most 100 levels of nesting"),
        ("9" * 5000, "expected whole numbers up to 1e+308, got one of 5000 digits"),
        ("-1" + "0" * 309, "got one of 310 digits"),
        ("[1e999]", "expected finite numbers, got 1e999"),
        ("[NaN]", "expected finite numbers, got NaN"),
        ('{"a": -Infinity}', "expected finite numbers, got -Infinity"),
        ('{"a": ["\\ud800"]}', "surrogates not allowed"),
        ("{", "line 1 column 2"),
    ],
)
def test_hostile_json_is_one_error(text, words):
    with pytest.raises(ValueError, match=words.replace("+", r"\+")) as error:
        parse_json(text)
    assert len(str(error.value).splitlines()) == 1


def test_json_within_the_limits_is_what_python_reads():
    text = '{"a": [1, -2, 2.5, 1e300, "x", null, true, {}], "b": ' + "[" * 98 + "]" * 98 + "}"
    assert parse_json(text) == json.loads(text)
    assert parse_json("[NaN, 1e999]", finite=False)[1] == float("inf")


def test_a_json_file_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="it is a folder"):
        read_json(tmp_path)
    (tmp_path / "a.json").write_bytes(b'"\xe9"')
    with pytest.raises(ValueError, match="utf-8"):
        read_json(tmp_path / "a.json")
