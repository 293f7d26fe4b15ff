import math
import shutil
from pathlib import Path

import pytest
from hostile import HOSTILE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_prune import PruningConfig
from hf_prune.errors import RecipeError
from hf_prune.recipe.loading import load_recipe, parse_configs, parse_pruning
from hf_prune.recipe.names import data_format, resolve_name

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

TEXT = """\
task: text-classification
output_dir: out
model:
  name: user/model
  freeze: []
dataset:
  name: user/data
  validation_size: 5
  test_size: 10
metrics: [accuracy]
training:
  learning_rate: 1e-4
  num_train_epochs: 2
  use_cpu: true
dense:
  num_train_epochs: 1
pruning:
  sparsity: 0.7
"""


def write(folder, text=TEXT):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def line_of(text, start):
    """The number, from 1, of the line that starts with this, in a text where one line does."""
    (number,) = [number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(start)]
    return number


def with_line(key, value, section=None):
    """The recipe with `key: value`, in a section or at the top, in place of the line with that key if there is one."""
    lines = TEXT.splitlines()
    indent = "  " if section else ""
    start = lines.index(f"{section}:") + 1 if section else 0
    end = next((at for at in range(start, len(lines)) if section and not lines[at].startswith("  ")), len(lines))
    at = next((at for at in range(start, end) if lines[at].startswith(f"{indent}{key}:")), None)
    new = f"{indent}{key}: {value}"
    if at is None:
        lines.insert(end, new)
        return "\n".join(lines) + "\n", end + 1
    nested = next((later for later in range(at + 1, len(lines)) if not lines[later].startswith(indent + "  ")), None)
    lines[at:nested] = [new]
    return "\n".join(lines) + "\n", at + 1


