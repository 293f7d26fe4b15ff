import contextlib
import io
import json
import re
import shutil
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, bert, gpt2, mixtral, t5, training_arguments
from safetensors.numpy import load_file
from shrunk import LAYERS, NEURONS, save_shrunk
from test_markdown import MARKDOWN, Elements, texts
from test_sparsity_json import PRUNABLE, flip_a_weight, record_of, recount, save_sparse
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_prune import Pruner, PruningConfig
from hf_prune.config.pruning import save_configs
from hf_prune.errors import CardError, StaleRecordError
from hf_prune.model.targets import find_targets
from hf_prune.publish.card import CARD_NAME, forget_measurements, make_files, metadata_in, read_card, write_card
from hf_prune.publish.card_merge import Existing, split_body
from hf_prune.publish.card_metadata import generated_metadata
from hf_prune.publish.card_text import render_card
from hf_prune.publish.markdown import code, single_line
from hf_prune.publish.record import (
    RECORD_NAME,
    Cost,
    Emissions,
    Evaluation,
    Hardware,
    Method,
    PassCost,
    RunRecord,
    Source,
    load_record,
    save_record,
)
from hf_prune.publish.sparsity_json import Figures
from hf_prune.saved.files import SavedFile
from hf_prune.saved.model import SavedModel
from hf_prune.saved.removed import LayersLeft, Removed, UnitsLeft
from hf_prune.saved.report import make_report
from hf_prune.saved.zeros import TensorReport

ALL_PARTS = [
    *("summary", "sparsity", "layers", "schedule", "evaluation", "size", "usage", "reproduce", "limits", "citation"),
]

HISTORY = [
    {"step": 1, "loss": 0.9, "sparsity": 0.0, "target_sparsity": 0.0},
    {"step": 2, "loss": 0.7, "sparsity": 0.25, "target_sparsity": 0.25},
    {"step": 2, "eval_loss": 0.6, "eval_accuracy": 0.75, "sparsity": 0.25},
]
KNOWN = {
    "name": "bert-pruned",
    "base_model": Source(name="ada/bert", hub_name="ada/bert", revision="abc", license="mit", languages=["en"]),
    "pruning": [PruningConfig(sparsity=0.3, begin=0.2).to_dict()],
    "target_sparsity": 0.3,
    "steps": 1234,
    "epochs": 2.0,
    "train_samples": 4936,
    "seed": 42,
    "training_arguments": {"learning_rate": 0.001, "max_steps": 1234},
    "recipe": {"task": "text-classification", "metrics": ["accuracy"]},
    "history": HISTORY,
    "evaluations": [
        Evaluation(
            metrics={"loss": 0.625, "accuracy": 0.75},
            main_metric="accuracy",
            dense_metrics={"loss": 0.5, "accuracy": 0.8},
            samples=1000,
            dataset=Source(name="films", hub_name="ada/films", revision="def", config="plain", split="test"),
        ),
    ],
    "costs": [
        Cost(
            shapes={"input_ids": [1, 8]},
            passes=20,
            model=PassCost(seconds=0.0125, quartiles=[0.012, 0.013], flops=1_250_000, memory_bytes=4_000_000),
            dense=PassCost(seconds=0.0124, quartiles=[0.0121, 0.0128], flops=2_500_000, memory_bytes=8_000_000),
        ),
        Cost(
            shapes={"input_ids": [32, 8]},
            passes=7,
            model=PassCost(seconds=0.2, quartiles=[0.19, 0.22], flops=40_000_000, memory_bytes=5_000_000),
            dense=PassCost(seconds=0.6, quartiles=[0.59, 0.61], flops=80_000_000, memory_bytes=9_000_000),
        ),
    ],
    "hardware": Hardware(processor="A processor", cores=2, threads=1),
    "emissions": Emissions(kilograms=0.0015, kilowatt_hours=0.025, country="Canada", seconds=12.0),
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
}


def save_with_record(folder, architecture="bert", share=0.3, **values):
    save_sparse(architecture, folder, share)
    save_record(folder, record_of(folder, **values))
    return folder


def card_of(folder, **options):
    return make_files(folder, **options)[CARD_NAME].decode()


def metadata_of(card):
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


def body_of(card):
    return card.split("\n---\n", 1)[1]


def parts_of(card):
    return {name: text for name, text, _ in split_body(body_of(card)).parts}


def rows_of(part):
    """First cell -> the other cells, of all tables in a part."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return {cells[0].strip("`"): cells[1:] for cells in rows}


def number(text):
    return int(text.replace(",", ""))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved model of which all is known, and its card; no test may change them."""
    folder = save_with_record(tmp_path_factory.mktemp("whole") / "bert-pruned", share=0.25, **KNOWN)
    return SimpleNamespace(folder=folder, card=card_of(folder), record=load_record(folder))


# ---- Figures ----


@pytest.mark.parametrize("name", PRUNABLE)
def test_every_figure_of_sparsity_is_that_of_an_independent_recount(name, tmp_path):
    save_with_record(tmp_path, name, target_sparsity=0.3, pruning=[{"sparsity": 0.3}])
    card = card_of(tmp_path)
    values, zeros = recount(tmp_path)
    prunable, prunable_zeros = recount(tmp_path, PRUNABLE[name])
    rows = rows_of(parts_of(card)["sparsity"])
    expected = {
        "prunable tensors": (prunable, prunable_zeros),
        "other tensors": (values - prunable, zeros - prunable_zeros),
        "all tensors": (values, zeros),
    }
    for row, (weights, none) in expected.items():
        assert rows[row] == [f"{weights:,}", f"{none:,}", f"{100 * none / weights:.2f}%"]
    assert rows["target for prunable tensors"] == ["", "", "30.00%"]
    headline = re.search(r"\*\*(.+)% of the prunable weights and (.+)% of all weights are zero\*\*", card)
    assert [float(text) for text in headline.groups()] == [
        round(100 * prunable_zeros / prunable, 2),
        round(100 * zeros / values, 2),
    ]
    layers = rows_of(parts_of(card)["layers"])
    listed = [cells for tensor, cells in layers.items() if tensor not in ("tensor", "---")]
    assert sum(number(cells[1]) for cells in listed) == prunable_zeros
    assert f"<summary>{len(listed)} prunable tensors</summary>" in card


def test_every_row_of_the_layers_is_that_of_its_tensor(whole):
    rows = rows_of(parts_of(whole.card)["layers"])
    for name, tensor in load_file(whole.folder / "model.safetensors").items():
        if re.fullmatch(PRUNABLE["bert"], name):
            zeros = int((tensor == 0).sum())
            assert rows[name] == ["×".join(map(str, tensor.shape)), f"{zeros:,}", f"{100 * zeros / tensor.size:.2f}%"]


def test_size_is_that_of_the_files(whole):
    values, zeros = recount(whole.folder)
    rows = rows_of(parts_of(whole.card)["size"])
    assert number(rows["nonzero values"][0]) == values - zeros
    assert number(rows["bytes on disk"][0]) == (whole.folder / "model.safetensors").stat().st_size
    assert rows["1 sample: milliseconds"] == ["12.4 (12.1 to 12.8)", "12.5 (12.0 to 13.0)", ""]


@pytest.mark.parametrize("name", PRUNABLE)
def test_values_in_the_files_are_the_parameters_and_the_buffers(name, tmp_path):
    model = save_sparse(name, tmp_path)
    rows = rows_of(parts_of(card_of(tmp_path))["size"])
    saved = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    assert number(rows["values in the files"][0]) == sum(saved.values())


