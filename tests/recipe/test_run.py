import csv
import json
import re
import shutil
import subprocess
import sys
import threading

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from test_metrics import SCRIPT as METRIC
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from hf_prune import DistillationConfig, PruningConfigError, TargetError
from hf_prune.errors import RecipeError, ReportError
from hf_prune.publish.record import load_record
from hf_prune.recipe import data
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.outcome import RunResult, describe_data
from hf_prune.recipe.prepare import prepare
from hf_prune.recipe.run import run
from hf_prune.recipe.schema import DatasetSection, Recipe
from hf_prune.saved.report import Report
from hf_prune.saved.zeros import TensorReport
from hf_prune.trainer.checkpoints import UNFINISHED

USER_ERRORS = (PruningConfigError, RecipeError, ReportError, TargetError)

GOOD = ("good", "great", "fine", "lovely", "superb")
BAD = ("bad", "awful", "poor", "dull", "weak")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *GOOD, *BAD, "the", "film", "was", *(str(digit) for digit in range(10)))

TEST_SIZE, VALIDATION_SIZE = 20, 8
ROWS = 80

# The weights that are pruned by default, written out for this one model.
PRUNABLE = re.compile(r"bert\.encoder\.layer\.\d\..*(query|key|value|dense)\.weight")


def load_data(section):
    """The parts of a data set with the columns of text and label."""
    return data.load_data(section, {"text_column": section.text_column, "label_column": section.label_column})