def tree(folder):
    """Everything in a folder: path -> size and time of the last change."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def problems_of(path, *overrides):
    """The problems of a recipe that is refused; the folder around it is not touched, and each is one line."""
    before = tree(path.parent)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert tree(path.parent) == before
    lines = str(caught.value).splitlines()
    places = zip(caught.value.places, caught.value.problems, strict=True)
    assert lines == [": ".join(filter(None, (place, *problem))) for place, problem in places]
    return lines


def only_problem(path, *overrides):
    (problem,) = problems_of(path, *overrides)
    return problem


# ---- Recipes that are right ----


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_recipe_loads_and_its_arguments_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.pruning_configs
    assert recipe.training_arguments().output_dir == recipe.output_dir
    assert recipe.training_arguments(dense=True).output_dir == str(Path(recipe.output_dir, "dense"))


def test_there_are_shipped_recipes():
    assert "quickstart.yaml" in [path.name for path in SHIPPED]


def test_a_recipe_becomes_objects(tmp_path):
    recipe = load_recipe(write(tmp_path))
    assert recipe.pruning_configs == [PruningConfig(sparsity=0.7)]
    assert recipe.metrics == ["accuracy"]
    assert (recipe.dataset.validation_size, recipe.dataset.test_size) == (5, 10)
    assert recipe.model.freeze == []
    arguments = recipe.training_arguments()
    assert (arguments.learning_rate, arguments.num_train_epochs, arguments.output_dir) == (1e-4, 2, "out")


def test_the_dense_section_changes_only_what_it_names(tmp_path):
    arguments = load_recipe(write(tmp_path)).training_arguments(dense=True)
    assert (arguments.learning_rate, arguments.num_train_epochs) == (1e-4, 1)


@pytest.mark.parametrize(("value", "expected"), [("null", None), ("{}", {}), ("", None)])
def test_dense_may_be_null_or_empty(tmp_path, value, expected):
    text, _ = with_line("dense", value)
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.dense == expected
    assert recipe.training_arguments(dense=True).num_train_epochs == 2


def test_dense_left_out_is_a_dense_run_with_the_same_arguments(tmp_path):
    recipe = load_recipe(write(tmp_path, TEXT.replace("dense:\n  num_train_epochs: 1\n", "")))
    assert recipe.dense == {}


def test_pruning_may_be_a_list(tmp_path):
    text, _ = with_line("pruning", "[{sparsity: 0.5, end: 0.4}, {method: random, sparsity: 0.6, begin: 0.5}]")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.pruning_configs == [
        PruningConfig(sparsity=0.5, end=0.4),
        PruningConfig(method="random", sparsity=0.6, begin=0.5),
    ]


def test_nothing_is_written_by_a_recipe_that_is_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    before = tree(tmp_path)
    load_recipe(path).training_arguments()
    assert tree(tmp_path) == before


# ---- YAML means what a person writes ----


@pytest.mark.parametrize(
    ("section", "key", "text", "expected"),
    [
        ("training", "save_strategy", "no", "no"),
        ("training", "report_to", "none", "none"),
        ("training", "run_name", "yes", "yes"),
        ("training", "run_name", "on", "on"),
        ("training", "run_name", "2024-01-31", "2024-01-31"),
        ("training", "run_name", "12:30:45", "12:30:45"),
        ("training", "run_name", "1_000x", "1_000x"),
        ("training", "use_cpu", "true", True),
        ("training", "use_cpu", "True", True),
        ("training", "learning_rate", "1e-4", 1e-4),
        ("training", "learning_rate", "1E-4", 1e-4),
        ("training", "learning_rate", "2.e-5", 2e-5),
        ("training", "learning_rate", ".5", 0.5),
        ("training", "learning_rate", "1", 1.0),
        ("training", "num_train_epochs", "1.25", 1.25),
        ("training", "max_steps", "1e2", 100),
        ("training", "seed", "42", 42),
        ("training", "seed", "0042", 42),
        ("training", "seed", "08", 8),
        ("training", "warmup_steps", "0.1", 0.1),
        ("training", "warmup_steps", "10", 10.0),
        ("training", "eval_steps", "", None),
        ("pruning", "pattern", "2:4", "2:4"),
        ("pruning", "pattern", "block:4x1", "block:4x1"),
        ("pruning", "end", "~", None),
        ("pruning", "end", "null", None),
        ("pruning", "begin", "1e-1", 0.1),
    ],
)
def test_a_scalar_is_what_a_person_means(tmp_path, section, key, text, expected):
    written, _ = with_line(key, text, section)
    if key == "pattern" and expected == "2:4":
        written = written.replace("  sparsity: 0.7\n", "")
    values = getattr(load_recipe(write(tmp_path, written)), section)
    assert values[key] == expected
    assert type(values[key]) is type(expected)


def test_a_pattern_on_the_command_line_is_text():
    assert parse_pruning(["pattern=2:4"]) == PruningConfig(pattern="2:4")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(0, 1, exclude_max=True))
@example(1e-05)
@example(5e-324)
@example(1 / 3)
def test_any_number_is_read_as_python_prints_it(value):
    assert parse_pruning([f"sparsity={value!r}"]).sparsity == value


def test_a_dense_section_of_words_stays_words(tmp_path):
    text, _ = with_line("where", "{answer: no, source: on, count: 3}", "dataset")
    assert load_recipe(write(tmp_path, text)).dataset.where == {"answer": "no", "source": "on", "count": 3}


# ---- Keys that do not exist ----


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        (None, "modle", "model"),
        (None, "trainng", "training"),
        ("model", "freze", "freeze"),
        ("dataset", "label_colum", "label_column"),
        ("training", "learning_rte", "learning_rate"),
        ("dense", "num_train_epoch", "num_train_epochs"),
        ("pruning", "sparsty", "sparsity"),
    ],
)
def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_name(tmp_path, section, key, nearest):
    text, line = with_line(key, "1", section)
    path = write(tmp_path, text)
    name = f"{section}.{key}" if section else key
    assert only_problem(path) == f"{path}:{line}: {name}: unknown key; did you mean {nearest!r}?"


def test_an_unknown_key_that_is_near_nothing_has_no_hint(tmp_path):
    text, line = with_line("zzzzzzzz", "1", "training")
    path = write(tmp_path, text)
    assert only_problem(path) == f"{path}:{line}: training.zzzzzzzz: unknown key"


def test_an_unknown_key_in_a_list_of_configurations_has_its_own_line(tmp_path):
    text, line = with_line("pruning", "\n  - sparsity: 0.5\n  - sparsity: 0.6\n    methd: random")
    path = write(tmp_path, text)
    assert only_problem(path) == f"{path}:{line + 3}: pruning.1.methd: unknown key; did you mean 'method'?"


def test_output_dir_belongs_at_the_top(tmp_path):
    text, line = with_line("output_dir", "elsewhere", "training")
    path = write(tmp_path, text)
    expected = f"{path}:{line}: training.output_dir: must be set at the top level"
    assert only_problem(path).startswith(expected)


@pytest.mark.parametrize("key", ["task", "output_dir", "model", "dataset", "metrics", "training", "pruning"])
def test_a_key_that_is_needed_and_missing_is_named(tmp_path, key):
    lines = TEXT.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f"{key}:"))
    end = next((at for at in range(start + 1, len(lines)) if not lines[at].startswith("  ")), len(lines))
    path = write(tmp_path, "\n".join(lines[:start] + lines[end:]) + "\n")
    assert only_problem(path) == f"{path}: {key}: is required, but missing"


def test_a_missing_name_is_told_at_the_line_of_its_section(tmp_path):
    path = write(tmp_path, TEXT.replace("  name: user/data\n", ""))
    assert only_problem(path) == f"{path}:{line_of(TEXT, 'dataset:')}: dataset.name: is required, but missing"


def test_a_key_given_twice_is_refused(tmp_path):
    path = write(tmp_path, TEXT + "pruning:\n  sparsity: 0.1\n")
    assert only_problem(path) == f"{path}:{len(TEXT.splitlines()) + 1}: pruning: is set more than once; keep one"
    problem = only_problem(write(tmp_path, TEXT), "training={max_steps: 1, max_steps: 2}")
    assert problem == "command line: training.max_steps: is set more than once"


# ---- Values of the wrong type ----


@pytest.mark.parametrize(
    ("section", "key", "value", "came"),
    [
        (None, "task", "translation", "'translation'"),
        (None, "metrics", "accuracy", "'accuracy'"),
        (None, "metrics", "[1]", "1"),
        (None, "training", "5", "5"),
        (None, "dense", "5", "5"),
        (None, "model", "5", "5"),
        (None, "pruning", "5", "5"),
        (None, "pruning", "[5]", "5"),
        (None, "output_dir", "", "None"),
        ("model", "freeze", "abc", "'abc'"),
        ("dataset", "name", "[a]", "['a']"),
        ("dataset", "where", "abc", "'abc'"),
        ("dataset", "where", "{source: 1.5}", "1.5"),
        ("dataset", "where", "{source: true}", "True"),
        ("dataset", "max_length", "12.5", "12.5"),
        ("dataset", "max_length", "long", "'long'"),
        ("dataset", "test_size", "true", "True"),
        ("training", "learning_rate", "fast", "'fast'"),
        ("training", "max_steps", "1.5", "1.5"),
        ("training", "max_steps", "true", "True"),
        ("training", "use_cpu", "perhaps", "'perhaps'"),
        ("dense", "num_train_epochs", "[1]", "[1]"),
        ("pruning", "sparsity", "high", "'high'"),
        ("pruning", "targets", "abc", "'abc'"),
        ("pruning", "pruning_seed", "1.5", "1.5"),
    ],
)
def test_a_wrong_type_is_one_line_with_what_was_expected_and_what_came(tmp_path, section, key, value, came):
    text, line = with_line(key, value, section)
    path = write(tmp_path, text)
    name = f"{section}.{key}" if section else key
    problem = only_problem(path)
    assert problem.startswith(f"{path}:{line}: {name}")
    assert "expected" in problem
    assert problem.endswith(f", got {came}")
    assert problem.count(" got ") == 1


@pytest.mark.parametrize("value", ["5", "[5]"])
def test_a_section_of_the_wrong_type_is_told_in_words_and_not_in_class_names(tmp_path, value):
    text, _ = with_line("model", value)
    assert "Section" not in only_problem(write(tmp_path, text))


# ---- Values out of range ----


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "metrics", "[]"),
        (None, "pruning", "[]"),
        ("dataset", "max_length", "0"),
        ("dataset", "max_train_samples", "0"),
        ("dataset", "test_size", "-1"),
        ("dataset", "validation_size", "0"),
        ("dataset", "split_seed", "-1"),
        ("training", "per_device_train_batch_size", "0"),
        ("training", "gradient_accumulation_steps", "0"),
        ("training", "num_train_epochs", "-2"),
        ("training", "learning_rate", "-1"),
        ("training", "seed", "-1"),
        ("training", "warmup_steps", "-1"),
        ("training", "seed", "5000000000"),
        ("training", "learning_rate", ".nan"),
        ("training", "learning_rate", ".inf"),
        ("training", "max_steps", "0"),
        ("training", "max_steps", "-5"),
        ("training", "num_train_epochs", "0"),
        ("training", "dataloader_num_workers", "-1"),
        ("training", "logging_steps", "-1"),
        ("training", "logging_steps", "0"),
        ("training", "max_grad_norm", "-1"),
        ("training", "label_smoothing_factor", "-0.1"),
        ("training", "train_sampling_strategy", "group_by_lenght"),
        ("training", "deepspeed", "nofile.json"),
        ("training", "eval_strategy", "sometimes"),
        ("training", "optim", "adamm"),
        ("training", "lr_scheduler_type", "linar"),
        ("pruning", "sparsity", "1"),
        ("pruning", "sparsity", "-0.1"),
        ("pruning", "sparsity", ".nan"),
        ("pruning", "begin", "1.5"),
        ("pruning", "frequency", "0"),
        ("pruning", "pattern", "4:2"),
        ("pruning", "targets", '["("]'),
    ],
)
def test_a_value_out_of_range_is_one_line_at_its_key(tmp_path, section, key, value):
    text, line = with_line(key, value, section)
    path = write(tmp_path, text)
    name = f"{section}.{key}" if section else key
    assert only_problem(path).startswith(f"{path}:{line}: {name}: ")


@pytest.mark.parametrize(
    ("section", "key", "value", "nearest"),
    [
        ("pruning", "method", "magnitud", "magnitude"),
        ("pruning", "schedule", "cubik", "cubic"),
        ("pruning", "scope", "globl", "global"),
        ("training", "lr_scheduler_type", "linar", "linear"),
        ("training", "eval_strategy", "stps", "steps"),
        ("training", "train_sampling_strategy", "group_by_lenght", "group_by_length"),
    ],
)
def test_a_wrong_choice_comes_with_the_nearest_one(tmp_path, section, key, value, nearest):
    text, _ = with_line(key, value, section)
    assert only_problem(write(tmp_path, text)).endswith(f"did you mean {nearest!r}?")


def test_arguments_that_do_not_go_together_are_one_line(tmp_path):
    text, _ = with_line("load_best_model_at_end", "true", "training")
    text = text.replace("training:\n", "training:\n  eval_strategy: steps\n  save_strategy: epoch\n")
    problem = only_problem(write(tmp_path, text))
    assert "training" in problem
    assert "strategy" in problem


def test_all_problems_are_told_at_once(tmp_path):
    text = TEXT.replace("learning_rate", "learning_rte").replace("0.7", "7").replace("test_size: 10", "test_size: ten")
    path = write(tmp_path, text)
    lines = {start: line_of(text, start) for start in ("learning_rte", "sparsity", "test_size")}
    found = problems_of(path)
    assert len(found) == 3
    for start, section in (("learning_rte", "training"), ("sparsity", "pruning"), ("test_size", "dataset")):
        assert any(problem.startswith(f"{path}:{lines[start]}: {section}.{start}: ") for problem in found)


def test_all_problems_of_one_configuration_are_told_at_once(tmp_path):
    text = TEXT.replace("  sparsity: 0.7", "  sparsity: 2\n  schedule: fast\n  begin: -1")
    assert [problem.split(": ")[1] for problem in problems_of(write(tmp_path, text))] == [
        "pruning.schedule",
        "pruning.sparsity",
        "pruning.begin",
    ]


# ---- Files that are no recipes ----


def test_a_missing_recipe_comes_with_the_nearest_one_beside_it(tmp_path):
    path = write(tmp_path)
    missing = tmp_path / "recpe.yaml"
    assert only_problem(missing) == f"{missing}: expected a recipe, found nothing; did you mean {str(path)!r}?"


def test_a_recipe_in_a_folder_that_is_missing_is_missing(tmp_path):
    missing = tmp_path / "nowhere" / "recipe.yaml"
    with pytest.raises(RecipeError) as caught:
        load_recipe(missing)
    assert str(caught.value).splitlines() == [f"{missing}: expected a recipe, found nothing"]


def test_a_recipe_inside_a_file_is_missing(tmp_path):
    inside = write(tmp_path) / "recipe.yaml"
    with pytest.raises(RecipeError) as caught:
        load_recipe(inside)
    assert str(caught.value).startswith(f"{inside}: expected a recipe, found nothing")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert str(caught.value).splitlines() == [f"{tmp_path}: expected a recipe, found a folder"]


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("", "nothing"), ("word\n", "str")])
def test_yaml_that_is_no_mapping_is_refused(tmp_path, text, kind):
    path = write(tmp_path, text)
    assert only_problem(path) == f"{path}: expected a mapping of settings, got {kind}"


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"task: \xff\xfe\n")
    assert only_problem(path).startswith(f"{path}: expected YAML in UTF-8, got other bytes")


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (TEXT.replace("metrics: [accuracy]", "metrics: [accuracy"), 11),
        (TEXT.replace("  sparsity: 0.7", "\tsparsity: 0.7"), 18),
        (TEXT.replace("output_dir: out", "output_dir: !!python/object:os.system x"), 2),
        (TEXT.replace("output_dir: out", "output_dir: *nothing"), 2),
        (TEXT + "---\ntask: again\n", 19),
    ],
    ids=["bracket", "tab", "tag", "alias", "second document"],
)
def test_yaml_that_does_not_parse_is_one_line_with_its_place(tmp_path, broken, line):
    path = write(tmp_path, broken)
    problem = only_problem(path)
    assert "expected YAML" in problem
    assert problem.startswith(f"{path}:{line}: ")


def test_yaml_that_contains_itself_is_refused(tmp_path):
    text = TEXT + "generation: &generation {prompts: [*generation]}\n"
    assert only_problem(write(tmp_path, text)).endswith("found a value that contains itself")


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("a date that is none", "sexagesimals")])
def test_hostile_yaml_is_one_line_with_its_place(tmp_path, name):
    text, words = HOSTILE[name]
    path = write(tmp_path, text)
    problem = only_problem(path)
    assert words in problem
    assert problem.startswith(f"{path}:")


def test_text_that_utf8_cannot_hold_is_refused(tmp_path):
    path = write(tmp_path, TEXT.replace("output_dir: out", 'output_dir: "\\ud800"'))
    assert only_problem(path).endswith(r"found '\ud800', which cannot be read as str")


def test_a_recipe_that_is_too_long_is_refused_before_it_is_parsed(tmp_path):
    path = write(tmp_path, TEXT + "# " + "x" * 200_000)
    assert only_problem(path) == f"{path}: expected a recipe of at most 200,000 characters, got more"


@pytest.mark.parametrize(
    "override", ["pruning=[[" + "[" * 5000, f"pruning.{'9' * 5000}=1", "seed=" + "9" * 5000, "a: &a [*a]=1"]
)
def test_a_hostile_override_is_refused(tmp_path, override):
    assert only_problem(write(tmp_path), override).startswith("command line: ")


def test_an_anchor_and_a_merge_are_followed(tmp_path):
    text = TEXT.replace("training:", "training: &all").replace("dense:", "dense:\n  <<: *all")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.dense == {"learning_rate": 1e-4, "num_train_epochs": 1, "use_cpu": True}


# ---- Overrides ----


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("pruning.sparsity=0.9", lambda recipe: recipe.pruning["sparsity"] == 0.9),
        ("output_dir=elsewhere", lambda recipe: recipe.output_dir == "elsewhere"),
        ("output_dir=a=b", lambda recipe: recipe.output_dir == "a=b"),
        ("output_dir='12'", lambda recipe: recipe.output_dir == "12"),
        ("metrics=[accuracy, f1]", lambda recipe: recipe.metrics == ["accuracy", "f1"]),
        ("metrics.0=f1", lambda recipe: recipe.metrics == ["f1"]),
        ("model.freeze=[a, b]", lambda recipe: recipe.model.freeze == ["a", "b"]),
        ("dataset.where={source: x}", lambda recipe: recipe.dataset.where == {"source": "x"}),
        ("dataset.where.source=x", lambda recipe: recipe.dataset.where == {"source": "x"}),
        ("training.max_steps=7", lambda recipe: recipe.training_arguments().max_steps == 7),
        ("training.save_strategy=no", lambda recipe: recipe.training_arguments().save_strategy == "no"),
        ("dense=null", lambda recipe: recipe.dense is None),
        ("dense=", lambda recipe: recipe.dense is None),
        ("dense.learning_rate=1e-3", lambda recipe: recipe.dense == {"num_train_epochs": 1, "learning_rate": 1e-3}),
        ("pruning={pattern: 2:4}", lambda recipe: recipe.pruning_configs == [PruningConfig(pattern="2:4")]),
        ("pruning=[{sparsity: 0.1}]", lambda recipe: recipe.pruning_configs == [PruningConfig(sparsity=0.1)]),
        ("pruning.targets=[a.*]", lambda recipe: recipe.pruning_configs[0].targets == ["a.*"]),
        ("pruning.overrides={a: 0.5}", lambda recipe: recipe.pruning_configs[0].overrides == {"a": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_override_takes_the_place_of_a_value(tmp_path, override, read):
    assert read(load_recipe(write(tmp_path), [override]))


def test_the_last_override_of_a_key_counts(tmp_path):
    recipe = load_recipe(write(tmp_path), ["pruning.sparsity=0.1", "pruning.sparsity=0.2"])
    assert recipe.pruning["sparsity"] == 0.2


def test_an_override_reaches_into_a_section_that_is_null(tmp_path):
    text, _ = with_line("dense", "null")
    assert load_recipe(write(tmp_path, text), ["dense.max_steps=3"]).dense == {"max_steps": 3}


def test_an_override_reaches_into_a_list(tmp_path):
    text, _ = with_line("pruning", "[{sparsity: 0.5}, {sparsity: 0.6}]")
    recipe = load_recipe(write(tmp_path, text), ["pruning.1.sparsity=0.9"])
    assert [config.sparsity for config in recipe.pruning_configs] == [0.5, 0.9]


@pytest.mark.parametrize("override", ["sparsity", "=5", "", "--sparsity"])
def test_an_override_without_a_key_or_a_value_is_refused(tmp_path, override):
    expected = "command line: expected KEY=VALUE such as pruning.sparsity=0.7, got "
    assert only_problem(write(tmp_path), override) == f"{expected}{override!r}"


def test_an_override_whose_value_is_no_yaml_is_refused(tmp_path):
    problem = only_problem(write(tmp_path), "pruning.sparsity=[")
    assert problem == "command line: pruning.sparsity: expected a YAML value, got '['"


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("pruning.sparsty=1", "command line: pruning.sparsty: unknown key; did you mean 'sparsity'?"),
        ("pruning.sparsity=1.5", "command line: pruning.sparsity: expected 0 <= s < 1, got 1.5"),
        (
            "pruning.sparsity=",
            "command line: pruning.sparsity: expected 0 <= s < 1, got None; or set a target, such as target_speedup",
        ),
        ("nonsense=1", "command line: nonsense: unknown key"),
        ("nonsense.deep=1", "command line: nonsense"),
        ("training.seeed.deep=1", "command line: training.seeed"),
        ("pruning..sparsity=1", "command line: pruning."),
        ("pruning.0.sparsity=1", "command line: pruning.0"),
        ("task=x", "command line: task: expected 'text-classification', 'text-generation' or 'summarization', got 'x'"),
        ("metrics=[rouge]", "command line: metrics: expected [accuracy, f1] for text-classification, got ['rouge']"),
        ("task.deep=x", "command line: task"),
        ("metrics.5=f1", "command line: metrics.5: expected a list index below 1, got 5"),
        ("metrics.first=f1", "command line: metrics.first: expected a list index below 1, got 'first'"),
        ("metrics.first.deep=f1", "command line: metrics.first.deep: the recipe has no such key"),
        ("metrics.²=f1", "command line: metrics.²: expected a list index below 1"),
        ("training.optim=adamm", "command line: training.optim: "),
        ("training.resume_from_checkpoint=last", "command line: training.resume_from_checkpoint: must not be set: a "),
        ("training.logging_steps=0", "command line: training.logging_steps: "),
        ("dense.deepspeed=nofile.json", "command line: dense.deepspeed: "),
        (
            "training.metric_for_best_model=f1",
            "command line: training.metric_for_best_model: expected one of loss, acc",
        ),
        (
            "dense.metric_for_best_model=eval_rouge1",
            "command line: dense.metric_for_best_model: expected one of loss, a",
        ),
        ("metrics=[]", "command line: metrics: expected a list of one or more entries, got []"),
        ("pruning=[]", "command line: pruning: expected "),
        ("pruning=5", "command line: pruning: expected "),
        ("pruning={sparsity: 7}", "command line: pruning.sparsity: expected 0 <= s < 1, got 7"),
    ],
)
def test_a_problem_of_an_override_is_told_as_of_the_command_line(tmp_path, override, start):
    assert only_problem(write(tmp_path), override).startswith(start)


def test_an_override_of_a_wrong_value_in_the_file_is_enough(tmp_path):
    text, _ = with_line("sparsity", "7", "pruning")
    assert load_recipe(write(tmp_path, text), ["pruning.sparsity=0.7"]).pruning["sparsity"] == 0.7


def test_a_problem_in_the_file_keeps_its_line_beside_overrides_of_other_keys(tmp_path):
    text, line = with_line("sparsity", "7", "pruning")
    path = write(tmp_path, text)
    assert only_problem(path, "pruning.begin=0.2").startswith(f"{path}:{line}: pruning.sparsity: ")


# ---- A pruning configuration from the command line alone ----


def test_a_configuration_is_read_from_the_command_line():
    config = parse_pruning(["method=random", "sparsity=0.5", "exclude=[a.*]", "end=null", "begin=3"])
    assert config == PruningConfig(method="random", sparsity=0.5, exclude=["a.*"], end=None, begin=3)


def test_several_configurations_are_read_from_the_command_line():
    configs = parse_configs(["pruning=[{structure: neurons, sparsity: 0.5}, {structure: layers, sparsity: 0.25}]"])
    assert configs == [
        PruningConfig(structure="neurons", sparsity=0.5),
        PruningConfig(structure="layers", sparsity=0.25),
    ]


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        ([], ["command line: sparsity: expected 0 <= s < 1, got None; or set a target, such as target_speedup"]),
        (["sparsty=1"], ["command line: sparsty: unknown key; did you mean 'sparsity'?"]),
        (["sparsity"], ["command line: expected KEY=VALUE such as pruning.sparsity=0.7, got 'sparsity'"]),
        (
            ["structure=neurons", "sparsity=0.5", "pruning.structure=layers"],
            [
                "command line: structure: is set more than once; several configurations are pruning=[{...}, {...}]",
            ],
        ),
        (["sparsity=0.5", "pruning=[{sparsity: 0.6}]"], ["command line: pruning: must be the only setting"]),
        (["pruning=[3]"], ["command line: pruning: expected a list of mappings, got [3]"]),
        (
            ["pruning=[{sparsity: 0.5}, {structure: neurons, sparsity: 2}]"],
            ["command line: pruning.1.sparsity: expected 0 <= s < 1, got 2.0"],
        ),
    ],
)
def test_a_wrong_configuration_on_the_command_line_is_told_as_such(overrides, problems):
    with pytest.raises(RecipeError) as caught:
        parse_configs(overrides)
    assert str(caught.value).splitlines() == problems


# ---- Names of models and data ----


def test_a_name_inside_a_package_is_a_path_in_it(tmp_path, monkeypatch):
    package = tmp_path / "some_models_for_tests"
    (package / "deep" / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_name("model.name", "package:some_models_for_tests/deep/model") == str(package / "deep" / "model")
    assert resolve_name("model.name", "package:some_models_for_tests") == str(package)
    with pytest.raises(RecipeError) as caught:
        resolve_name("model.name", "package:some_models_for_tests/depe")
    assert str(caught.value) == (
        "model.name: 'depe' does not exist in the package 'some_models_for_tests'; did you mean 'deep'?"
    )


def test_a_package_that_is_not_installed_is_named_with_what_to_install():
    with pytest.raises(RecipeError) as caught:
        resolve_name("model.name", "package:no_such_package/model")
    assert str(caught.value).startswith("model.name: the Python package 'no_such_package'")
    assert str(caught.value).endswith("pip install no-such-package")


@pytest.mark.parametrize("name", ["package:", "package:no_such_package.inside/x", "package:.a/b", "package:os.path/x"])
def test_a_name_of_a_package_that_cannot_be_is_refused(name):
    with pytest.raises(
        RecipeError, match=r"^model\.name: (expected package:NAME/PATH|the Python package .* is not installed)"
    ):
        resolve_name("model.name", name)


@pytest.mark.parametrize("name", ["model", "user/model", "sentence-transformers/all-MiniLM-L6-v2"])
def test_a_name_on_the_hub_is_left_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_name("model.name", name) == name


def test_a_path_that_is_there_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "user" / "model").mkdir(parents=True)
    assert resolve_name("model.name", "user/model") == "user/model"
    assert resolve_name("model.name", str(tmp_path / "user")) == str(tmp_path / "user")
    assert resolve_name("model.name", "~/user/model") == str(tmp_path / "user" / "model")


@pytest.mark.parametrize("name", ["./model", "/no/model", "~/no/such", "../x", "a/b/c", "reviews.csv", "a/b.parquet"])
def test_what_looks_like_a_path_and_is_none_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        resolve_name("dataset.name", name)
    assert str(caught.value) == f"dataset.name: expected a file or folder, found nothing at {name!r}"


def test_a_missing_file_comes_with_the_nearest_one_beside_it(tmp_path):
    (tmp_path / "reviews.csv").touch()
    with pytest.raises(RecipeError, match=r"reviews\.csv'\?$"):
        resolve_name("dataset.name", str(tmp_path / "reveiws.csv"))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model", "package:no_such_package/model"),
        ("dataset", "./nothing.csv"),
    ],
)
def test_a_missing_file_or_package_is_told_with_the_line_of_the_recipe(tmp_path, key, name):
    # Through `prepare`, so that it does not matter which of the two finds it.
    from hf_prune.recipe.prepare import prepare

    text, line = with_line("name", name, key)
    path = write(tmp_path, text)
    before = tree(tmp_path)
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe(path))
    assert tree(tmp_path) == before
    assert any(problem.startswith(f"{path}:{line}: {key}.name: ") for problem in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("path", "builder"),
    [
        ("a.csv", "csv"),
        ("a.json", "json"),
        ("b/a.jsonl", "json"),
        ("a.parquet", "parquet"),
        ("a.txt", None),
        ("a", None),
    ],
)
def test_the_ending_of_a_file_says_how_to_read_it(path, builder):
    assert data_format(path) == builder


def test_the_quickstart_names_its_packages_and_can_be_read_without_them(tmp_path):
    path = next(path for path in SHIPPED if path.name == "quickstart.yaml")
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    recipe = load_recipe(copy, ["pruning.0.sparsity=0.7", "training.use_cpu=true"])
    assert recipe.model.name.startswith("package:")
    assert recipe.dataset.name.startswith("package:")
    assert math.isclose(recipe.pruning_configs[0].sparsity, 0.7)


@pytest.mark.parametrize("name", ["loss", "eval_loss", "accuracy", "eval_accuracy", "runtime"])
def test_the_best_model_is_chosen_by_what_evaluations_have(tmp_path, name):
    recipe = load_recipe(write(tmp_path), [f"training.metric_for_best_model={name}"])
    assert recipe.training["metric_for_best_model"] == name


@pytest.mark.parametrize(
    ("task", "metric", "names"),
    [
        ("text-classification", "f1", "expected one of loss, f1"),
        ("text-generation", "perplexity", "expected loss"),
        ("summarization", "rouge", "expected one of loss, rouge1, rouge2, rougeL"),
    ],
)
def test_the_best_model_by_another_value_is_refused_before_anything_is_loaded(tmp_path, task, metric, names):
    overrides = [f"task={task}", f"metrics=[{metric}]", "training.metric_for_best_model=fame"]
    problem = only_problem(write(tmp_path), *overrides)
    assert problem.endswith(f"metric_for_best_model: {names}, which evaluations have, got 'fame'")


def test_which_values_a_metric_of_ones_own_has_is_not_known_before_an_evaluation(tmp_path):
    load_recipe(write(tmp_path), ["metrics=[accuracy, own.py]", "training.metric_for_best_model=fame"])