def test_evaluation_is_that_of_the_record(whole):
    part = parts_of(whole.card)["evaluation"]
    rows = rows_of(part)
    assert list(rows)[2:] == ["accuracy", "loss"]
    assert rows["accuracy"] == ["0.8000", "0.7500", "-0.0500", "93.8%"]
    assert rows["loss"] == ["0.5000", "0.6250", "+0.1250", "80.0%"]
    assert "1,000 samples" in part
    assert "configuration `plain`" in part
    assert "`accuracy` is **0.7500**; the dense model has 0.8000: **93.8%** recovered." in whole.card


SEVERAL = [
    Evaluation(
        metrics={"loss": 0.625, "accuracy": 0.75},
        main_metric="accuracy",
        not_finite=["r|2"],
        dense_metrics={"loss": 0.5},
        samples=1000,
        dataset=Source(name="films", hub_name="ada/films", split="test", rows="the first 1,000"),
    ),
    Evaluation(
        metrics={"f1": 0.5}, main_metric="f1", part="eval_news", dataset=Source(name="news", hub_name="ada/news")
    ),
    Evaluation(metrics={"f1": 0.25}, main_metric="f1", part="test", not_finite=["loss"], samples=5),
    Evaluation(metrics={"f1": 0.125}, main_metric="f1", dataset=Source(name="films", hub_name="ada/films")),
]


def test_every_evaluation_has_a_table_under_what_it_was_made_on(tmp_path):
    card = card_of(save_with_record(tmp_path, evaluations=SEVERAL))
    tokens = MARKDOWN.parse(parts_of(card)["evaluation"])
    kinds = [token.type for token in tokens if token.type in ("paragraph_open", "table_open") and token.level == 0]
    of_dense = ["paragraph_open", "table_open"]
    assert kinds == [*of_dense, *(["paragraph_open", "table_open", "paragraph_open"] * 3), "paragraph_open"]
    said = [token.content for token in tokens if token.type == "inline" and token.content.startswith("Evaluated")]
    films = "[`films`](https://huggingface.co/datasets/ada/films)"
    assert said == [
        f"Evaluated on {films}, split `test`, the first 1,000, 1,000 samples.",
        "Evaluated on [`news`](https://huggingface.co/datasets/ada/news).",
        "Evaluated on the Trainer's `test` data, 5 samples; the name of the data set is unknown.",
        f"Evaluated on {films}.",
    ]
    assert parts_of(card)["evaluation"].count("The dense baseline was not measured.") == 3
    assert "`accuracy` is **0.7500**" in parts_of(card)["summary"]


def test_a_metric_that_is_no_finite_number_is_said_to_be_none(tmp_path):
    part = parts_of(card_of(save_with_record(tmp_path, evaluations=SEVERAL)))["evaluation"]
    assert "| <code>r&#124;2</code> | – | not a finite number | – | – |" in part
    assert "| `loss` | not a finite number |" in part


def test_metadata_have_the_results_of_every_evaluation(tmp_path):
    metadata = metadata_of(card_of(save_with_record(tmp_path, evaluations=SEVERAL)))
    results = metadata["model-index"][0]["results"]
    found = [
        (
            result["dataset"]["type"],
            result["dataset"].get("split"),
            {row["type"]: row["value"] for row in result["metrics"]},
        )
        for result in results
    ]
    assert found == [
        ("ada/films", "test", {"loss": 0.625, "accuracy": 0.75}),
        ("ada/news", None, {"f1": 0.5}),
        ("unknown", "test", {"f1": 0.25}),
        ("ada/films", None, {"f1": 0.125}),
    ]
    assert metadata["datasets"] == ["ada/films", "ada/news"]
    assert metadata["metrics"] == ["accuracy"]


def test_recovery_is_explained_where_there_is_any():
    def note(*evaluations):
        part = parts_of(render_card(figures_of(), RunRecord(name="m", evaluations=evaluations), "m"))["evaluation"]
        return part.rsplit("Recovery is", 1)[1].split("\n")[0] if "Recovery is" in part else None

    with_dense = {"metrics": {"f1": 0.5}, "main_metric": "f1", "dense_metrics": {"f1": 0.5}}
    errors = {"metrics": {"wer": 0.5}, "main_metric": "wer", "dense_metrics": {"wer": 0.5}}
    without = {"metrics": {"loss": 0.5}, "main_metric": "loss"}
    assert note(without, without) is None
    assert note(with_dense, without) == " the pruned model's value divided by the dense model's."
    assert note(with_dense, errors, errors).endswith("; for `wer`, where lower is better, the inverse.")


def test_a_small_value_is_not_shown_as_zero(tmp_path):
    evaluation = Evaluation(metrics={"mse": 2.5e-6}, main_metric="mse", dense_metrics={"mse": 1.25e-6})
    part = parts_of(card_of(save_with_record(tmp_path, evaluations=[evaluation])))["evaluation"]
    assert "0.0000" not in part


def test_training_is_that_of_the_record(whole):
    part = parts_of(whole.card)["reproduce"]
    assert "Trained for 1,234 optimizer steps, 2 epochs of 4,936 samples; seed 42." in part
    assert "python 3.11.9, torch 2.13.0." in part
    assert "for the electricity of Canada: 1.5 g of CO2 equivalent, 0.025 kWh in 12 s." in part
    assert rows_of(part)["learning_rate"] == ["`0.001`"]
    assert yaml.safe_load(re.search(r"```yaml\n(.+?)\n```", part, re.DOTALL)[1]) == KNOWN["recipe"]


def lines_of(part):
    return [line.removeprefix("- ") for line in part.splitlines() if line.startswith("- ")]


TRAINED = {
    "steps alone": ({}, "Trained for 1,234 optimizer steps."),
    "one epoch": ({"epochs": 1.0}, "Trained for 1,234 optimizer steps, 1 epoch."),
    "half an epoch": ({"epochs": 0.5, "seed": 0}, "Trained for 1,234 optimizer steps, 0.5 epochs; seed 0."),
    "the last step": ({"kept_step": 1234}, "Trained for 1,234 optimizer steps."),
    "a best step": (
        {"kept_step": 1000},
        "Trained for 1,234 optimizer steps. The weights are those of step 1,000, which had the best evaluation.",
    ),
    "before the first": (
        {"kept_step": 0},
        "Trained for 1,234 optimizer steps. The weights are those of step 0, which had the best evaluation.",
    ),
    "a data set": (
        {
            "train_samples": 5000,
            "training_data": Source(
                name="films", hub_name="ada/films", revision="d", config="plain", split="train", rows="every second"
            ),
        },
        "Trained for 1,234 optimizer steps of 5,000 samples of "
        "[`films`](https://huggingface.co/datasets/ada/films) (revision `d`), configuration `plain`, split `train`, "
        "every second.",
    ),
    "a data set by its name": (
        {"training_data": Source(name="my films")},
        "Trained for 1,234 optimizer steps of `my films`.",
    ),
}


@pytest.mark.parametrize(("values", "line"), TRAINED.values(), ids=TRAINED)
def test_how_it_was_trained_is_told_in_a_line(values, line):
    card = render_card(figures_of(), RunRecord(name="m", steps=1234, **values), "m")
    assert lines_of(parts_of(card)["reproduce"])[0] == line


def test_every_configuration_has_a_line_with_tensors_of_its_own():
    configs = [
        PruningConfig(sparsity=0.5, targets=["a.*", "b"], exclude=["a|1"], overrides={"a2": 0.25}),
        PruningConfig(pattern="2:4", targets=["c"]),
        PruningConfig(method="keep", exclude=["d"]),
    ]
    card = render_card(figures_of(pruning=[config.to_dict() for config in configs]), None, "m")
    lines = lines_of(parts_of(card)["sparsity"])
    assert len(lines) == 4
    assert lines[0] == (
        "Method: `magnitude`; pattern: `unstructured`; scope: `layer`; schedule: `cubic`. Prunable tensors: "
        "those matching <code>a.&#42;</code>, `b`. Excluded: <code>a&#124;1</code>. Overrides: `a2` at 25.00%."
    )
    assert "pattern: `2:4`" in lines[1]
    assert lines[1].endswith("Prunable tensors: those matching `c`.")
    assert lines[2].startswith("Method: `keep`. Prunable tensors: the linear layers and convolutions")
    assert lines[2].endswith(" Excluded: `d`.")