def save_tiny_bert(folder, vocabulary=VOCABULARY):
    """A BERT without a head, and a WordPiece tokenizer that knows the words of the reviews."""
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, vocabulary.index(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{word.strip('[]').lower()}_token": word for word in SPECIAL}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)


def reviews(count=ROWS):
    """Reviews that a tiny model can learn, all different; every ninth label is wrong, so that no one gets all."""
    rows = []
    for number in range(count):
        label = number % 2
        words = GOOD if label else BAD
        praise = " ".join(words[number // step % 5] for step in (1, 2, 3))
        text = f"the film was {praise} {number // 10} {number % 10}"
        label = 1 - label if number % 9 == 0 else label
        source = "a" if number % 3 else "b"
        rows.append({"text": text, "label": label, "answer": ("no", "yes")[label], "source": source})
    return rows


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_recipe(folder, material, **changes):
    """A recipe for the tiny model; `changes` are dotted keys, with `__` for the dot."""
    content = {
        "task": "text-classification",
        "output_dir": str(folder / "out"),
        "model": {"name": str(material / "model")},
        "dataset": {
            "name": str(material / "reviews.csv"),
            "validation_size": VALIDATION_SIZE,
            "test_size": TEST_SIZE,
            "max_length": 16,
        },
        "metrics": ["accuracy"],
        "training": {
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "dataloader_pin_memory": False,
        },
        "dense": None,
        "pruning": {"sparsity": 0.5},
    }
    for name, value in changes.items():
        *path, key = name.split("__")
        section = content
        for part in path:
            section = section[part]
        section[key] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def tree(*folders):
    """Everything in the folders: path -> size and time of the last change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for folder in folders for path in folder.rglob("*")
    }


def quiet_run(path):
    said = []
    return run(load_recipe(path), say=said.append), said


def parts_by_hand(rows, seed=0):
    """Test, validation and training part: shuffled by numpy's default generator, repeated texts dropped."""
    first = {}
    for row in rows:
        first.setdefault(row["text"], row)
    unique = list(first.values())
    shuffled = [unique[index] for index in np.random.default_rng(seed).permutation(len(unique))]
    cuts = (TEST_SIZE, TEST_SIZE + VALIDATION_SIZE)
    return shuffled[: cuts[0]], shuffled[cuts[0] : cuts[1]], shuffled[cuts[1] :]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model and a data set; no test may change them."""
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    write_csv(folder / "reviews.csv", reviews())
    return folder


OPEN_PLAINLY = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

guesses = {}
texts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, problems = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values()), problems
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    guesses[folder] = [int(row.argmax()) for row in logits]
assert not any(name.split(".")[0] == "hf_prune" for name in sys.modules)
print(json.dumps(guesses))
"""


def start_plain_process(out):
    """Opens both saved models and asks them of the test part, at work while other tests are."""
    test, _, _ = parts_by_hand(reviews())
    folders = [str(out / name) for name in ("dense", "model")]
    command = [sys.executable, "-c", OPEN_PLAINLY, json.dumps([row["text"] for row in test]), *folders]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=out)


# ---- A whole run: dense first, then pruned at a learning rate of 0, so that what is kept can be compared ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, material):
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(
        folder,
        material,
        model__freeze=["bert\\.embeddings\\.position.*"],
        metrics=["f1", "accuracy"],
        training__learning_rate=0.0,
        pruning__sparsity=0.8125,
        training__eval_strategy="steps",
        training__eval_steps=0.5,
        dense={"learning_rate": 1e-2, "max_steps": 40},
    )
    before = tree(material)
    result, said = quiet_run(path)
    assert tree(material) == before
    with start_plain_process(folder / "out") as process:
        yield {"path": path, "out": folder / "out", "result": result, "said": said, "process": process}
        process.kill()


def test_the_dense_run_learned_something_and_not_everything(finished):
    print(finished["result"].dense, finished["result"].pruned)
    assert 0.6 < finished["result"].dense["accuracy"] < 1


def test_results_are_written_as_they_are_returned(finished):
    result = finished["result"]
    written = json.loads((finished["out"] / "results.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result.to_dict()))
    assert (written["dense"], written["pruned"], written["test_samples"]) == (result.dense, result.pruned, TEST_SIZE)
    assert set(written["seconds"]) == {"dense", "pruned"}
    assert all(seconds > 0 for seconds in written["seconds"].values())


def test_the_recipe_in_the_results_is_the_one_that_was_run(finished):
    written = json.loads((finished["out"] / "results.json").read_text(encoding="utf-8"))
    assert Recipe(**written["recipe"]).model_dump() == load_recipe(finished["path"]).model_dump()


def test_recovery_is_the_first_metric_of_the_pruned_model_over_that_of_the_dense_one(finished):
    result = finished["result"]
    assert result.main_metric == "f1"
    assert result.recovery == result.pruned["f1"] / result.dense["f1"]
    assert result.to_dict()["recovery"] == result.recovery


def test_sparsity_in_the_results_is_that_of_the_file(finished):
    weights = load_file(finished["out"] / "model" / "model.safetensors")
    pruned = {name: tensor for name, tensor in weights.items() if PRUNABLE.fullmatch(name)}
    assert len(pruned) == 12
    written = json.loads((finished["out"] / "results.json").read_text(encoding="utf-8"))
    for share, tensors in (("prunable_sparsity", pruned), ("overall_sparsity", weights)):
        zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
        assert written[share] == zeros / sum(tensor.numel() for tensor in tensors.values())
    assert written["prunable_sparsity"] == 0.8125


def test_the_pruned_run_goes_on_from_the_dense_one_and_drops_its_smallest_weights(finished):
    dense = load_file(finished["out"] / "dense" / "model.safetensors")
    pruned = load_file(finished["out"] / "model" / "model.safetensors")
    assert pruned.keys() == dense.keys()
    for name, weight in pruned.items():
        if PRUNABLE.fullmatch(name):
            dropped = weight == 0
            assert int(dropped.sum()) == weight.numel() * 13 // 16
            assert dense[name][dropped].abs().max() <= dense[name][~dropped].abs().min()
            assert torch.equal(weight, dense[name] * ~dropped)
        else:
            assert torch.equal(weight, dense[name])


def test_frozen_parameters_stay_as_they_were_and_others_are_trained(finished, material):
    start = load_file(material / "model" / "model.safetensors")
    dense = load_file(finished["out"] / "dense" / "model.safetensors")
    for name, weight in start.items():
        if name == "embeddings.position_embeddings.weight":
            assert torch.equal(dense[f"bert.{name}"], weight), name
        elif name.endswith("weight") and not name.startswith("embeddings.token_type"):
            assert not torch.equal(dense[f"bert.{name}"], weight), name


def test_what_is_written_lies_in_the_output_folder(finished):
    out = finished["out"]
    assert {path.name for path in out.iterdir()} == {"dense", "model", "results.json"}
    assert [path for path in finished["result"].files if not path.exists()] == []
    for name in ("dense", "model"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (out / name).iterdir()}
    ours = {"pruning_config.json", "pruning_masks.safetensors", "pruning_state.json"}
    assert ours <= {path.name for path in (out / "model").iterdir()}
    assert ours.isdisjoint(path.name for path in (out / "dense").iterdir())


@pytest.mark.parametrize("name", ["schedule.png", "layers.png"])
def test_pictures_of_a_run_open(finished, name):
    with Image.open(finished["out"] / "model" / "assets" / name) as picture:
        picture.verify()
        assert picture.format == "PNG"


def test_a_run_says_what_it_does_and_what_came_of_it(finished):
    said, result = "\n".join(finished["said"]), finished["result"]
    assert "Fine-tuning the dense model" in said
    assert "81.2% of 3,584 prunable weights" in said
    for values in (result.dense, result.pruned):
        assert f"f1 {values['f1']:.4f}, accuracy {values['accuracy']:.4f}" in said


def test_a_run_into_a_folder_that_has_a_run_replaces_it(finished, material, tmp_path):
    shutil.copytree(finished["out"], tmp_path / "out")
    path = write_recipe(tmp_path, material, pruning__sparsity=0.25, training__max_steps=2, pruning__begin=0)
    result, _ = quiet_run(path)
    assert result.report.prunable_sparsity == 0.25
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["prunable_sparsity"] == 0.25


# ---- A run without a dense one: words for labels, JSON, two configurations ----


@pytest.fixture(scope="module")
def pruned_only(tmp_path_factory, material):
    folder = tmp_path_factory.mktemp("pruned_only")
    (folder / "reviews.json").write_text(json.dumps(reviews()), encoding="utf-8")
    attention, rest = (
        r"bert\.encoder\..*attention\.self.*weight",
        r"bert\.encoder\..*(intermediate|output)\.dense.weight",
    )
    path = write_recipe(
        folder,
        material,
        dataset__name=str(folder / "reviews.json"),
        dataset__label_column="answer",
        model__freeze=["bert\\.embeddings\\..*"],
        pruning=[{"sparsity": 0.75, "targets": [attention]}, {"sparsity": 0.25, "targets": [rest], "end": None}],
    )
    result, said = quiet_run(path)
    return {"out": folder / "out", "result": result, "said": said}


def test_without_a_dense_run_there_is_nothing_to_compare_with(pruned_only):
    written = json.loads((pruned_only["out"] / "results.json").read_text(encoding="utf-8"))
    assert (written["dense"], written["recovery"]) == (None, None)
    assert set(written["seconds"]) == {"pruned"}
    assert not (pruned_only["out"] / "dense").exists()
    assert not any("dense" in line for line in pruned_only["said"])


def test_a_target_is_searched_shown_and_reached(tmp_path, material):
    folder = tmp_path / "run"
    folder.mkdir()
    path = write_recipe(folder, material, pruning={"target_parameters": 0.9, "begin": 1, "end": 3})
    result, said = quiet_run(path)
    chosen = json.loads((folder / "out" / "model" / "pruning_search.json").read_text(encoding="utf-8"))
    assert result.parameters["pruned"] == chosen["candidate"]["parameters"] <= 0.9 * chosen["dense"]["parameters"]
    [table] = [text for text in said if "times as fast" in text]
    assert "Chosen for 90.0% of the parameters" in table
    card = (folder / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "Asked for 90.0% of the parameters" in card
    path = write_recipe(folder, material, pruning={"target_speedup": 1e6})
    with pytest.raises(RecipeError, match=r"pruning\.target_speedup: expected at most"):
        quiet_run(path)


def test_several_configurations_prune_each_its_own_tensors(pruned_only):
    weights = load_file(pruned_only["out"] / "model" / "model.safetensors")
    for name, weight in weights.items():
        if PRUNABLE.fullmatch(name):
            share = 0.75 if "attention.self" in name else 0.25
            assert int((weight == 0).sum()) == weight.numel() * share, name
    configs = json.loads((pruned_only["out"] / "model" / "pruning_config.json").read_text(encoding="utf-8"))["configs"]
    assert [config["sparsity"] for config in configs] == [0.75, 0.25]


def test_words_for_labels_become_the_names_of_the_models_labels(pruned_only):
    config = transformers.AutoConfig.from_pretrained(pruned_only["out"] / "model")
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}


def test_a_pruned_run_trains_what_is_not_frozen(pruned_only, material):
    start = load_file(material / "model" / "model.safetensors")
    weights = load_file(pruned_only["out"] / "model" / "model.safetensors")
    for name, before in start.items():
        after = weights[f"bert.{name}"]
        kept = after != 0
        if name.endswith("weight"):
            assert torch.equal(after[kept], before[kept]) == name.startswith("embeddings."), name


def test_recovery_is_none_where_the_dense_metric_is_zero():
    report = Report("m", [TensorReport("a", (2,), 2, 1, True)], 8)
    result = RunResult({}, {"f1": 0.0}, {"f1": 0.5}, {}, None, report, "f1", 3, {}, [], [], {}, {})
    assert result.recovery is None
    assert result.to_dict()["recovery"] is None


# ---- What a seed fixes ----


def test_the_same_recipe_starts_from_the_same_model_whatever_random_numbers_came_before(material, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, material))
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(prepare(recipe).model.classifier.weight.detach().clone())
    assert torch.equal(*heads)


def test_dense_and_pruned_run_do_not_share_a_folder_of_checkpoints(material, tmp_path):
    # Where they do, the last checkpoint of a longer dense run is taken for the newest, and rotation mixes them up.
    path = write_recipe(
        tmp_path,
        material,
        dense={"max_steps": 6},
        training__save_strategy="steps",
        training__save_steps=2,
    )
    quiet_run(path)
    folders = {}
    for checkpoint in (tmp_path / "out").rglob("checkpoint-*"):
        assert (checkpoint / "model.safetensors").exists()
        masked = (checkpoint / "pruning_masks.safetensors").exists()
        folders.setdefault(checkpoint.parent, []).append((checkpoint.name, masked))
    assert sorted(map(sorted, folders.values())) == [
        [(f"checkpoint-{step}", False) for step in (2, 4, 6)],
        [(f"checkpoint-{step}", True) for step in (2, 4)],
    ]


# ---- Data: the same parts from every kind of source ----


def section(name, **changes):
    sizes = {"validation_size": VALIDATION_SIZE, "test_size": TEST_SIZE}
    return DatasetSection(name=str(name), **sizes | changes)


def texts(part):
    return list(part["text"])


def save_json(folder, rows):
    (folder / "reviews.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "reviews.json"


def save_json_lines(folder, rows):
    (folder / "reviews.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder / "reviews.jsonl"


def save_parquet(folder, rows):
    datasets.Dataset.from_list(rows).to_parquet(folder / "reviews.parquet")
    return folder / "reviews.parquet"


def save_to_disk(folder, rows):
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(folder / "saved")
    return folder / "saved"


def save_one_part_to_disk(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def save_csv_folder(folder, rows):
    (folder / "data").mkdir()
    write_csv(folder / "data" / "train.csv", rows)
    return folder / "data"


def save_parquet_folder(folder, rows):
    (folder / "data" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "data" / "train-00000-of-00001.parquet")
    return folder / "data"


SAVERS = {
    "csv": lambda folder, rows: write_csv(folder / "reviews.csv", rows),
    "json": save_json,
    "json lines": save_json_lines,
    "parquet": save_parquet,
    "save_to_disk": save_to_disk,
    "save_to_disk of one part": save_one_part_to_disk,
    "folder of csv": save_csv_folder,
    "folder of parquet": save_parquet_folder,
}


@pytest.mark.parametrize("kind", SAVERS)
def test_every_kind_of_source_gives_the_same_parts(kind, tmp_path):
    name = SAVERS[kind](tmp_path, reviews())
    parts = load_data(section(name))
    for part, expected in zip(("test", "validation", "train"), parts_by_hand(reviews()), strict=True):
        assert texts(parts[part]) == [row["text"] for row in expected]
        assert list(parts[part]["label"]) == [row["label"] for row in expected]


@pytest.mark.parametrize("kind", SAVERS)
def test_a_source_is_only_read(kind, tmp_path, material):
    (tmp_path / "data").mkdir()
    name = SAVERS[kind](tmp_path / "data", reviews())
    path = write_recipe(tmp_path, material, dataset__name=str(name))
    before = tree(tmp_path, material)
    prepare(load_recipe(path))
    assert tree(tmp_path, material) == before


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """A file in which 30 of the texts are there twice."""
    return write_csv(tmp_path_factory.mktemp("repeated") / "reviews.csv", reviews() + reviews(30))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(test=st.integers(1, 30), validation=st.integers(1, 30), seed=st.integers(0, 5))
def test_parts_are_disjoint_complete_and_fixed_by_the_seed(repeated, test, validation, seed):
    request = section(repeated, test_size=test, validation_size=validation, split_seed=seed)
    parts = load_data(request)
    assert (len(parts["test"]), len(parts["validation"])) == (test, validation)
    together = [text for part in parts.values() for text in texts(part)]
    assert len(together) == len(set(together))
    assert set(together) == {row["text"] for row in reviews()}
    again = load_data(request)
    assert all(texts(parts[part]) == texts(again[part]) for part in parts)


def test_another_seed_cuts_other_parts(material):
    first, second = (load_data(section(material / "reviews.csv", split_seed=seed)) for seed in (0, 1))
    assert set(texts(first["test"])) != set(texts(second["test"]))


def test_of_a_repeated_text_the_first_row_counts(tmp_path):
    rows = [*reviews(), {**reviews()[0], "label": 1 - reviews()[0]["label"]}]
    parts = load_data(section(write_csv(tmp_path / "reviews.csv", rows)))
    labels = {row["text"]: row["label"] for part in parts.values() for row in part}
    assert labels[rows[0]["text"]] == rows[0]["label"]


def test_rows_are_chosen_by_the_values_of_columns(material):
    parts = load_data(section(material / "reviews.csv", where={"source": "a", "label": 1}, test_size=5))
    chosen = {row["text"] for row in reviews() if row["source"] == "a" and row["label"] == 1}
    assert {text for part in parts.values() for text in texts(part)} == chosen


def test_training_samples_are_limited_after_the_other_parts_are_cut(material):
    parts = load_data(section(material / "reviews.csv", max_train_samples=7))
    test, validation, train = parts_by_hand(reviews())
    assert texts(parts["train"]) == [row["text"] for row in train[:7]]
    assert texts(parts["test"]) == [row["text"] for row in test]
    assert texts(parts["validation"]) == [row["text"] for row in validation]


def test_a_limit_above_the_training_samples_that_there_are_takes_all(material):
    assert len(load_data(section(material / "reviews.csv", max_train_samples=1000))["train"]) == ROWS - 28


@pytest.fixture(params=["csv", "parquet", "save_to_disk"])
def split_folder(request, tmp_path):
    """A data set with parts of its own, as one on the Hub has them."""
    folder = tmp_path / "user" / "data"
    folder.mkdir(parents=True)
    rows = reviews()
    parts = {"train": rows[:50] + rows[:10], "validation": rows[50:60], "test": rows[60:]}
    if request.param == "save_to_disk":
        saved = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
        datasets.DatasetDict(saved).save_to_disk(folder)
    for name, part in parts.items():
        if request.param == "csv":
            write_csv(folder / f"{name}.csv", part)
        elif request.param == "parquet":
            datasets.Dataset.from_list(part).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def test_parts_of_its_own_are_taken_as_they_are(split_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"validation_size": None, "test_size": None, "validation_split": "validation", "test_split": "test"}
    parts = load_data(section("user/data", **own))
    rows = [row["text"] for row in reviews()]
    assert texts(parts["train"]) == rows[:50] + rows[:10]
    assert texts(parts["validation"]) == rows[50:60]
    assert texts(parts["test"]) == rows[60:]


def test_a_part_of_its_own_goes_beside_one_that_is_cut(split_folder):
    parts = load_data(section(split_folder, test_size=None, test_split="test"))
    rows = [row["text"] for row in reviews()]
    assert texts(parts["test"]) == rows[60:]
    assert len(parts["validation"]) == VALIDATION_SIZE
    assert sorted(texts(parts["train"]) + texts(parts["validation"])) == sorted(rows[:50])


def test_a_training_split_may_have_another_name(split_folder):
    parts = load_data(section(split_folder, train_split="test", test_size=4))
    assert {text for part in parts.values() for text in texts(part)} == {row["text"] for row in reviews()[60:]}


def test_a_configuration_of_a_data_set_is_chosen_by_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_csv(folder / "short.csv", reviews(40))
    write_csv(folder / "long.csv", reviews(60))
    configs = [{"config_name": name, "data_files": f"{name}.csv"} for name in ("short", "long")]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")
    for name, count in (("short", 40), ("long", 60)):
        assert sum(map(len, load_data(section(folder, config=name)).values())) == count
    with pytest.raises(RecipeError, match="dataset"):
        load_data(section(folder, config="middle"))


# ---- Labels and tokens, as the model gets them ----


def prepared(folder, material, **changes):
    return prepare(load_recipe(write_recipe(folder, material, **changes)))


def test_prepared_data_are_tokens_and_labels_of_the_parts(tmp_path, material):
    ready = prepared(tmp_path, material, dataset__max_length=6)
    test, _, _ = parts_by_hand(reviews())
    for example, row in zip(ready.data["test"], test, strict=True):
        words = ["[CLS]", *row["text"].split()[:4], "[SEP]"]
        assert example["input_ids"] == [VOCABULARY.index(word) for word in words]
        assert example["labels"] == row["label"]
    assert "text" not in ready.data["train"].column_names


def test_the_source_of_rows_that_are_held_out_tells_other_sizes_apart(tmp_path, material):
    ready = prepared(tmp_path, material, dataset__test_size=20, dataset__validation_size=8, dataset__split_seed=3)
    assert describe_data(ready, "test").rows == "20 rows held out of train with seed 3"
    assert describe_data(ready, "validation").rows == "8 rows held out of train after 20 for testing with seed 3"
    assert describe_data(ready, "train").rows == "the other rows of train"
    assert [describe_data(ready, part).split for part in ("train", "validation", "test")] == [None, None, None]


def test_the_source_of_a_split_under_another_name_tells_it(tmp_path, material):
    section = DatasetSection(name=str(material / "reviews.csv"), test_split="train", train_split="other")
    rows = data.load_rows(section.model_copy(update={"train_split": "train"}), {"text_column": "text"})
    assert data.source_of(section, rows, "test").split == "train"
    assert data.source_of(section, rows, "train").split == "other"


def test_class_labels_keep_their_names_and_numbers(tmp_path, material):
    names = ["awful", "lovely", "never used"]
    rows = datasets.Dataset.from_list(reviews()).cast_column("label", datasets.ClassLabel(names=names))
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    ready = prepared(tmp_path, material, dataset__name=str(tmp_path / "saved"))
    assert ready.model.config.id2label == dict(enumerate(names))
    assert ready.model.num_labels == 3
    assert set(ready.data["train"]["labels"]) == {0, 1}


def test_numbers_for_labels_need_not_start_at_zero(tmp_path, material):
    rows = [{**row, "label": (row["label"] + 1) * 5} for row in reviews()]
    ready = prepared(tmp_path, material, dataset__name=str(write_csv(tmp_path / "reviews.csv", rows)))
    assert ready.model.config.id2label == {0: "5", 1: "10"}
    test, _, _ = parts_by_hand(reviews())
    assert list(ready.data["test"]["labels"]) == [row["label"] for row in test]


def test_columns_may_have_other_names(tmp_path, material):
    rows = [{"sentence": row["text"], "labels": row["label"]} for row in reviews()]
    ready = prepared(
        tmp_path,
        material,
        dataset__name=str(write_csv(tmp_path / "reviews.csv", rows)),
        dataset__text_column="sentence",
        dataset__label_column="labels",
    )
    test, _, _ = parts_by_hand(reviews())
    assert list(ready.data["test"]["labels"]) == [row["label"] for row in test]


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_a_test_part_may_have_more_or_fewer_other_columns(change, tmp_path, material):
    rows = reviews()
    test = [{**row, "year": 1999} for row in rows[60:]]
    if change == "fewer":
        test = [{"text": row["text"], "label": row["label"]} for row in rows[60:]]
    saved = {"train": datasets.Dataset.from_list(rows[:60]), "test": datasets.Dataset.from_list(test)}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    ready = prepared(
        tmp_path,
        material,
        dataset__name=str(tmp_path / "saved"),
        dataset__test_size=None,
        dataset__test_split="test",
    )
    assert list(ready.data["test"]["labels"]) == [row["label"] for row in test]


# ---- What is refused, before anything is written ----


def refusal(folder, material, **changes):
    """The one line that a recipe with these changes is refused with; not a file is written or changed."""
    path = write_recipe(folder, material, **changes)
    before = tree(folder, material)
    with pytest.raises(USER_ERRORS) as caught:
        quiet_run(path)
    assert tree(folder, material) == before
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dataset__label_column": "lable"}, ["dataset.label_column", "text, label, answer, source", "'lable'"]),
        ({"dataset__text_column": "txt"}, ["dataset.text_column", "text, label, answer, source", "'txt'"]),
        ({"dataset__text_column": "label"}, ["dataset.text_column"]),
        ({"dataset__train_split": "trian"}, ["dataset.train_split", "train", "'trian'"]),
        ({"dataset__test_split": "test", "dataset__test_size": None}, ["dataset.test_split", "train", "'test'"]),
        ({"dataset__test_size": 80}, ["dataset.test_size", "1 to 79", "80"]),
        ({"dataset__validation_size": 60}, ["dataset.validation_size", "1 to 59", "60"]),
        ({"dataset__test_split": "test"}, ["dataset.test_s", "but not both", "got both"]),
        ({"dataset__validation_size": None}, ["dataset.validation_s", "but not both", "got neither"]),
        ({"dataset__where": {"source": "z"}}, ["dataset.where", "source", "'z'"]),
        ({"dataset__where": {"sorce": "a"}}, ["dataset.where", "source", "'sorce'"]),
        ({"dataset__name": "user/no-such-data"}, ["dataset.name", "user/no-such-data"]),
        ({"dataset__name": "./no-such.csv"}, ["dataset.name", "no-such.csv"]),
        ({"model__name": "user/no-such-model"}, ["model.name"]),
        ({"model__name": "./no-such-model"}, ["model.name", "no-such-model"]),
        ({"model__name": "package:no_such_package/model"}, ["model.name", "no_such_package"]),
        ({"model__freeze": ["bert.nothing.*"]}, ["model.freeze", "bert.nothing.*", "nearest"]),
        ({"metrics": ["acuracy"]}, ["metrics", "'acuracy'", "did you mean 'accuracy'?"]),
        ({"pruning__targets": ["encoder.*"]}, ["pruning.targets", "'encoder.*'", "nearest"]),
        ({"pruning__exclude": ["encoder.*"]}, ["pruning.exclude", "'encoder.*'", "nearest"]),
        ({"pruning__overrides": {"encoder.*": 0.1}}, ["pruning.overrides", "'encoder.*'", "nearest"]),
        ({"pruning__end": 400}, ["pruning.end", "last step of training (4)", "400"]),
        ({"pruning__pattern": "block:5x1"}, ["bert.encoder.layer.0.attention.self.query.weight", "block:5x1"]),
        ({"training__report_to": "wandb"}, ["training", "wandb", "install"]),
        ({"training__report_to": "wandbb"}, ["training", "wandbb"]),
        ({"training__optim": "adamw_torch_npu_fused"}, ["training", "torch_npu"]),
        ({"training__adam_beta1": 2.0}, ["training: ", "beta"]),
        ({"dataset__config": "short"}, ["dataset.config", "'short'"]),
        ({"dataset__max_length": 2}, ["dataset.max_length", "2 special tokens"]),
        (
            {"dataset__test_split": "train", "dataset__test_size": None},
            ["dataset.test_split", "train_split", "'train'"],
        ),
        ({"model__freeze": ["("]}, [":", "model.freeze", "'('"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recipe_that_does_not_fit_is_refused_in_one_line(tmp_path, material, changes, parts):
    line = refusal(tmp_path, material, **changes)
    assert [part for part in parts if part not in line] == []


def test_what_a_trainer_objects_to_is_told_with_its_place_once(tmp_path, material):
    line = refusal(tmp_path, material, training__adam_beta1=2.0)
    assert line.startswith(f"{tmp_path / 'recipe.yaml'}:12: training: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.json", '{"text": "a"'),
        ("broken.parquet", "PAR1"),
        ("empty.csv", ""),
        ("header.csv", "text,label\n"),
        ("ragged.csv", "text,label\na,1\nb,1,3,4\n"),
        ("reviews.txt", "good 1\n"),
    ],
)
def test_a_data_file_that_cannot_be_read_is_named(tmp_path, material, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert name in refusal(tmp_path, material, dataset__name=str(tmp_path / name))


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("text_column", lambda number: {"text": "" if number == 3 else f"the film was good {number}"}),
        ("text_column", lambda number: {"text": number}),
        ("label_column", lambda number: {"answer": "" if number == 3 else ("no", "yes")[number % 2]}),
        ("label_column", lambda number: {"answer": "yes"}),
    ],
    ids=["an empty text", "numbers for texts", "an empty label", "one label alone"],
)
def test_cells_that_cannot_be_learned_from_are_refused_by_their_column(tmp_path, material, column, change):
    rows = [{**row, **change(number)} for number, row in enumerate(reviews())]
    name = str(write_csv(tmp_path / "reviews.csv", rows))
    line = refusal(tmp_path, material, dataset__name=name, dataset__label_column="answer")
    assert f"dataset.{column}" in line


def test_lists_where_texts_are_expected_are_refused_in_one_line(tmp_path, material):
    lines = [json.dumps({**row, "text": [row["text"]]}) for row in reviews()]
    (tmp_path / "reviews.jsonl").write_text("\n".join(lines), encoding="utf-8")
    name = str(tmp_path / "reviews.jsonl")
    line = refusal(tmp_path, material, dataset__name=name, dataset__label_column="answer")
    assert "dataset.text_column: expected strings in 'text', got " in line


@pytest.mark.parametrize(
    ("change", "column"),
    [({"label": 7}, "label_column"), ({"label": None}, "label_column"), ({"text": None}, "text_column")],
    ids=["an unknown label", "no label", "no text"],
)
def test_a_test_part_that_does_not_fit_the_training_part_is_refused(tmp_path, material, change, column):
    rows = reviews()
    test = [{name: value for name, value in {**row, **change}.items() if value is not None} for row in rows[60:]]
    if change == {"label": 7}:
        (tmp_path / "saved").mkdir()
        write_csv(tmp_path / "saved" / "train.csv", rows[:60])
        write_csv(tmp_path / "saved" / "test.csv", test)
    else:
        saved = {"train": datasets.Dataset.from_list(rows[:60]), "test": datasets.Dataset.from_list(test)}
        datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    line = refusal(
        tmp_path,
        material,
        dataset__name=str(tmp_path / "saved"),
        dataset__test_size=None,
        dataset__test_split="test",
    )
    assert f"dataset.{column}" in line
    assert "test" in line


def test_a_model_of_millions_of_layers_is_refused_and_not_built(tmp_path, material):
    shutil.copytree(material / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"num_hidden_layers": 10**7}), encoding="utf-8")
    problem = "expected num_hidden_layers of at most 2,000, got 10,000,000"
    assert refusal(tmp_path, material, model__name=str(tmp_path / "model")).endswith(f"model.name: {path}: {problem}")
    model = {"config": {"model_type": "bert", "num_hidden_layers": 10**7}, "tokenizer": str(material / "model")}
    assert refusal(tmp_path, material, model=model).endswith(f"model.config: {problem}")


def test_expressions_that_take_years_to_match_are_refused(tmp_path, material):
    words = "expected regular expressions that match 41 parameter names within 2 seconds, got '(.|.)+!'"
    pruning = {"sparsity": 0.5, "exclude": ["(.|.)+!"]}
    assert f"pruning: {words}" in refusal(tmp_path, material, pruning=pruning)
    assert f"model.freeze: {words}" in refusal(tmp_path, material, model__freeze=["(.|.)+!"])


def test_a_best_model_by_a_value_that_a_metric_of_ones_own_does_not_have_is_one_line(tmp_path, material):
    (tmp_path / "misses.py").write_text(METRIC, encoding="utf-8")
    every_step = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "fame"}
    changes = {f"training__{name}": value for name, value in (every_step | best).items()}
    path = write_recipe(tmp_path, material, metrics=[str(tmp_path / "misses.py")], **changes)
    with pytest.raises(RecipeError, match=r"training\.metric_for_best_model: .*'eval_fame'.* is not found"):
        quiet_run(path)


def test_a_second_run_into_a_folder_is_refused(tmp_path, material):
    path = write_recipe(tmp_path, material, dense={})
    refused = []

    def second():
        try:
            quiet_run(path)
        except RecipeError as error:
            refused.append(str(error))

    def say(text):
        if text.startswith("Fine-tuning the dense model"):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    assert run(load_recipe(path), say=say) is not None
    (line,) = refused
    assert line.startswith(f"{path}:2: output_dir: expected a folder that no other run writes to, got {tmp_path}/out, ")
    assert not (tmp_path / "out" / UNFINISHED).exists()


@pytest.mark.parametrize("place", ["a file", "inside a file"])
def test_an_output_folder_that_cannot_be_is_refused(tmp_path, material, place):
    (tmp_path / "taken").touch()
    folder = tmp_path / "taken" if place == "a file" else tmp_path / "taken" / "out"
    line = refusal(tmp_path, material, output_dir=str(folder))
    assert "output_dir: " in line
    assert "taken" in line


def test_a_column_cannot_be_text_and_label(tmp_path, material):
    line = refusal(tmp_path, material, dataset__text_column="answer", dataset__label_column="answer")
    assert "dataset.text_column: must differ from label_column, got 'answer'" in line


def test_labels_must_be_single_values(tmp_path, material):
    rows = [{**row, "label": [row["label"]]} for row in reviews()]
    name = str(save_json(tmp_path, rows))
    line = refusal(tmp_path, material, dataset__name=name)
    assert "dataset.label_column: expected single values in 'label', got List in train" in line


def test_a_refusal_names_the_line_of_the_recipe(tmp_path, material):
    path = write_recipe(tmp_path, material, dataset__label_column="lable", pruning__targets=["encoder.*"])
    lines = path.read_text(encoding="utf-8").splitlines()
    at = {
        key: next(n for n, line in enumerate(lines, 1) if line.strip().startswith(f"{key}:"))
        for key in ("label_column", "targets")
    }
    with pytest.raises(RecipeError) as caught:
        quiet_run(path)
    assert str(caught.value).startswith(f"{path}:{at['label_column']}: dataset.label_column: ")
    with pytest.raises(RecipeError) as caught:
        run(load_recipe(path, ["dataset.label_column=label"]))
    assert str(caught.value).startswith(f"{path}:{at['targets']}: pruning.targets: 'encoder.*' matches no")
    with pytest.raises(RecipeError) as caught:
        run(load_recipe(path, ["dataset.label_column=label", "pruning.targets=[decoder.*]"]))
    assert str(caught.value).startswith("command line: pruning.targets: 'decoder.*' matches no")


def test_without_a_padding_token_the_end_of_text_pads(tmp_path, material):
    shutil.copytree(material / "model", tmp_path / "model")
    remove_padding(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"eos_token": "[SEP]"}))
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"pad_token_id": None}))
    ready = prepared(tmp_path, material, model__name=str(tmp_path / "model"))
    assert ready.tokenizer.pad_token == "[SEP]"
    assert ready.model.config.pad_token_id == VOCABULARY.index("[SEP]")


