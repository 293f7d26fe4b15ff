"""`vocabulary: data`: the pruned run trains, and its folder has, a model without the tokens that no text has."""

import json
import string

import pytest
import transformers
from test_run import VOCABULARY, quiet_run, reviews, save_tiny_bert, write_csv, write_recipe

from hf_prune.cli.tables import print_result
from hf_prune.errors import RecipeError

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