@pytest.mark.parametrize("steps", [None, 0])
@pytest.mark.parametrize("pruning", [[], [PruningConfig(sparsity=0.5).to_dict()]], ids=["dense", "pruned"])
def test_a_record_without_steps_claims_no_training(steps, pruning):
    record = RunRecord(name="m", steps=steps, pruning=pruning, base_model=Source(name="base"), versions={"torch": "2"})
    card = render_card(figures_of(pruning=pruning), record, "m")
    assert "`base`, pruned." in parts_of(card)["summary"]  # half of it is zero
    assert "rained" not in card.replace("_pretrained", "").replace("PruningTrainer", "")
    assert "fine-tuned" not in card


def test_a_dense_model_without_steps_is_called_dense():
    tensor = TensorReport(name="a", shape=[4], weights=4, zeros=0, prunable=True)
    card = render_card(figures_of(tensors=[tensor]), RunRecord(name="m", base_model=Source(name="base")), "m")
    assert "`base`, dense." in parts_of(card)["summary"]
    assert "pruned" not in metadata_of(card)["tags"]


def test_figures_are_written_beside_the_card(whole):
    written = json.loads(make_files(whole.folder)["sparsity.json"])
    assert (sum(row["weights"] for row in written["tensors"]), sum(row["zeros"] for row in written["tensors"])) == (
        recount(whole.folder)
    )
    assert [one["metrics"] for one in written["evaluations"]] == [{"loss": 0.625, "accuracy": 0.75}]


def test_very_many_tensors_are_cut_after_the_table(whole):
    tensors = [TensorReport(name=f"t.{at}", shape=[2], weights=2, zeros=1, prunable=True) for at in range(503)]
    part = parts_of(render_card(figures_of(tensors=tensors), None, "m"))["layers"]
    assert len([line for line in part.splitlines() if line.startswith("| `t.")]) == 500
    assert "\n\nThe other 3 tensors are in `sparsity.json`.\n" in part


# ---- Weights that were not measured ----


def test_changed_weights_are_refused_and_nothing_is_written(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN)
    flip_a_weight(folder)
    with pytest.raises(StaleRecordError):
        write_card(folder)
    assert not (folder / CARD_NAME).exists()
    assert not (folder / "sparsity.json").exists()


def test_without_measurements_an_honest_card_is_made_of_changed_weights(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN)
    write_card(folder)
    flip_a_weight(folder)
    forget_measurements(folder)
    write_card(folder)
    card = (folder / CARD_NAME).read_text(encoding="utf-8")
    values, zeros = recount(folder)
    assert rows_of(parts_of(card)["sparsity"])["all tensors"][:2] == [f"{values:,}", f"{zeros:,}"]
    assert set(ALL_PARTS) - set(parts_of(card)) == {"schedule", "evaluation", "reproduce"}
    assert not {"model-index", "metrics", "co2_eq_emissions"} & set(metadata_of(card))
    for measured in ("0.7500", "12.5 ms", "93.8%", "1,234", "target for prunable"):
        assert measured not in card
    assert "The model was not evaluated" in card
    assert metadata_of(card)["base_model"] == "ada/bert"
    assert "datasets" not in metadata_of(card)
    assert not (folder / "assets" / "schedule.png").exists()


def test_there_is_nothing_to_forget_without_a_record(tmp_path):
    save_sparse("bert", tmp_path)
    forget_measurements(tmp_path)
    assert not (tmp_path / RECORD_NAME).exists()


def add_to_metadata(path, **values):
    """Write into the metadata of a card, as a person does."""
    card = path.read_text(encoding="utf-8")
    front = yaml.safe_dump(metadata_of(card) | values, allow_unicode=True)
    path.write_text(f"---\n{front}---\n{body_of(card)}", encoding="utf-8")


def test_a_persons_metadata_outlive_the_measurements(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN)
    add_to_metadata(write_card(folder), datasets=["ada/films", "mine/set"], license="gpl-3.0", metrics=["wer"])
    flip_a_weight(folder)
    forget_measurements(folder)
    metadata = metadata_of(write_card(folder).read_text(encoding="utf-8"))
    assert (metadata["datasets"], metadata["license"], metadata["metrics"]) == (["mine/set"], "gpl-3.0", ["wer"])


# ---- What is not known is not there ----


LITTLE = {
    "no evaluation": {"evaluations": []},
    "no data set": {"evaluations": [Evaluation(metrics={"f1": 0.5}, main_metric="f1")]},
    "dense partly": {
        "evaluations": [Evaluation(metrics={"f1": 0.5, "r": 1}, main_metric="r", dense_metrics={"f1": 0.6})]
    },
    "dense of nothing": {"evaluations": [Evaluation(metrics={"f1": 0.5}, main_metric="f1", dense_metrics={})]},
    "zeros": {"evaluations": [Evaluation(metrics={"f1": 0.0}, main_metric="f1", dense_metrics={"f1": 0.0})]},
    "no main metric": {"evaluations": [Evaluation(metrics={"loss": 0.5}, dense_metrics={"loss": 0.25})]},
    "no costs": {"costs": []},
    "no hardware": {"hardware": None},
    "no dense costs": {"costs": [Cost(shapes={}, passes=1, model=PassCost(seconds=0.1))]},
    "no history": {"history": []},
    "history of losses": {"history": [{"step": 1, "loss": 0.5}]},
    "no arguments": {"training_arguments": {}},
    "no recipe": {"recipe": None},
    "no recipe and no pruning": {"recipe": None, "pruning": []},
    "no steps": {"steps": None},
    "no seed": {"seed": None},
    "no epochs": {"epochs": None, "train_samples": None},
    "no versions": {"versions": {}},
    "no emissions": {"emissions": None},
    "no base": {"base_model": None},
    "no target": {"target_sparsity": None},
    "keep": {"pruning": [PruningConfig(method="keep").to_dict()]},
    "nothing": {name: None for name in KNOWN if name in ("base_model", "steps", "recipe")}
    | {
        "costs": [],
        "evaluations": [],
        "pruning": [],
        "history": [],
        "training_arguments": {},
        "versions": {},
        "hardware": None,
        "emissions": None,
    },
}


def says_nothing_empty(card):
    body = body_of(card)
    assert not re.search(r"\b(None|nan|inf|NaN|TODO|placeholder|More [Ii]nformation|Undefined)\b", body)
    html = MARKDOWN.render(body)
    assert html.count("<table>") == html.count("<tbody>")
    assert not re.search(r"<(li|p|h1|h2|summary|code|details)>\s*</", html)
    assert "\n\n\n" not in body
    assert None not in metadata_of(card).values()
    assert [] not in metadata_of(card).values()
    for part in parts_of(card).values():
        heading, _, rest = part.partition("\n")[2].partition("\n")
        assert heading.startswith(("## ", "<!-- "))
        assert len(rest.split("<!-- hf-prune: end")[0].strip()) > 10


def test_a_whole_card_has_every_part_and_nothing_empty(whole):
    assert list(parts_of(whole.card)) == ALL_PARTS
    says_nothing_empty(whole.card)


@pytest.mark.parametrize("name", LITTLE)
def test_what_is_not_known_is_left_out(name, whole):
    record = RunRecord.model_validate(whole.record.model_dump() | LITTLE[name])
    figures = figures_of(pruning=record.pruning, target_sparsity=record.target_sparsity)
    says_nothing_empty(render_card(figures, record, "a-model"))