def test_a_head_for_other_labels_is_drawn_anew(tmp_path, material, finished):
    rows = [{**row, "label": number % 3} for number, row in enumerate(reviews())]
    name = str(write_csv(tmp_path / "reviews.csv", rows))
    ready = prepared(tmp_path, material, dataset__name=name, model__name=str(finished["out"] / "dense"))
    assert ready.model.num_labels == 3
    assert ready.new_weights == ["classifier.bias", "classifier.weight"]


def test_an_encoder_decoder_is_evaluated_by_its_logits(tmp_path, material):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(VOCABULARY), decoder_start_token_id=0, **sizes)
    transformers.T5ForSequenceClassification(config).save_pretrained(tmp_path / "t5")
    for path in (material / "model").glob("token*"):
        shutil.copy(path, tmp_path / "t5")
    path = tmp_path / "t5" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"eos_token": "[SEP]"}))
    spoil_config(tmp_path / "t5", eos_token_id=VOCABULARY.index("[SEP]"))
    result, _ = quiet_run(write_recipe(tmp_path, material, model__name=str(tmp_path / "t5")))
    assert 0 <= result.pruned["accuracy"] <= 1


def test_weights_that_are_drawn_are_told(finished):
    (told,) = [line for line in finished["said"] if "at random" in line]
    assert told.endswith("classifier.bias, classifier.weight")


