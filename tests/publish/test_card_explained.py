import logging
from pathlib import Path

import pytest
from explained import HOSTILE, alone, classifier, hostile, language_model
from test_card import body_of, parts_of, rows_of, says_nothing_empty
from test_sparsity_json import flip_a_weight, save_sparse

from hf_prune.cli.print_push import print_push_plan
from hf_prune.errors import RecordError, ReportError
from hf_prune.explain.page import write_page
from hf_prune.publish.card import make_files, write_card
from hf_prune.publish.card_explained import EXPLAIN_NAMES
from hf_prune.publish.explanation import save_explanation
from hf_prune.publish.push_plan import NOTHING_THERE, Remote, RemoteFile, make_push_plan
from hf_prune.publish.record import RunRecord, save_record
from hf_prune.saved.model import SavedModel


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved model with its explanation and the page of that."""
    folder = tmp_path_factory.mktemp("explained") / "model"
    save_sparse("bert", folder)
    explain(folder, classifier())
    return folder


@pytest.fixture
def folder(tmp_path):
    save_sparse("bert", tmp_path / "model")
    return tmp_path / "model"


def explain(folder, explanation):
    explanation = explanation.model_copy(update={"files": SavedModel(folder).hashes})
    save_explanation(folder, explanation)
    write_page(folder, explanation)


def card_of(folder):
    return make_files(folder)["README.md"].decode()


def test_a_card_has_the_summary_of_what_pruning_changed(whole):
    card = card_of(whole)
    says_nothing_empty(card)
    part = parts_of(card)["explained"]
    assert "- Of 1,500 answers 3.1% (2.2 to 4.0) changed: 1.9% from right to wrong, 1.2% from wrong to right.\n" in part
    assert "![accuracy of each of 8 slices, with 95% intervals](explain/slices.png)" in part
    assert "[`explain/index.html`](explain/index.html)" in part
    assert "```bash\nhf-prune explain . --dense" in part
    rows = rows_of(part)
    assert rows["accuracy"] == ["83.1% (81.0 to 85.2)", "81.3% (79.2 to 83.4)", "−1.8 points (−3.9 to +0.3)"]
    assert rows["answers changed from right to wrong"] == ["", "1.9% (1.3 to 2.5)", ""]
    assert rows["expected calibration error"] == ["3.0% (2.0 to 4.0)", "6.1% (5.1 to 7.1)", ""]
    assert [cells[1] for name, cells in rows.items() if "(worse)" in name] == [
        "74.0% (69.5 to 78.5)",
        "76.3% (72.2 to 80.4)",
    ]
    assert "this was not examined" not in parts_of(card)["limits"]


def test_no_text_of_a_sample_is_in_the_card(whole):
    texts = {one.text for one in classifier().answers.flipped}
    assert not any(text in card_of(whole) for text in texts)


def test_without_an_explanation_there_is_no_section(folder):
    assert "explained" not in parts_of(card_of(folder))
    assert "this was not examined" in card_of(folder) or "quality is unknown" in card_of(folder)


def test_the_card_of_an_explained_model_says_that_the_page_times_other_inputs(folder):
    explain(folder, classifier())
    told = "The page in `explain/` times other inputs, the first samples of its own data, so its figures differ."
    saved = SavedModel(folder)
    record = RunRecord(name="m", costs=list(classifier().complexity.costs), weights=saved.hashes)
    save_record(saved, record)
    assert told in card_of(folder)
    Path(folder, "explain/explanation.json").unlink()
    assert told not in card_of(folder)


def test_an_explanation_of_other_weights_is_left_out_and_said(folder, caplog):
    explain(folder, classifier())
    flip_a_weight(folder)
    with caplog.at_level(logging.WARNING):
        plan = make_push_plan(folder, "a/b", NOTHING_THERE)
    assert "explained" not in parts_of(plan.files["README.md"].decode())
    (warning,) = [one.getMessage() for one in caplog.records if "explains other weights" in one.getMessage()]
    assert warning.endswith("Measure again, in that folder: hf-prune explain . --dense ../dense --data movie-reviews")
    assert not EXPLAIN_NAMES & plan.files.keys()
    assert plan.left_out["explain/"] == "explains other weights"
    assert plan.shown_texts == 0


def test_a_card_that_is_written_again_has_the_section_once_and_deletes_nothing(whole):
    write_card(whole)
    first = (whole / "README.md").read_text(encoding="utf-8")
    write_card(whole)
    assert (whole / "README.md").read_text(encoding="utf-8") == first
    assert first.count("hf-prune: begin explained") == 1
    assert all((whole / name).is_file() for name in EXPLAIN_NAMES)


def test_pictures_and_pages_that_are_gone_are_not_shown(folder):
    explain(folder, classifier())
    for name in ("slices.png", "index.html"):
        (folder / "explain" / name).unlink()
    part = parts_of(card_of(folder))["explained"]
    assert "![Heat map of what was taken, by layer and matrix](explain/taken.png)" in part
    assert "index.html" not in part


@pytest.mark.parametrize("make", [alone, language_model, hostile])
def test_other_explanations_make_whole_cards(folder, make):
    explain(folder, make())
    card = card_of(folder)
    part = parts_of(card)["explained"]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    assert len({len(line.replace(r"\|", "").split("|")) for line in lines}) == 1
    assert HOSTILE not in body_of(card).replace(classifier().command, "").partition("```bash")[0]


def test_an_explanation_that_cannot_be_read_is_named(folder):
    (folder / "explain").mkdir()
    (folder / "explain" / "explanation.json").write_text("{")
    with pytest.raises(RecordError, match=r"explanation\.json"):
        make_files(folder)


def test_an_explanation_outside_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder / "explain").mkdir()
    (folder / "explain" / "explanation.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ReportError, match="link to outside"):
        make_files(folder)


# ---- Pushes ----


def test_a_push_sends_the_page_and_says_that_it_shows_texts(whole, capsys, eighty_columns):
    plan = make_push_plan(whole, "a/b", NOTHING_THERE)
    assert plan.files.keys() >= EXPLAIN_NAMES
    assert plan.shown_texts == 12
    print_push_plan(plan)
    assert "explain/ shows the texts of 12 samples of the data.\n" in capsys.readouterr().out


def test_a_push_without_texts_says_nothing_of_them(folder, capsys):
    explain(folder, alone())
    plan = make_push_plan(folder, "a/b", NOTHING_THERE)
    assert plan.files.keys() >= EXPLAIN_NAMES
    print_push_plan(plan)
    assert "shows the texts" not in capsys.readouterr().out


def test_a_push_without_an_explanation_removes_that_of_earlier_weights(folder):
    there = {name: RemoteFile(1, "", False) for name in [*EXPLAIN_NAMES, "explain/notes.md"]}
    remote = Remote(head="abc", files=there, has_branch=True, card=None, is_private=False)
    assert set(make_push_plan(folder, "a/b", remote).removed) == EXPLAIN_NAMES