def test_without_a_record_there_is_what_the_files_say(tmp_path):
    save_sparse("bert", tmp_path / "my-model")
    files = make_files(tmp_path / "my-model")
    card = files[CARD_NAME].decode()
    assert list(parts_of(card)) == ["summary", "sparsity", "layers", "size", "usage", "limits"]
    assert set(files) == {CARD_NAME, "sparsity.json", "assets/layers.png"}
    assert set(metadata_of(card)) == {"library_name", "pipeline_tag", "tags"}
    assert "# my-model\n" in card
    says_nothing_empty(card)


def test_parts_are_there_if_and_only_if_what_they_tell_is_known(whole):
    def parts(**changes):
        record = RunRecord.model_validate(whole.record.model_dump() | changes)
        return set(ALL_PARTS) - set(parts_of(render_card(figures_of(pruning=record.pruning), record, "m")))

    assert parts() == set()
    assert parts(evaluations=[]) == {"evaluation"}
    assert parts(history=[]) == {"schedule"}
    assert parts(steps=None, training_arguments={}, versions={}, hardware=None, emissions=None) == {"reproduce"}
    assert parts(pruning=[]) == {"citation"}


def test_where_it_is_not_known_what_is_prunable_nothing_is_said_of_it(tmp_path):
    save_sparse("bert", tmp_path)
    (tmp_path / "config.json").unlink()
    files = make_files(tmp_path)
    card = files[CARD_NAME].decode()
    assert "layers" not in parts_of(card)
    assert "assets/layers.png" not in files
    assert "prunable tensors" not in card
    assert str(tmp_path) not in card
    assert "from transformers import AutoModel\n" in card


@pytest.mark.parametrize("dense", [None, {}])
def test_a_dense_model_that_was_not_measured_is_said_not_to_be(tmp_path, dense):
    evaluation = Evaluation(metrics={"f1": 0.5}, main_metric="f1", dense_metrics=dense)
    card = card_of(save_with_record(tmp_path, evaluations=[evaluation]))
    assert rows_of(parts_of(card)["evaluation"])["f1"] == ["0.5000"]
    assert "The dense baseline was not measured." in card
    assert "the dense baseline was not measured" in parts_of(card)["summary"]


def test_a_dense_metric_that_was_not_measured_is_said_not_to_be(tmp_path):
    evaluation = Evaluation(metrics={"f1": 0.5, "r": 0.25}, main_metric="r", dense_metrics={"f1": 0.5})
    rows = rows_of(parts_of(card_of(save_with_record(tmp_path, evaluations=[evaluation])))["evaluation"])
    assert rows["r"] == ["not measured", "0.2500", "–", "–"]
    assert rows["f1"] == ["0.5000", "0.5000", "+0.0000", "100.0%"]


# ---- Metadata ----


def test_metadata_are_as_the_hub_wants_them(whole):
    metadata = metadata_of(whole.card)
    assert metadata.pop("tags") == ["hf-prune", "pruned", "magnitude"]  # its target sparsity was not reached
    assert "Its target sparsity of 30.00% was not reached." in whole.card
    (index,) = metadata.pop("model-index")
    task, dataset = {"type": "text-classification"}, {"name": "films", "type": "ada/films", "config": "plain"}
    assert index["name"] == "bert-pruned"
    (result,) = index["results"]
    assert result["task"] == task
    assert result["dataset"] == dataset | {"split": "test", "revision": "def"}
    assert {row["type"]: row["value"] for row in result["metrics"]} == {"loss": 0.625, "accuracy": 0.75}
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "license": "mit",
        "language": ["en"],
        "base_model": "ada/bert",
        "base_model_relation": "finetune",
        "datasets": ["ada/films"],
        "metrics": ["accuracy"],
        "co2_eq_emissions": {"emissions": 1.5, "source": "codecarbon", "training_type": "fine-tuning"},
    }


def test_a_base_that_is_not_on_the_hub_is_no_base_model(tmp_path):
    metadata = metadata_of(card_of(save_with_record(tmp_path, base_model=Source(name="mine", license="mit"))))
    assert not {"base_model", "base_model_relation"} & set(metadata)
    assert metadata["license"] == "mit"


def test_results_on_an_unknown_data_set_say_so_and_a_loss_is_no_result(tmp_path):
    evaluations = [
        Evaluation(metrics={"loss": 1.0, "f1": 0.5}, main_metric="f1"),
        Evaluation(metrics={"f1": 0.25}, main_metric="f1", part="test"),
    ]
    metadata = metadata_of(card_of(save_with_record(tmp_path / "known", evaluations=evaluations)))
    assert not {"datasets", "model_name", "eval_results"} & set(metadata)
    assert metadata["metrics"] == ["f1"]
    results = metadata["model-index"][0]["results"]
    unknown = {"type": "unknown", "name": "Unknown"}
    assert [result["dataset"] for result in results] == [unknown | {"split": part} for part in ("eval", "test")]
    evaluations = [Evaluation(metrics={"loss": 1.0})]
    metadata = metadata_of(card_of(save_with_record(tmp_path / "loss", evaluations=evaluations)))
    assert not {"model-index", "metrics"} & set(metadata)


def test_a_task_that_the_hub_hides_is_that_of_results_only_and_a_chosen_one_is_both():
    def tasks_of(architecture, **chosen):
        evaluation = Evaluation(metrics={"accuracy": 0.5}, main_metric="accuracy")
        record = RunRecord(name="m", evaluations=[evaluation], chosen=chosen)
        metadata = metadata_of(render_card(figures_of().model_copy(update={"architecture": architecture}), record, "m"))
        (result,) = metadata["model-index"][0]["results"] if "model-index" in metadata else ({"task": {"type": None}},)
        return metadata.get("pipeline_tag"), result["task"]["type"]

    assert tasks_of("BertForMultipleChoice") == (None, "multiple-choice")
    assert tasks_of("ViTMAEForPreTraining") == (None, None)
    assert tasks_of("T5ForConditionalGeneration", pipeline_tag="summarization") == ("summarization", "summarization")


def test_without_a_main_metric_the_summary_names_none(tmp_path):
    evaluation = Evaluation(metrics={"LOC_precision": 0.5, "loss": 1.0}, dense_metrics={"loss": 0.5})
    card = card_of(save_with_record(tmp_path, history=HISTORY, evaluations=[evaluation]))
    assert "LOC_precision" not in parts_of(card)["summary"]
    assert list(rows_of(parts_of(card)["evaluation"]))[2:] == ["LOC_precision", "loss"]
    says_nothing_empty(card)


def test_what_was_chosen_and_tagged_is_in_the_metadata(tmp_path):
    chosen = {"license": "apache-2.0", "language": ["de"], "pipeline_tag": "fill-mask"}
    base = Source(name="a/b", hub_name="a/b", license="mit", languages=["en"])
    metadata = metadata_of(card_of(save_with_record(tmp_path, chosen=chosen, tags=["film"], base_model=base)))
    assert metadata.items() >= chosen.items()
    assert metadata["tags"] == ["hf-prune", "pruned", "film"]


def test_a_pattern_whose_zeros_are_not_there_is_no_tag_in_a_loop_of_ones_own(tmp_path):
    """Without a recorded target, it is what the configuration says: 2:4 of which 30% are zero is not 2:4."""
    save_sparse("bert", tmp_path)
    PruningConfig(pattern="2:4").save_pretrained(tmp_path)
    assert metadata_of(card_of(tmp_path))["tags"] == ["hf-prune", "pruned", "magnitude"]