def remove_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def put_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def remove_padding(folder):
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({name: value for name, value in content.items() if name != "pad_token"}))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").unlink(),
        cut_weights,
        remove_tokenizer,
        remove_padding,
        put_nan,
        lambda folder: spoil_config(folder, hidden_size="wide"),
        lambda folder: spoil_config(folder, intermediate_size=48),
    ],
    ids=[
        *("no config", "broken config", "no weights", "truncated weights", "no tokenizer", "no padding token"),
        *("a weight that is NaN", "a word for a width", "another width"),
    ],
)
def test_a_model_folder_that_lacks_something_is_refused(tmp_path, material, spoil):
    shutil.copytree(material / "model", tmp_path / "model")
    spoil(tmp_path / "model")
    assert "model.name: " in refusal(tmp_path, material, model__name=str(tmp_path / "model"))


def test_a_models_own_code_is_neither_run_nor_asked_about(tmp_path, material, capsys):
    shutil.copytree(material / "model", tmp_path / "model")
    spoil_config(tmp_path / "model", model_type="own", auto_map=dict.fromkeys(("AutoConfig", "AutoModel"), "own.Own"))
    (tmp_path / "model" / "own.py").write_text("raise SystemExit('it ran')")
    said = refusal(tmp_path, material, model__name=str(tmp_path / "model"))
    assert said.endswith("model.name: it needs the model's own code, which hf-prune does not run")
    assert capsys.readouterr().out == ""


