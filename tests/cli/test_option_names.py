"""What is set in a recipe, on the command line and in Python has the same name in all of them."""

import dataclasses
import inspect

import pytest
import typer

from hf_prune.cli.commands import app
from hf_prune.compare.comparison import compare_models
from hf_prune.compare.pareto import Limits
from hf_prune.explain.settings import Settings
from hf_prune.recipe.schema import DatasetSection, ExplainSection
from hf_prune.space.settings import make_settings
from hf_prune.sweep.plan import plan_sweep

# What an option gives one of, and what it turns off.
ONE_OF = {"slices": "slice", "expressions": "expression", "examples": "example"}
OFF = {"costs": "without_costs", "perturbations": "without_perturbations"}

# Of a data set, in `hf-prune explain`: its name is that of --data, and its configuration is said to be of the data.
OF_DATA = {"name": "data", "config": "data_config"}


def options_of(command):
    found = typer.main.get_command(app).commands[command].params
    return {name.removeprefix("--").replace("-", "_") for one in found for name in one.opts if name.startswith("--")}


def fields_of(kind):
    return {field.name for field in dataclasses.fields(kind)}


def arguments_of(function):
    return set(inspect.signature(function).parameters)


def test_explain_has_an_option_and_an_argument_for_each_key():
    keys = set(ExplainSection.model_fields)
    assert {ONE_OF.get(key, OFF.get(key, key)) for key in keys} <= options_of("explain")
    assert keys - fields_of(Settings) == {"samples", "slices"}  # a Trainer is given the samples, and slices by value


def test_an_option_for_data_is_called_as_its_key():
    options = options_of("explain")
    of_data = {OF_DATA.get(key, key) for key in DatasetSection.model_fields} & options
    assert of_data == {
        *("data", "data_config", "text_column", "label_column", "where", "max_length"),
        *("test_size", "validation_size", "split_seed"),
    }
    others = {ONE_OF.get(key, OFF.get(key, key)) for key in ExplainSection.model_fields}
    assert options - of_data - others == {
        *("dense", "split", "training_data", "training_split", "dtype", "device", "output", "json"),
    }


@pytest.mark.parametrize(
    ("command", "function", "own"),
    [("sweep", plan_sweep, {"metric", "dry_run"}), ("compare", compare_models, {"output", "json"})],
)
def test_limits_and_what_is_compared_are_called_as_their_arguments(command, function, own):
    assert fields_of(Limits) <= options_of(command)
    assert options_of(command) - fields_of(Limits) - own <= arguments_of(function)


def test_options_of_a_page_are_called_as_its_arguments():
    assert options_of("space") == {"model", "dense", "example"}
    assert {"dense", "examples"} <= arguments_of(make_settings)
    assert {"dense", "example"} <= options_of("push")