@pytest.mark.parametrize("model", [bert, gpt2])
def test_a_pattern_that_not_every_group_has_is_no_tag_though_there_are_zeros_enough(tmp_path, model):
    pruned = model()
    Pruner(pruned, PruningConfig(pattern="2:4", schedule="one_shot", begin=0), 1)
    PruningConfig(pattern="2:4").save_pretrained(tmp_path)
    pruned.save_pretrained(tmp_path)
    assert "2:4" in metadata_of(card_of(tmp_path))["tags"]
    weight = next(p for name, p in pruned.named_parameters() if p.ndim == 2 and ("query" in name or "c_attn" in name))
    with torch.no_grad():
        weight[:4, :4] = 1.0
        weight[4:, 4:8] = 0.0
    pruned.save_pretrained(tmp_path)
    assert SavedModel(tmp_path).missed_patterns == ["2:4"]
    assert "2:4" not in metadata_of(card_of(tmp_path))["tags"]


@pytest.mark.parametrize("prefix", ["", "0.model."])
def test_frozen_tensors_that_were_left_out_have_the_names_of_the_files(tmp_path, prefix):
    model = mixtral()
    model.save_pretrained(tmp_path)
    if prefix:
        (tmp_path / "modules.json").write_text("[]", encoding="utf-8")
    experts = [f"{prefix}{name}" for name, _ in model.named_parameters() if "down_proj" in name]
    save_configs([PruningConfig(sparsity=0.5)], tmp_path, frozen=experts[:1])
    name = code("model.layers.0.block_sparse_moe.experts.*.w2.weight")
    assert f"Not pruned, because it was not trained: the tensor {name}." in card_of(tmp_path)


def test_patterns_are_tags_without_a_colon_in_blocks():
    configs = [PruningConfig(pattern="2:4"), PruningConfig(sparsity=0.5, pattern="block:4x1")]
    card = render_card(figures_of(pruning=[config.to_dict() for config in configs]), None, "m")
    assert metadata_of(card)["tags"] == ["hf-prune", "pruned", "2:4", "magnitude", "block-4x1"]


def test_penalties_are_said_and_cited(tmp_path):
    penalised = {"sparsity": 0.3, "penalty": "group_lasso", "penalty_weight": 1e-5}
    pruning, history = [penalised, penalised, {"sparsity": 0.3}], [{"step": 1, "loss": 1.0, "group_lasso_penalty": 0.1}]
    folder = save_with_record(tmp_path / "model", "bert", 0.3, pruning=pruning, history=history)
    card = card_of(folder)
    said = "penalty on the weights to prune (group\\_lasso) was added to the loss; its weight grew towards 1e-05"
    assert card.count(said) == 1
    assert "Model selection and estimation in regression with grouped variables" in card
    history[0]["group_lasso_penalty"] = 0.0  # as when training ends before the schedule begins
    folder = save_with_record(tmp_path / "other", "bert", 0.3, pruning=pruning, history=history)
    assert "a penalty on the weights" not in card_of(folder)


def test_links_lead_to_models_and_data_sets(whole):
    links = re.findall(r"\]\((https://[^)]+)\)", body_of(whole.card))
    assert links == ["https://huggingface.co/ada/bert", "https://huggingface.co/datasets/ada/films"]


# ---- Units that were removed ----


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    """A model without three quarters of its neurons and two of four layers, and its card; no test may change them."""
    folder = tmp_path_factory.mktemp("shrunk") / "small"
    pruner = save_shrunk(folder)
    values = {"pruning": [config.to_dict() for config in pruner.configs], "target_sparsity": pruner.target_sparsity}
    known = {name: value for name, value in KNOWN.items() if name not in ("recipe", "history")}
    save_record(folder, record_of(folder, **(known | values)))
    return SimpleNamespace(folder=folder, card=card_of(folder), removed=pruner.removed)


def test_what_was_removed_is_said_in_a_sentence_and_a_table(shrunk):
    before, after = shrunk.removed["parameters"]
    said = "75% of the neurons of each layer and 2 of 4 layers were removed"
    assert f"**{said}: {before:,} parameters became {after:,}**, and the model opens with plain" in shrunk.card
    rows = rows_of(parts_of(shrunk.card)["removed"])
    assert rows["parameters"] == [f"{before:,}", f"{after:,}"]
    assert rows["neurons of each layer"] == ["24", "6"]
    assert rows["layers of `bert.encoder.layer"] == ["4", "2"]
    assert f"![Bar chart of the neurons and layers that are left: {said}](assets/units.png)" in shrunk.card


def test_removed_units_are_no_missing_zeros(shrunk):
    summary = parts_of(shrunk.card)["summary"]
    assert "pruned with hf-prune: neurons, those with the smallest norm of their weights; and layers, " in summary
    assert "not reached" not in shrunk.card
    assert "weights are zero**" not in summary
    rows = rows_of(parts_of(shrunk.card)["sparsity"])
    assert "target for prunable tensors" not in rows
    assert rows["all tensors"] == [f"{shrunk.removed['parameters'][1]:,}", "0", "0.00%"]
    assert "structure: `neurons`, 75.00% of them" in parts_of(shrunk.card)["sparsity"]