def test_texts_that_are_longer_than_the_model_can_take_are_refused_before_training(tmp_path, material):
    rows = [{**row, "text": row["text"] + " good" * 60} for row in reviews()]
    name = str(write_csv(tmp_path / "reviews.csv", rows))
    line = refusal(tmp_path, material, dataset__name=name, dataset__max_length=64)
    assert "dataset.max_length" in line
    assert "32" in line


# ---- Distillation ----


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, material):
    folder = tmp_path_factory.mktemp("distilled")
    path = write_recipe(folder, material, dense={}, distillation={"temperature": 3, "weight": "0.25"})
    result, said = quiet_run(path)
    return {"out": folder / "out", "result": result, "said": said}


def test_a_recipe_distils_from_its_own_dense_run(distilled):
    record = load_record(distilled["out"] / "model")
    assert record.distillation.teacher.name == "the dense run of the recipe"
    assert (record.distillation.temperature, record.distillation.weight) == (3.0, 0.25)
    for entry in record.history:
        if "loss" in entry:
            mixed = 0.75 * entry["task_loss"] + 0.25 * entry["distillation_loss"]
            assert entry["loss"] == pytest.approx(mixed, abs=2e-4)
    first = next(entry for entry in record.history if "loss" in entry)
    assert first["distillation_loss"] == pytest.approx(0, abs=1e-6)  # it begins as the model of the dense run
    card = (distilled["out"] / "model" / "README.md").read_text(encoding="utf-8")
    assert "Distilled from `the dense run of the recipe`: weight of the distillation loss 0.25, temperature 3." in card
    assert "distilled and pruned with hf-prune" in card
    assert "Distilling the Knowledge in a Neural Network" in card


