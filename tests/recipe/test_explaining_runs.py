"""`explain:` in a recipe: checked first, and written beside the pruned model before its card is."""

import shlex

import pytest
from events import scalars_in
from test_commands import invoke
from test_run import TEST_SIZE, reviews, save_tiny_bert, tree, write_csv, write_recipe

from hf_prune.errors import RecipeError
from hf_prune.explain.headline import headline
from hf_prune.publish.explanation import load_explanation
from hf_prune.publish.record import dense_beside, load_record
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import prepare
from hf_prune.recipe.run import run
from hf_prune.saved.model import SavedModel


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    write_csv(folder / "reviews.csv", reviews())
    return folder


def _without_costs(explanation):
    """All but what is timed, and whether energy could be measured."""
    complexity = explanation.complexity.model_copy(update={"costs": (), "energy": None})
    return explanation.model_copy(update={"complexity": complexity, "notes": ()}).model_dump()


def test_a_run_explains_its_model_on_the_test_split(material, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)  # what lies in the working directory may be named
    monkeypatch.setattr("hf_prune.explain.complexity._SECONDS", 0.1)
    section = {"slices": ["source"], "expressions": {"praise": "good|great"}, "show_texts": True, "resamples": 100}
    changes = {"dense": {}, "explain": section, "training__report_to": "tensorboard"}
    recipe = load_recipe(write_recipe(tmp_path, material, **changes))
    said = []
    result = run(recipe, say=said.append)
    assert "Explaining the pruned model" in said
    found = load_explanation(tmp_path / "out/model")
    assert found.samples == TEST_SIZE
    assert found.files == SavedModel(tmp_path / "out/model").hashes
    assert found.metrics[0].pruned.value == pytest.approx(result.pruned["accuracy"])
    assert found.metrics[0].dense.value == pytest.approx(result.dense["accuracy"])
    assert {one.by for one in found.slices} <= {"source", "praise", "length", "rarity", "label", "negations"}
    assert found.gaps[0].training_samples == 80 - TEST_SIZE - 8
    assert found.command == (
        f"hf-prune explain . --dense ../dense --data ../../../{material.name}/reviews.csv --max-length 16 "
        "--test-size 20 --validation-size 8 --slice source --expression 'praise=good|great' --show-texts "
        "--resamples 100"
    )
    monkeypatch.chdir(tmp_path / "out/model")
    again = invoke(*shlex.split(found.command)[1:], "--json")
    assert again.exit_code == 0, again.stderr
    one, other = _without_costs(load_explanation(".")), _without_costs(found)
    assert {key: (one[key], other[key]) for key in one if one[key] != other[key]} == {}
    assert not any("trained on rows of the same data" in note for note in found.notes)
    all_rows = ["explain", ".", "--data", f"../../../{material.name}/reviews.csv", "--max-length", "16"]
    assert invoke(*all_rows, "--without-costs", "--without-perturbations", "--output", "../all").exit_code == 0
    assert "trained on rows of the same data (reviews.csv, train)" in load_explanation("../all").notes[0]
    reported = {tag: values for tag, values in scalars_in(tmp_path / "out").items() if "explain" in tag}
    assert reported == {f"test/explain_{name}": [pytest.approx(value)] for name, value in headline(found).items()}
    assert {"test/explain_agreement", "test/explain_worst_slice_accuracy"} <= reported.keys()
    record = load_record(tmp_path / "out/model")
    assert dense_beside(tmp_path / "out/model", record) == (tmp_path / "out/dense").resolve()
    assert dense_beside(tmp_path / "out/dense", record) is None
    assert dense_beside(tmp_path / "out/model", None) is None


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"expressions": {"a": "("}}, "explain.expressions.a: '(' is not a regular expression"),
        ({"slice": ["source"]}, "explain.slice: unknown key; did you mean 'slices'?"),
        ({"resamples": 3}, "explain.resamples: "),
        (None, "explain: has no value; set {} for the defaults, or remove the line"),
    ],
)
def test_validation_refuses_what_is_no_section(material, tmp_path, section, problem):
    path = write_recipe(tmp_path, material, explain=section)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"slices": ["nope"]}, "explain.slices: expected one of text, label, answer, source"),
        ({"expressions": {"a": "(\\w+\\s?)+!"}}, "explain.expressions: expected regular expressions that match"),
    ],
)
def test_what_the_data_do_not_have_is_refused_before_anything_is_written(material, tmp_path, section, problem):
    recipe = load_recipe(write_recipe(tmp_path, material, explain=section))
    before = tree(tmp_path, material)
    with pytest.raises(RecipeError) as raised:
        prepare(recipe)
    assert problem in str(raised.value)
    assert tree(tmp_path, material) == before


def test_record_and_card_are_there_if_the_explanation_is_broken_off(material, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise MemoryError

    monkeypatch.setattr("hf_prune.recipe.run.explain_run", broken)
    recipe = load_recipe(write_recipe(tmp_path, material, explain={}))
    with pytest.raises(MemoryError):
        run(recipe, say=lambda text: None)
    folder = tmp_path / "out" / "model"
    assert load_record(folder).evaluations[0].samples == TEST_SIZE
    assert "accuracy" in (folder / "README.md").read_text()


def test_other_tasks_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("task: summarization\nexplain: {}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert "explain: must not be set for summarization" in str(raised.value)