def test_what_was_pruned_in_turn_is_told_in_turn(shrunk, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(shrunk.folder, folder)
    pruning = [PruningConfig(structure="neurons", sparsity=0.75, begin=0.1, end=0.3)]
    pruning.append(PruningConfig(structure="layers", sparsity=0.5, begin=0.3, end=0.6))
    save_configs(pruning, folder)
    known = {name: value for name, value in KNOWN.items() if name not in ("recipe", "history")}
    save_record(folder, record_of(folder, **(known | {"pruning": [config.to_dict() for config in pruning]})))
    assert "the smallest norm of their weights; then layers, " in parts_of(card_of(folder))["summary"]
    assert "the size and speed of a dense one" not in shrunk.card
    assert "layers" not in parts_of(shrunk.card)  # a chart of no zeros


def test_a_method_of_structures_alone_is_known(tmp_path, caplog):
    folder = tmp_path / "small"
    pruner = save_shrunk(folder)
    pruning = [config.to_dict() for config in pruner.configs]
    layers = next(config for config in pruning if config["structure"] == "layers")
    layers["method"] = "block_influence"
    known = {name: value for name, value in KNOWN.items() if name not in ("recipe", "history")}
    save_record(folder, record_of(folder, **(known | {"pruning": pruning, "target_sparsity": pruner.target_sparsity})))
    card = card_of(folder)
    assert "is not known here" not in caplog.text
    assert "layers, those that change their inputs least" in parts_of(card)["summary"]
    assert "men2024shortgpt" in card


def test_a_reconstruction_is_said_with_its_paper(shrunk, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(shrunk.folder, folder)
    record = load_record(folder)
    record.pruning[0]["reconstruction"] = "least_squares"
    save_record(folder, record)
    card = card_of(folder)
    said = "neurons, those with the smallest norm of their weights (what reads them is solved anew by least squares, so"
    assert said in parts_of(card)["summary"]
    assert "@inproceedings{he2017channel" in card
    assert "he2017channel" not in shrunk.card


def test_a_target_that_removed_and_masked_weights_do_not_reach_is_said_to_be_missed(tmp_path):
    pruner = save_shrunk(tmp_path)
    pruning = [config.to_dict() for config in pruner.configs]
    reached = pruner.sparsity
    for target, said in ((reached, False), (reached + 0.01, True)):
        record = record_of(tmp_path, pruning=pruning, steps=2, target_sparsity=target)
        save_record(tmp_path, record)
        assert ("was not reached" in card_of(tmp_path)) == said


def test_layers_that_cannot_be_removed_are_no_missed_target(tmp_path):
    pruner = save_shrunk(tmp_path, [LAYERS], t5(num_layers=3, num_decoder_layers=5))
    pruning = [config.to_dict() for config in pruner.configs]
    save_record(tmp_path, record_of(tmp_path, pruning=pruning, steps=2, target_sparsity=pruner.target_sparsity))
    card = card_of(tmp_path)
    assert "2 of 3 layers of encoder.block and 2 of 5 layers of decoder.block were removed" in card
    assert "not reached" not in card


def test_removed_units_and_zeros_of_weights_are_both_said(tmp_path):
    weights = PruningConfig(sparsity=0.5, begin=1, end=2, frequency=1, targets=[r".*intermediate\.dense\.weight"])
    pruner = save_shrunk(tmp_path, [NEURONS, weights])
    pruner.step()
    pruner.model.save_pretrained(tmp_path)
    pruner.save(tmp_path)
    pruning = [config.to_dict() for config in pruner.configs]
    save_record(tmp_path, record_of(tmp_path, pruning=pruning, steps=2, target_sparsity=pruner.target_sparsity))
    card = card_of(tmp_path)
    assert "**75% of the neurons of each layer were removed" in card
    assert re.search(r"\*\*[\d.]+% of the prunable weights and [\d.]+% of all weights are zero\*\*", card)
    assert "not reached" not in card
    assert metadata_of(card)["tags"] == ["hf-prune", "pruned", "structured-pruning", "magnitude", "unstructured"]
    assert "what was removed does both" in card
    assert 'pruning_config=PruningConfig(method="keep", targets=[".*intermediate' in snippets(card)[2]
    assert "layers" in parts_of(card)


def test_the_tags_of_a_smaller_model_name_no_pattern(shrunk):
    assert metadata_of(shrunk.card)["tags"] == ["hf-prune", "pruned", "structured-pruning", "magnitude"]


def test_a_smaller_model_without_a_record_is_called_pruned(tmp_path):
    save_shrunk(tmp_path)
    (tmp_path / "pruning_config.json").unlink()
    card = card_of(tmp_path)
    assert "A model, pruned." in card
    assert "75% of the neurons of each layer and 2 of 4 layers were removed" in card


def test_speed_beside_the_dense_model_is_said_only_if_it_was_measured(shrunk, tmp_path):
    rows = rows_of(parts_of(shrunk.card)["size"])
    assert rows["1 sample: milliseconds"] == ["12.4 (12.1 to 12.8)", "12.5 (12.0 to 13.0)", "0.99 times as fast"]
    assert rows["32 samples: milliseconds"] == [
        "600.0 (590.0 to 610.0)",
        "200.0 (190.0 to 220.0)",
        "3.00 times as fast",
    ]
    assert rows["1 sample: millions of floating-point operations"] == ["2.5", "1.2", "50.0%"]
    assert rows["32 samples: megabytes of memory"] == ["9.0", "5.0", "55.6%"]
    save_shrunk(tmp_path)
    costs = [Cost(shapes={"input_ids": [1, 8]}, passes=20, model=PassCost(seconds=0.0125))]
    save_record(tmp_path, record_of(tmp_path, costs=costs))
    size = parts_of(card_of(tmp_path))["size"]
    assert "The dense model was not measured." in size
    assert rows_of(size)["1 sample: milliseconds"] == ["12.5"]


def test_a_dense_model_that_was_built_to_be_timed_is_said(tmp_path):
    save_shrunk(tmp_path)
    costs = [one.model_copy(update={"dense_is_new": True}) for one in KNOWN["costs"]]
    save_record(tmp_path, record_of(tmp_path, costs=costs))
    size = parts_of(card_of(tmp_path))["size"]
    assert "The dense model was built for this comparison, with the original sizes and new weights." in size


def test_the_snippets_of_a_smaller_model_count_its_parameters(shrunk, monkeypatch):
    monkeypatch.chdir(shrunk.folder.parent)
    usage, check = snippets(shrunk.card)
    printed(usage, {})
    assert printed(check) == f"{shrunk.removed['parameters'][1]:,} parameters\n"


@pytest.mark.widths_per_layer
def test_a_card_says_that_the_import_is_needed_where_layers_differ(tmp_path, monkeypatch):
    global_neurons = PruningConfig(structure="neurons", scope="global", sparsity=0.75, begin=0, end=1, frequency=1)
    heads = PruningConfig(structure="heads", sparsity=0.5, begin=0, end=1, frequency=1)
    folder = tmp_path / "small"
    pruner = save_shrunk(folder, [global_neurons, heads])
    save_record(folder, record_of(folder, pruning=[config.to_dict() for config in pruner.configs], steps=2))
    card = card_of(folder)
    assert "75% of the neurons of all layers and 50% of the heads of each layer were removed" in card
    assert "opens with transformers after `import hf_prune` (`pip install\nhf-prune`)" in card
    assert "ranked across all layers" in card
    assert "without hf-prune" not in card
    monkeypatch.chdir(tmp_path)
    usage, check = snippets(card)
    assert usage.startswith("import hf_prune  #")
    printed(usage, {})
    assert printed(check) == f"{pruner.removed['parameters'][1]:,} parameters\n"


def test_the_criteria_of_units_are_cited(shrunk):
    assert "li2017pruning" in parts_of(shrunk.card)["citation"]


def test_what_was_removed_is_in_the_figures(shrunk):
    figures = Figures.model_validate_json(make_files(shrunk.folder)["sparsity.json"])
    assert figures.removed == make_report(shrunk.folder).removed
    assert figures.prunable_sparsity == 0.0


def test_a_picture_of_units_goes_when_nothing_is_removed_any_more(tmp_path):
    save_shrunk(tmp_path)
    write_card(tmp_path)
    assert (tmp_path / "assets" / "units.png").exists()
    assert not (tmp_path / "assets" / "layers.png").exists()
    (tmp_path / "pruning_structure.json").unlink()
    write_card(tmp_path)
    assert not (tmp_path / "assets" / "units.png").exists()
    assert (tmp_path / "assets" / "layers.png").exists()


@pytest.mark.parametrize(("number", "said"), [(999_999, "999,999"), (22_713_216, "22.7M"), (1_235_814_400, "1.2B")])
def test_numbers_of_parameters_are_rounded_from_a_million_on(number, said):
    removed = Removed((number, 5), (10, 5), (UnitsLeft("neurons", "a", 4, 1),), ())
    card = render_card(figures_of().model_copy(update={"removed": removed}), None, "x")
    assert f"75% of the neurons of each layer were removed: {said} parameters became 5**" in card


# ---- Snippets ----


def snippets(card):
    return re.findall(r"^```python\n(.*?)\n```$", parts_of(card)["usage"], re.DOTALL | re.MULTILINE)


def printed(code, namespace=None):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "snippet", "exec"), namespace if namespace is not None else {})
    return said.getvalue()


@pytest.mark.parametrize("name", PRUNABLE)
def test_the_snippets_run_as_they_stand_and_count_what_the_card_says(name, tmp_path, monkeypatch):
    card = card_of(save_with_record(tmp_path / "a model", name))
    monkeypatch.chdir(tmp_path)
    usage, check, _ = snippets(card)
    namespace = {}
    printed(usage, namespace)
    assert type(namespace["model"]) is type(ARCHITECTURES[name].build())
    share = rows_of(parts_of(card)["sparsity"])["all tensors"][2]
    assert printed(check) == f"{share} of all weights are zero\n"


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "resnet"])
def test_going_on_loses_no_zeros(name, tmp_path, monkeypatch):
    folder = save_with_record(tmp_path / "model", name, 0.5, pruning=[{"sparsity": 0.5, "exclude": [r".*\.1\..*"]}])
    monkeypatch.chdir(tmp_path)
    usage, _, go_on = snippets(card_of(folder))
    namespace = {
        "args": training_arguments(tmp_path / "out", max_steps=2),
        "train_dataset": ARCHITECTURES[name].examples(8),
    }
    printed(usage, namespace)
    model = namespace["model"]
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    printed(go_on, namespace)
    kept = [target.name for target in find_targets(model, None, [r".*\.1\..*"])]
    for key in kept:
        assert not torch.equal(before[key], model.get_parameter(key))
        assert not model.get_parameter(key)[before[key] == 0].any()
    others = [key for key in before if ".1." in key and before[key].ndim >= 2]
    assert any(bool(model.get_parameter(key)[before[key] == 0].any()) for key in others)