def test_a_recipe_distils_from_a_model_that_it_names(distilled, material, tmp_path):
    teacher = distilled["out"] / "dense"
    path = write_recipe(tmp_path, material, distillation={"teacher": str(teacher)})
    quiet_run(path)
    record = load_record(tmp_path / "out" / "model")
    assert record.distillation.teacher.name == "dense"
    assert record.distillation.temperature == DistillationConfig().temperature


def test_the_recipe_of_a_card_can_be_run_again_where_distillation_was_switched_off(material, tmp_path):
    path = write_recipe(tmp_path, material, distillation={"teacher": "nowhere"}, training__max_steps=1)
    run(load_recipe(path, ["distillation=null"]), say=lambda line: None)
    record = load_record(tmp_path / "out" / "model")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(record.recipe))
    assert load_recipe(again, [f"output_dir={tmp_path / 'again'}"]).distillation_config is None


def test_what_cannot_be_distilled_is_told_before_anything_is_written(material, tmp_path):
    before = None
    for values, message in (
        (
            {"hidden_weight": 1.0, "hidden_layers": [[9, 1]]},
            r"distillation.hidden_layers: expected layers of the model",
        ),
        ({"teacher": str(material / "reviews.csv")}, r"distillation.teacher: cannot open a model at"),
        ({"teacher": ""}, r"distillation.teacher: expected a model name or folder, got ''"),
        (None, r"recipe.yaml:\d+: distillation: has no value; set \{\} for the defaults"),
    ):
        path = write_recipe(tmp_path, material, dense={}, distillation=values)
        before = before or tree(tmp_path)
        with pytest.raises(RecipeError, match=message):
            quiet_run(path)
        assert set(tree(tmp_path)) == set(before)
    assert load_recipe(path, ["distillation=null"]).distillation_config is None


