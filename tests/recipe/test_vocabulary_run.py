"""`vocabulary: data`: the pruned run trains, and its folder has, a model without the tokens that no text has."""

import json
import string

import pytest
import transformers
from test_run import VOCABULARY, quiet_run, reviews, save_tiny_bert, write_csv, write_recipe

from hf_prune.cli.print_result import print_result
from hf_prune.errors import RecipeError
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import prepare
from hf_prune.structure.chosen import read_chosen

UNUSED = [f"{first}{second}{first}" for first in "abcde" for second in "vwxyz"]
LETTERS = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
KNOWN = (*VOCABULARY[:9], *UNUSED, *VOCABULARY[9:], *LETTERS)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run with a dense run as the teacher, and units removed."""
    folder = tmp_path_factory.mktemp("vocabulary")
    save_tiny_bert(folder / "model", KNOWN)
    write_csv(folder / "reviews.csv", reviews())
    path = write_recipe(
        folder,
        folder,
        model__vocabulary="data",
        dense={"max_steps": 2},
        distillation={"weight": 0.5, "hidden_weight": 0.5},
        pruning={"structure": "neurons", "sparsity": 0.5, "begin": 0, "end": 2, "frequency": 1},
    )
    result, said = quiet_run(path)
    return folder, result, said


def test_the_pruned_model_and_its_tokenizer_have_no_unused_tokens_and_open_plainly(done):
    folder, _, said = done
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "out" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out" / "model")
    whole = transformers.AutoTokenizer.from_pretrained(folder / "out" / "dense")
    assert set(whole.get_vocab()) - set(tokenizer.get_vocab()) == set(UNUSED)
    assert model.config.vocab_size == len(tokenizer) == len(KNOWN) - len(UNUSED)
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "out" / "dense")
    assert dense.config.vocab_size == len(KNOWN)
    text = reviews()[0]["text"]
    tokens = [one.convert_ids_to_tokens(one(text)["input_ids"]) for one in (whole, tokenizer)]
    assert tokens[0] == tokens[1]
    assert model.config.intermediate_size == 12
    assert f"Removed {len(UNUSED)} of {len(KNOWN)} tokens, which no text of the data has" in said


def test_the_results_and_the_card_say_so(done, capsys):
    folder, result, _ = done
    assert result.vocabulary == {"dense": len(KNOWN), "pruned": len(KNOWN) - len(UNUSED)}
    assert result.parameters["dense"] - result.parameters["pruned"] > 16 * len(UNUSED)
    written = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert written["vocabulary"] == result.vocabulary
    card = (folder / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert f"**{len(UNUSED)} of {len(KNOWN)} tokens were removed from the vocabulary**, which no" in card
    assert f"{16 * len(UNUSED)} parameters, 0.0 MB." in card
    print_result(result)
    assert "tokens of the vocabulary" in capsys.readouterr().out


def test_a_tokenizer_whose_tokens_cannot_be_removed_is_refused_before_anything_is_written(tmp_path):
    save_tiny_bert(tmp_path / "model", KNOWN)
    wrong = tmp_path / "model" / "tokenizer.json"
    content = json.loads(wrong.read_text(encoding="utf-8"))
    content["model"]["vocab"]["beyond"] = 900
    wrong.write_text(json.dumps(content), encoding="utf-8")
    rows = [{**row, "text": f"{row['text']} beyond"} for row in reviews()]
    write_csv(tmp_path / "reviews.csv", rows)
    with pytest.raises(RecipeError, match=r"model\.vocabulary: tokenizer: expected ids below \d+, the model's vocab"):
        quiet_run(write_recipe(tmp_path, tmp_path, model__vocabulary="data"))
    assert not (tmp_path / "out").exists()


# ---- A target beside it ----

# Without its unused tokens a model without all but one layer and one neuron has less than this share, with them more.
SHARE = 0.55


def recipe_with_target(folder, **pruning):
    save_tiny_bert(folder / "model", KNOWN)
    write_csv(folder / "reviews.csv", reviews())
    times = {"begin": 0, "end": 2, "frequency": 1, "method": "magnitude"}
    return write_recipe(folder, folder, model__vocabulary="data", dense={"max_steps": 1}, pruning={**times, **pruning})


def parameters_of(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_target_refers_to_the_dense_model_with_all_its_tokens(tmp_path):
    path = recipe_with_target(tmp_path, target_parameters=SHARE)
    result, said = quiet_run(path)
    chosen = read_chosen(tmp_path / "out" / "model")
    dense, pruned = (parameters_of(tmp_path / "out" / name) for name in ("dense", "model"))
    assert result.parameters == {"dense": dense, "pruned": pruned}
    assert (chosen.dense.parameters, chosen.candidate.parameters) == (dense, pruned)
    assert pruned <= SHARE * dense
    assert chosen.dense_fields == {"vocab_size": len(KNOWN)}
    assert chosen.reached_speedup > 0
    assert any(f"{pruned:,} of {dense:,} parameters." in line for line in said)
    removed = json.loads((tmp_path / "out" / "model" / "pruning_structure.json").read_text(encoding="utf-8"))
    assert removed["parameters"] == [dense - 16 * len(UNUSED), pruned]
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert f"Asked for {SHARE:.1%} of the parameters; of the structures that should reach it, " in card
    assert f"{16 * len(UNUSED)} parameters, 0.0 MB." in card


def test_the_plan_of_a_target_is_that_of_the_run(tmp_path):
    prepared = prepare(load_recipe(recipe_with_target(tmp_path, target_parameters=SHARE)))
    whole = sum(parameter.numel() for parameter in prepared.model.parameters())
    plan, chosen = prepared.plan()
    assert (chosen.dense.parameters, chosen.candidate.parameters) == (whole, plan.weights_left)
    assert plan.all_weights == whole - 16 * len(UNUSED)
    assert sum(parameter.numel() for parameter in prepared.model.parameters()) == whole  # it is not changed


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (
            0.97,
            r"expected fewer than the model's \d,\d+ parameters without unused tokens \(0\.9\d\d of all\); got 0\.97",
        ),
        (0.05, r"expected at least \d,\d+ parameters \(0\.5\d\d of the model's\), as no more"),
    ],
)
def test_a_target_that_unused_tokens_alone_reach_or_that_nothing_does_is_refused_before_training(tmp_path, asked, why):
    with pytest.raises(RecipeError, match=rf"pruning\.target_parameters: {why}"):
        quiet_run(recipe_with_target(tmp_path, target_parameters=asked))
    assert not (tmp_path / "out" / "dense").exists()