def tokenizer():
    words = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "a", "film", "the", "begins", "that", "stays"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize(("name", "said"), [("bert", "LABEL_"), ("gpt2", "The film begins")])
def test_with_a_tokenizer_the_pipeline_of_the_card_runs(name, said, tmp_path, monkeypatch):
    folder = save_with_record(tmp_path / "model", name)
    tokenizer().save_pretrained(folder)
    card = card_of(folder)
    monkeypatch.chdir(tmp_path)
    usage, check, go_on = snippets(card)
    assert "pipeline(" in usage
    assert said in printed(usage)
    # The snippet that goes on needs the model of the one before it.
    namespace = {"args": training_arguments(tmp_path / "out", max_steps=1), "train_dataset": None}
    namespace["train_dataset"] = ARCHITECTURES[name].examples(4)
    printed(check, namespace)
    printed(go_on, namespace)


@pytest.mark.parametrize("name", ['it"s', "a`b", "a'b c", "größe", "a\\b", "${HOME}", "a|b", "<b>"])
def test_the_snippets_run_in_a_folder_of_any_name(name, tmp_path, monkeypatch):
    card = card_of(save_with_record(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    assert printed(snippets(card)[1]).endswith("of all weights are zero\n")


def test_the_name_on_the_hub_is_in_the_snippets_where_it_is_known(whole):
    card = card_of(whole.folder, repo_id="ada/bert-pruned")
    assert 'from_pretrained("ada/bert-pruned")' in card
    assert "`hf-prune report ada/bert-pruned`" in card


# ---- The machine is not told ----


def test_no_path_of_the_machine_is_told(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (whole.folder, whole.folder.parent / ".." / whole.folder.parent.name / whole.folder.name):
        for name, content in make_files(folder).items():
            assert str(whole.folder.parent).encode() not in content, name
            assert whole.folder.parent.name.encode() not in content, name


# ---- The folder ----


def test_a_card_is_the_same_to_the_byte_each_time(whole):
    assert make_files(whole.folder) == make_files(whole.folder)
    assert set(make_files(whole.folder)) == {CARD_NAME, "sparsity.json", "assets/layers.png", "assets/schedule.png"}


def test_a_card_that_was_written_is_made_the_same_again(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN)
    write_card(folder)
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_card(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == first


def test_what_a_person_wrote_is_in_the_next_card(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN)
    path = write_card(folder)
    written = path.read_text(encoding="utf-8")
    mine = written.replace("<!-- hf-prune: end size -->\n", "<!-- hf-prune: end size -->\n\nMine: 100 €.\n")
    path.write_text(mine.replace("license: mit", "license: gpl-3.0"), encoding="utf-8-sig")
    write_card(folder)
    card = path.read_text(encoding="utf-8")
    assert "end size -->\n\nMine: 100 €.\n\n<!-- hf-prune: begin usage" in card
    assert metadata_of(card)["license"] == "gpl-3.0"
    assert card.count("Mine: 100 €.") == 1


def test_the_metadata_that_were_generated_are_in_the_figures(whole):
    files = make_files(whole.folder)
    generated = metadata_in(files["sparsity.json"].decode())
    assert generated == metadata_of(files[CARD_NAME].decode())
    figures = Figures.model_validate_json(files["sparsity.json"])
    assert generated == figures.metadata == json.loads(json.dumps(generated_metadata(figures, whole.record)))


def test_a_card_is_read_with_what_was_generated_for_it(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN)
    path = write_card(folder)
    generated = metadata_of(path.read_text(encoding="utf-8"))
    add_to_metadata(path, license="gpl-3.0")
    found = read_card(folder)
    assert (found.text, found.generated) == (path.read_text(encoding="utf-8"), generated)
    (folder / "sparsity.json").unlink()
    assert read_card(folder) == Existing(found.text, {})


@pytest.mark.parametrize(
    "figures", [None, "", "{", "null", "[]", "5", '"text"', "{}", '{"metadata": 5}', '{"metadata": null}', "NaN"]
)
def test_figures_of_others_have_no_metadata(figures):
    assert metadata_in(figures) == {}


def test_the_license_of_an_earlier_base_does_not_survive_a_new_one(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN)
    path = write_card(folder)
    base = Source(name="b/new", hub_name="b/new", license="apache-2.0", languages=["de"])
    save_record(folder, record_of(folder, **KNOWN | {"base_model": base}))
    metadata = metadata_of(write_card(folder).read_text(encoding="utf-8"))
    assert (metadata["license"], metadata["language"], metadata["base_model"]) == ("apache-2.0", ["de"], "b/new")
    add_to_metadata(path, license="gpl-3.0", language=["de", "no"])
    save_record(folder, record_of(folder, **KNOWN))
    metadata = metadata_of(write_card(folder).read_text(encoding="utf-8"))
    assert (metadata["license"], metadata["language"], metadata["base_model"]) == ("gpl-3.0", ["en", "no"], "ada/bert")


def test_what_is_not_chosen_any_more_goes(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN, chosen={"license": "gpl-3.0", "language": ["de"]}, tags=["film"])
    metadata = metadata_of(write_card(folder).read_text(encoding="utf-8"))
    assert (metadata["license"], metadata["language"]) == ("gpl-3.0", ["de"])
    save_record(folder, record_of(folder, **KNOWN))
    metadata = metadata_of(write_card(folder).read_text(encoding="utf-8"))
    assert (metadata["license"], metadata["language"]) == ("mit", ["en"])
    assert "film" not in metadata["tags"]


@pytest.mark.parametrize("name", ["my\nlicense", "my license\u0007", " my  license", "my license\ud800"])
def test_what_was_chosen_is_on_a_single_line(tmp_path, name):
    files = make_files(save_with_record(tmp_path, chosen={"license": name}))
    assert metadata_of(files[CARD_NAME].decode())["license"] == "my license"


def test_what_was_changed_on_the_hub_since_the_push_counts(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN)
    path = write_card(folder)
    end = "<!-- hf-prune: end size -->\n"
    pushed = (
        path.read_text(encoding="utf-8").replace(end, f"{end}\nMine.\n").replace("license: mit", "license: gpl-3.0")
    )
    path.write_text(pushed, encoding="utf-8")
    generated = read_card(folder).generated

    @cache
    def merged(old, new, before=pushed):
        files = make_files(folder, "ada/bert", Existing(pushed.replace(old, new), generated), before)
        return files[CARD_NAME].decode()

    assert "Mine." in merged("", "")
    assert "Mine." not in merged("\nMine.\n", "")
    assert "Hers." in merged("Mine.", "Hers.")
    assert "Mine." not in merged("Mine.", "Hers.")
    assert metadata_of(merged("", ""))["license"] == "gpl-3.0"
    assert metadata_of(merged("license: gpl-3.0", "license: mit"))["license"] == "mit"
    assert metadata_of(merged("license: gpl-3.0", "license: bsd"))["license"] == "bsd"
    assert "Mine." in merged("\nMine.\n", "", None)
    assert "\nHers.\n\nMine.\n" in merged("Mine.", "Hers.", None)
    assert metadata_of(merged("license: gpl-3.0", "license: bsd", None))["license"] == "gpl-3.0"


def test_after_a_push_the_card_is_made_the_same(tmp_path):
    folder = save_with_record(tmp_path, **KNOWN)
    path = write_card(folder, "ada/bert")
    path.write_text(f"Top.\n\n{body_of(path.read_text(encoding='utf-8'))}\n\nEnd.", encoding="utf-8")
    first = make_files(folder, "ada/bert")
    for name in (CARD_NAME, "sparsity.json"):
        (folder / name).write_bytes(first[name])
    assert make_files(folder, "ada/bert", read_card(folder), first[CARD_NAME].decode()) == first


def test_a_card_in_whose_place_is_a_folder_is_refused_by_name(tmp_path):
    save_sparse("bert", tmp_path)
    (tmp_path / CARD_NAME).mkdir()
    with pytest.raises(CardError, match=CARD_NAME):
        make_files(tmp_path)


def test_a_card_that_is_no_utf8_is_refused_by_name(tmp_path):
    save_sparse("bert", tmp_path)
    (tmp_path / CARD_NAME).write_bytes("Größe".encode("latin-1"))
    with pytest.raises(CardError, match=CARD_NAME):
        make_files(tmp_path)


def test_without_a_card_there_is_none_to_read(tmp_path):
    assert read_card(tmp_path) is None


# ---- Names from outside ----


def figures_of(name="bert", pruning=(), target_sparsity=0.5, tensors=None, files=("model.safetensors",), note=None):
    counted = TensorReport(name="bert.encoder.weight", shape=[4, 4], weights=16, zeros=8, prunable=True)
    return Figures(
        model=name,
        architecture="BertForSequenceClassification",
        has_tokenizer=False,
        pruning=list(pruning),
        target_sparsity=target_sparsity,
        prunable_sparsity=0.5,
        overall_sparsity=0.5,
        file_bytes=100,
        note=note,
        files={file: SavedFile(size=100, sha256="0" * 64) for file in files},
        evaluations=[],
        metadata={},
        tensors=tensors or [counted],
    )


FIELDS = (
    *("name", "location", "base name", "base hub name", "base revision", "base license", "language", "tag"),
    *("data name", "data hub name", "data revision", "data config", "data split", "metric", "dense metric"),
    *("data rows", "part", "not finite", "override", "training data", "training data hub name"),
    *("training data revision", "training data config", "training data split", "training data rows"),
    *("tensor", "file", "note", "target", "exclude", "argument", "value", "nested value", "recipe key", "recipe value"),
    *("processor", "accelerator", "version name", "version", "country", "shape", "chosen license", "second metric"),
    *("given in", "saved as", "method", "method words", "method paper", "removed stack"),
)


def card_with(names):
    """A card in which every name is the plain one, but for those that are given."""

    def name(field):
        return names.get(field, "plain")

    names_of_tensors = {"targets": [name("target")], "exclude": [name("exclude")], "overrides": {name("override"): 0.1}}
    config = PruningConfig(sparsity=0.5).to_dict() | names_of_tensors
    pruning = [config, config | {"method": name("method")}, config | {"method": "recorded"}]
    counted = {"shape": [4, 4], "weights": 16, "zeros": 8, "prunable": True}
    tensors = [TensorReport(name=name("tensor"), **counted), TensorReport("a", **counted, saved_as=name("saved as"))]
    figures = figures_of(name("name"), pruning, tensors=tensors, files=[name("file")], note=name("note"))
    layers = (LayersLeft(name("removed stack"), 2, (0,)), LayersLeft("other", 3, (0,)))
    removed = Removed((9, 5), (8, 4), (UnitsLeft("neurons", "a", 4, 1),), layers)
    figures = figures.model_copy(update={"removed": removed})
    metrics = {name("metric"): 0.5, "f1": 0.25} | ({name("second metric"): 0.125} if "second metric" in names else {})
    record = RunRecord.model_construct(
        name=name("name"),
        chosen={"license": name("chosen license")},
        tags=[name("tag")],
        base_model=Source(
            name=name("base name"),
            hub_name=name("base hub name"),
            revision=name("base revision"),
            license=name("base license"),
            languages=[name("language")],
        ),
        pruning=pruning,
        methods={"recorded": Method(words=name("method words"), paper=name("method paper"))},
        steps=5,
        seed=1,
        training_arguments={name("argument"): name("value"), "nested": {"a": [name("nested value")]}},
        recipe={name("recipe key"): [{"a": name("recipe value")}]},
        training_data=Source(
            name=name("training data"),
            hub_name=name("training data hub name"),
            revision=name("training data revision"),
            config=name("training data config"),
            split=name("training data split"),
            rows=name("training data rows"),
        ),
        evaluations=[
            Evaluation(
                metrics=metrics,
                main_metric=name("metric"),
                not_finite=[name("not finite")],
                dense_metrics={name("metric"): 0.5, name("dense metric"): 0.5},
                dataset=Source(
                    name=name("data name"),
                    hub_name=name("data hub name"),
                    revision=name("data revision"),
                    config=name("data config"),
                    split=name("data split"),
                    rows=name("data rows"),
                ),
            ),
            Evaluation(metrics={"f1": 0.5}, main_metric="f1", part=name("part")),
            Evaluation(metrics={"f1": 0.5}, main_metric="f1", given_in=name("given in")),
        ],
        costs=[Cost(shapes={name("shape"): [1, 8]}, passes=3, model=PassCost(seconds=0.5))],
        hardware=Hardware(processor=name("processor"), cores=2, threads=1, accelerator=name("accelerator")),
        emissions=Emissions(kilograms=0.5, kilowatt_hours=0.1, country=name("country"), seconds=1.0),
        versions={name("version name"): name("version")},
    )
    return render_card(figures, record, name("location"))


@cache
def plain_tags(with_second_metric):
    return tags_of(card_with({"second metric": "wholly-plain"} if with_second_metric else {}))


def tags_of(card):
    return Elements(MARKDOWN.render(body_of(card))).tags


names_from_outside = (
    texts | st.sampled_from(["<!-- hf-prune: end usage -->", "\n<!-- hf-prune: end summary -->\n"])
).filter(lambda text: single_line(text))


quick = settings(max_examples=10, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


@pytest.mark.parametrize("field", FIELDS)
@quick
@given(text=names_from_outside)
@example(text="a`b <b> [x](y) | **c** <!-- d")
@example(text="\n<!-- hf-prune: end usage -->\n")
@example(text="- a) 'b' \"c\": {d}")
def test_a_name_from_outside_breaks_nothing(field, text):
    text = text.encode("utf-8", "replace").decode()
    card = card_with({field: text})
    assert tags_of(card) == plain_tags(with_second_metric=field == "second metric")
    assert [name for name, _, _ in split_body(body_of(card)).parts] == ALL_PARTS_OF_NAMES
    assert card.encode()
    in_metadata(field, single_line(text), metadata_of(card))


ALL_PARTS_OF_NAMES = ["summary", "removed", *(name for name in ALL_PARTS[1:] if name != "schedule")]


def in_metadata(field, line, metadata):
    """Check that the metadata has the name, where it is told there, on a single line."""
    (index,) = metadata["model-index"]
    dataset = index["results"][0]["dataset"]
    found = {
        "name": [index["name"]],
        "base hub name": [metadata["base_model"]],
        "language": metadata["language"],
        "tag": metadata["tags"],
        "chosen license": [metadata["license"]],
        "data hub name": [dataset["type"], metadata["datasets"][0]],
        "data name": [dataset["name"]],
        "data config": [dataset["config"]],
        "data split": [dataset["split"]],
        "metric": metadata["metrics"],
        "second metric": metadata["metrics"],
    }
    if field in found:
        assert line in found[field]
    assert metadata["license"] == (line if field == "chosen license" else "plain")


@quick
@given(st.fixed_dictionaries({field: names_from_outside for field in FIELDS if field != "second metric"}))
def test_all_names_from_outside_together_break_nothing(names):
    names = {field: text.encode("utf-8", "replace").decode() for field, text in names.items()}
    card = card_with(names)
    assert [name for name, _, _ in split_body(body_of(card)).parts] == ALL_PARTS_OF_NAMES
    assert metadata_of(card)["model-index"][0]["name"] == single_line(names["name"])