def test_a_teacher_that_does_not_fit_is_told_before_anything_is_written(material, tmp_path):
    config = transformers.AutoConfig.from_pretrained(material / "model", num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    path = write_recipe(tmp_path, material, distillation={"teacher": str(tmp_path / "teacher")})
    before = tree(tmp_path)
    with pytest.raises(
        RecipeError, match=r"recipe.yaml:\d+: distillation.teacher: expected the model's 2 labels, got 3"
    ):
        quiet_run(path)
    path.write_text(path.read_text().replace(str(tmp_path / "teacher"), str(tmp_path / "techer")))
    with pytest.raises(RecipeError, match=r"distillation.teacher: expected a file or folder, found nothing.*'teacher'"):
        quiet_run(path)
    assert set(tree(tmp_path)) == set(before)


# ---- What the saved models say in a process that never imports this package ----


@pytest.fixture(scope="module")
def guesses(finished):
    output, errors = finished["process"].communicate(timeout=240)
    assert finished["process"].returncode == 0, errors
    said = json.loads(output.splitlines()[-1])
    return {name: said[str(finished["out"] / folder)] for name, folder in (("dense", "dense"), ("pruned", "model"))}


def test_plain_from_pretrained_opens_both_models_in_a_process_without_this_package(guesses):
    assert {name: len(answers) for name, answers in guesses.items()} == {"dense": TEST_SIZE, "pruned": TEST_SIZE}


@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_metrics_are_those_of_the_saved_models_on_the_test_part(finished, guesses, which):
    truth = [row["label"] for row in parts_by_hand(reviews())[0]]
    pairs = list(zip(guesses[which], truth, strict=True))
    f1 = []
    for label in sorted(set(truth) | set(guesses[which])):
        hits = pairs.count((label, label))
        f1.append(2 * hits / (guesses[which].count(label) + truth.count(label)))
    written = json.loads((finished["out"] / "results.json").read_text(encoding="utf-8"))
    assert list(written[which]) == ["f1", "accuracy"]
    assert written[which]["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs), abs=1e-12)
    assert written[which]["f1"] == pytest.approx(sum(f1) / len(f1), abs=1e-12)
