"""Expressions that take years to match are refused in a moment; others are matched as `re` does."""

import pytest

from hf_prune import TargetError
from hf_prune.model.expressions import refuse_slow

NAMES = [f"model.layers.{index}.self_attn.q_proj.weight" for index in range(200)]


def test_an_expression_that_takes_years_is_named():
    fine, slow = r".*\.(q|k)_proj\..*", "(.|.)+!"
    with pytest.raises(TargetError) as error:
        refuse_slow("x.json", [fine, slow, fine], NAMES)
    assert str(error.value) == (
        "x.json: expected regular expressions that match 200 parameter names within 2 seconds, got '(.|.)+!', which "
        "does not; write it without repetitions inside repetitions"
    )


def test_one_that_takes_long_to_compile_is_refused_and_shown_in_part():
    with pytest.raises(TargetError, match="…'") as error:
        refuse_slow("x.json", [r"(?i:[\0-\U0010ffff])" * 1000], [])
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text", [r".*", r".*attention.*\.weight", "(a|b){3}|(c*)*", "(", "(" * 5000, "a{99999999999}+?", ""]
)
def test_what_takes_no_time_or_is_no_expression_is_left_to_others(text):
    refuse_slow("x.json", [text], NAMES)


def test_many_expressions_and_names_are_matched():
    expressions = [rf".*layers\.{index}\..*(q|k)_proj.*" for index in range(1000)]
    refuse_slow("x.json", expressions, [f"{name}.{'x' * 500}" for name in NAMES])
