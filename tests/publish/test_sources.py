import dataclasses
import importlib.metadata
import itertools
import json
import math
import platform
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bert, bert_examples, training_arguments
from torch import nn
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_prune.engines.choose import weights_digest
from hf_prune.publish.logs import changed_arguments, metrics_of, not_finite, thin_history
from hf_prune.publish.measure import (
    count_pass,
    emissions_of,
    hardware,
    input_shapes,
    measure_costs,
    quartiles,
    versions,
)
from hf_prune.publish.record import Emissions, Source
from hf_prune.publish.redact import find_secret, without_paths, without_tokens
from hf_prune.publish.sources import describe_base, describe_dataset, describe_name, is_hub_name

quick = settings(max_examples=50, deadline=None, derandomize=True)

TOKEN = "hf_" + "aB3" * 12


# ---- Metrics ----


def test_metrics_are_what_was_evaluated_without_its_prefix():
    logged = {"eval_loss": 0.5, "eval_accuracy": 1, "eval_f1_macro": 0.25, "epoch": 2.0, "step": 10, "loss": 0.7}
    assert metrics_of(logged) == {"loss": 0.5, "accuracy": 1.0, "f1_macro": 0.25}


def test_metrics_of_another_prefix():
    assert metrics_of({"test_loss": 0.5, "eval_loss": 0.25}, "test") == {"loss": 0.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.5", True, [0.5], {"a": 1}])
def test_what_is_no_finite_number_is_no_metric(value):
    assert metrics_of({"eval_accuracy": value, "eval_f1": 0.5}) == {"f1": 0.5}


def test_metrics_of_a_genuine_evaluation_have_no_timings(tmp_path):
    args = training_arguments(tmp_path, skip_memory_metrics=False, include_num_input_tokens_seen=True)
    trainer = Trainer(
        model=bert(),
        args=args,
        eval_dataset=bert_examples(8),
        compute_metrics=lambda found: {"accuracy": np.float32(0.5), "hits": np.int64(3)},
    )
    assert set(metrics_of(trainer.evaluate())) == {"loss", "accuracy", "hits"}
    assert set(metrics_of(trainer.predict(bert_examples(8)).metrics, "test")) == {"loss", "accuracy", "hits"}


def test_metrics_that_are_not_finite_are_named_without_their_prefix():
    values = {
        "eval_loss": math.nan,
        "eval_f1": math.inf,
        "eval_r": -math.inf,
        "eval_accuracy": 0.5,
        "eval_text": "nan",
        "eval_flag": True,
        "eval_list": [math.nan],
        "loss": math.nan,
        "test_loss": math.nan,
        "eval_": math.nan,
    }
    assert not_finite(values) == ["loss", "f1", "r", ""]
    assert not_finite(values, "test") == ["loss"]
    assert not_finite({}) == []


@given(st.dictionaries(st.sampled_from(["eval_a", "eval_b", "test_a", "c"]), st.floats() | st.booleans() | st.text()))
def test_a_number_is_a_metric_or_not_finite_and_never_both(values):
    numbers = {
        name.removeprefix("eval_") for name, value in values.items() if name[:5] == "eval_" and type(value) is float
    }
    assert {*metrics_of(values), *not_finite(values)} == numbers
    assert not {*metrics_of(values)} & {*not_finite(values)}


# ---- The log ----


def test_a_history_has_steps_losses_sparsities_and_evaluations():
    log = [
        {"step": 1, "loss": 0.9, "learning_rate": 0.1, "grad_norm": 2.0, "epoch": 0.5, "sparsity": 0.1},
        {"step": 2, "eval_loss": 0.8, "eval_f1": 0.5, "eval_runtime": 3.0, "target_sparsity": 0.5, "epoch": 1.0},
        {"step": 2, "train_runtime": 1.0, "train_loss": 0.9, "sparsity": 0.1},
        {"loss": 0.5},
    ]
    assert thin_history(log) == [
        {"step": 1, "loss": 0.9, "sparsity": 0.1},
        {"step": 2, "target_sparsity": 0.5, "eval_loss": 0.8, "eval_f1": 0.5},
    ]


def test_values_that_are_not_finite_are_left_out_of_a_history():
    log = [{"step": 1, "loss": math.nan, "sparsity": 0.1}, {"step": 2, "loss": 0.5, "sparsity": math.inf}]
    assert thin_history(log) == [{"step": 2, "loss": 0.5}]


def test_a_history_of_nothing_is_empty():
    assert thin_history([]) == []


@pytest.mark.parametrize("steps", [999, 1000, 1001, 1999, 2001, 123_457])
def test_a_long_history_is_thinned_evenly_and_keeps_first_and_last_and_every_evaluation(steps):
    log = [{"step": step, "loss": 1.0} for step in range(1, steps + 1)]
    evaluations = [{"step": step, "eval_loss": 1.0} for step in range(100, steps, steps // 7)]
    kept = thin_history(sorted([*log, *evaluations], key=lambda entry: entry["step"]))
    trained = [entry["step"] for entry in kept if "loss" in entry]
    assert [entry for entry in kept if "eval_loss" in entry] == evaluations
    assert (trained[0], trained[-1]) == (1, steps)
    assert min(steps, 500) <= len(trained) <= 1001
    gaps = {after - before for before, after in itertools.pairwise(trained[:-1])}
    assert len(gaps) == 1
    assert kept == sorted(kept, key=lambda entry: entry["step"])


@quick
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["step", "loss", "sparsity", "eval_loss", "eval_runtime", "epoch", "text"]),
            st.floats() | st.none() | st.text(max_size=3) | st.integers(0, 9),
        ),
        max_size=6,
    )
)
def test_any_log_makes_a_history_that_json_can_hold(log):
    history = thin_history(log)
    assert json.loads(json.dumps(history, allow_nan=False)) == history
    assert all("step" in entry for entry in history)


def test_an_evaluation_beside_a_loss_is_kept():
    log = [{"step": step, "loss": 1.0, "eval_loss": 1.0} for step in range(1, 2002)]
    assert len(thin_history(log)) == 2001


# ---- Training arguments ----


def test_only_what_is_not_the_default_is_changed(tmp_path):
    assert changed_arguments(TrainingArguments(str(tmp_path))) == {}
    args = TrainingArguments(
        str(tmp_path),
        learning_rate=1e-3,
        num_train_epochs=3,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        lr_scheduler_kwargs={"num_cycles": 2},
        seed=7,
    )
    assert changed_arguments(args) == {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "seed": 7,
    }


def test_zero_where_the_default_is_none_is_told(tmp_path):
    assert changed_arguments(TrainingArguments(str(tmp_path), data_seed=0)) == {"data_seed": 0}


def test_arguments_of_other_kinds_are_known(tmp_path):
    args = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, generation_max_length=9)
    assert changed_arguments(args) == {"predict_with_generate": True, "generation_max_length": 9}


def test_changed_arguments_are_plain_values(tmp_path):
    args = TrainingArguments(
        str(tmp_path), eval_strategy="steps", eval_steps=2, optim="sgd", accelerator_config={"even_batches": False}
    )
    changed = changed_arguments(args)
    assert json.loads(json.dumps(changed, allow_nan=False)) == changed
    assert changed["optim"] == "sgd"


@dataclass
class OwnArguments(TrainingArguments):
    token: str | None = None
    wandb_api_key: str | None = None
    database_password: str | None = None
    cache: str | None = None
    loader: dict = field(default_factory=dict)
    ratio: float | None = None


SECRETS = {
    "hub_token": TOKEN,
    "hub_model_id": "ada/secret-model",
    "push_to_hub": True,
    "run_name": "secret-run",
    "logging_dir": "/home/ada/secret/logs",
    "resume_from_checkpoint": "/home/ada/secret/checkpoint-5",
    "lr_scheduler_kwargs": {"path": "/home/ada/secret"},
    "trackio_space_id": "ada/secret-space",
    "project": "secret-project",
    "cache": "~/secret",
    "token": TOKEN,
    "wandb_api_key": "secret",
    "database_password": "secret",
}


# Which of them there are depends on the version of transformers.
@pytest.mark.parametrize("name", sorted(SECRETS.keys() & {entry.name for entry in dataclasses.fields(OwnArguments)}))
def test_arguments_that_are_private_are_never_told(tmp_path, name):
    args = OwnArguments(str(tmp_path / "secret"), **{name: SECRETS[name]})
    told = json.dumps(changed_arguments(args))
    assert "secret" not in told
    assert TOKEN not in told
    assert str(tmp_path) not in told


@pytest.mark.parametrize(
    "value",
    [
        {"token": TOKEN},
        {"headers": [{"api_key": "secret"}]},
        {"text": f"Bearer {TOKEN}"},
        {"root": "file:///home/ada/secret"},
        {"command": "--root=/home/ada/secret"},
        {"/home/ada/secret": 1},
        {"root": "C:\\Users\\secret"},
        {"root": "../../home/ada/secret"},
    ],
    ids=str,
)
def test_secrets_and_paths_within_arguments_are_never_told(tmp_path, value):
    told = json.dumps(changed_arguments(OwnArguments(str(tmp_path), loader=value)))
    assert "secret" not in told
    assert TOKEN not in told


def test_a_deepspeed_file_is_not_told(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path))
    for path in ("/home/ada/zero.json", "~/zero.json"):
        args.deepspeed = path
        assert "deepspeed" not in changed_arguments(args)


def test_text_that_begins_with_a_tilde_need_be_no_path(tmp_path):
    args = OwnArguments(str(tmp_path), cache="~=1.0")
    assert changed_arguments(args).get("cache", "~=1.0") == "~=1.0"


def test_values_that_no_one_can_show_are_left_out(tmp_path):
    args = OwnArguments(str(tmp_path), ratio=math.nan, loader={"a": object()})
    assert changed_arguments(args) == {}


# Making other arguments to compare with would reset the state of the Accelerator that the Trainer has.
def test_a_trainer_goes_on_after_its_arguments_were_described(tmp_path):
    trainer = Trainer(
        model=bert(),
        args=training_arguments(tmp_path, max_steps=1),
        train_dataset=bert_examples(8),
        eval_dataset=bert_examples(8),
    )
    trainer.train()
    changed_arguments(trainer.args)
    assert trainer.accelerator.mixed_precision == "no"
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.train()
    assert trainer.state.global_step == 1


@dataclass
class DemandingArguments(TrainingArguments):
    corpus: str = ""

    def __post_init__(self):
        if not self.corpus:
            raise ValueError("corpus: expected a name, got none")
        super().__post_init__()


def test_arguments_that_cannot_be_made_of_defaults_are_described_all_the_same(tmp_path):
    args = DemandingArguments(str(tmp_path), corpus="reviews", learning_rate=1e-3)
    assert changed_arguments(args) == {"corpus": "reviews", "learning_rate": 1e-3}


# ---- Recipes ----


def test_keys_of_tokens_and_passwords_are_left_out_at_any_depth():
    content = {
        "token": TOKEN,
        "hub_token": TOKEN,
        "training": {"hub_token": TOKEN, "seed": 1, "inner": [{"api_key": "k", "a": 2}, ({"password": "p"},)]},
    }
    assert without_tokens(content) == {"training": {"seed": 1, "inner": [{"a": 2}, [{}]]}}


@pytest.mark.parametrize("content", [{"HF_TOKEN": TOKEN}, {"Password": TOKEN}, {"apiKey": TOKEN}, {"a": f"x {TOKEN}"}])
def test_tokens_by_other_names_are_left_out(content):
    assert TOKEN not in json.dumps(without_tokens({"inner": [content]}))


def test_what_is_no_token_is_kept():
    content = {"tokens": 5, "max_new_tokens": 6, "list": [1, "a", None, 1.5], 3: True}
    assert without_tokens(content) == content


def test_of_absolute_paths_the_last_part_is_kept():
    content = {"a": "/home/ada/reviews.csv", "b": ["~/model", ("/x/y/",)], "c": {"d": "data/reviews.csv", "e": 5}}
    assert without_paths(content) == {"a": "reviews.csv", "b": ["model", ["y"]], "c": {"d": "data/reviews.csv", "e": 5}}


@pytest.mark.parametrize("text", ["~=1.0", "~nobody-of-this-name/model", "~~struck out~~"])
def test_a_tilde_breaks_no_recipe(text):
    assert without_paths({"a": text})["a"] in (text, "model")


@pytest.mark.parametrize(
    "text",
    [
        "/home/secret/a.csv",
        "~/secret/a.csv",
        "file:///home/secret/a.csv",
        "C:\\Users\\secret\\a.csv",
        "csv:/home/secret/a.csv",
        "../../home/secret/a.csv",
    ],
)
def test_where_something_is_on_a_machine_is_not_told(text):
    assert "secret" not in json.dumps(without_paths({"a": [text]}))


@quick
@given(
    st.recursive(
        st.none() | st.integers() | st.text(st.characters(exclude_characters="~/"), max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
        max_leaves=5,
    )
)
def test_content_without_tokens_and_paths_stays_as_it_is(content):
    assert without_paths(without_tokens(content)) == content


# ---- Versions and hardware ----


def test_versions_are_those_that_are_installed():
    found = versions()
    assert found.pop("python") == platform.python_version()
    assert set(found) == {"hf-prune", "transformers", "torch", "accelerate", "datasets"}
    assert all(text == importlib.metadata.version(name) for name, text in found.items())


def test_a_package_that_is_not_installed_has_no_version():
    assert set(versions(["torch", "no-such-package-at-all"])) == {"python", "torch"}


def test_hardware_is_that_of_this_machine():
    found = hardware(torch.device("cpu"), processes=3)
    assert found.accelerator is None
    assert (found.threads, found.processes) == (torch.get_num_threads(), 3)
    assert found.cores >= 1
    assert found.processor
    assert found.processor == " ".join(found.processor.split())


# ---- Weights ----


class Layer(torch.nn.Module):
    """A weight, a buffer that is saved, and one that is not."""

    def __init__(self, weight=((1.0, 2.0), (3.0, 4.0), (0.0, 0.0)), dtype=torch.float32):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight).to(dtype))
        self.register_buffer("state", torch.tensor(3))
        self.register_buffer("nothing", torch.zeros(0, 2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_a_digest_is_that_of_the_weights_whatever_else_changes():
    model = Layer()
    before = weights_digest(model)
    model.eval()
    model.cache += 1
    model.note = "text"
    assert weights_digest(model) == before == weights_digest(Layer())
    model.weight = model.weight.T.contiguous().T
    assert not model.weight.is_contiguous()
    assert weights_digest(model) == before


CHANGES = {
    "one": lambda weight: weight[0, 0].add_(1),
    "one to zero": lambda weight: weight[1, 1].zero_(),
    "the sign of zero": lambda weight: weight[2, 0].mul_(-1),
    "all": lambda weight: weight.mul_(2),
    "two in turn": lambda weight: weight.copy_(weight[[1, 0, 2]]),
    "all signs": lambda weight: weight.neg_(),
    "two signs": lambda weight: weight[0].neg_(),
    "the same to two": lambda weight: weight[2].fill_(5),
    "turned round": lambda weight: weight.copy_(weight.flip(0, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_digest_changes_with_any_change_of_a_weight(change, dtype):
    model = Layer(dtype=dtype)
    before = weights_digest(model)
    change(model.weight)
    assert weights_digest(model) != before


def test_a_digest_changes_with_a_buffer_a_name_and_a_shape():
    model, other, renamed = Layer(), Layer(), Layer()
    model.state += 1
    other.weight = other.weight.reshape(2, 3)
    renamed.register_buffer("weights", renamed.weight)
    del renamed.weight
    assert len({weights_digest(one) for one in (Layer(), model, other, renamed)}) == 4


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64, torch.uint16, torch.uint64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
    ],
    ids=str,
)
def test_weights_of_any_kind_have_a_digest(dtype):
    assert weights_digest(Layer(dtype=dtype)) != weights_digest(Layer(((0.0, 2.0), (3.0, 4.0), (0.0, 0.0)), dtype))


def test_the_digest_of_a_model_changes_when_it_is_trained(tmp_path):
    model = bert()
    before = weights_digest(model)
    assert weights_digest(model) == before
    trainer = Trainer(model, training_arguments(tmp_path, max_steps=1), train_dataset=bert_examples(4))
    trainer.train()
    assert weights_digest(model) != before


# ---- Tokens ----


TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    "text",
    [
        *(
            TOKEN,
            f"token: {TOKEN}",
            f"https://user:{TOKEN}@huggingface.co/a",
            f'"{TOKEN}"',
            f"a\n{TOKEN}\nb",
            TOKEN[:23],
        ),
        *(f"{TOKEN}_old", f"HF_TOKEN_{TOKEN}", f"{TOKEN}é"),
    ],
)
def test_what_looks_like_a_token_is_seen(text):
    assert find_secret(text.encode()) == "a Hub token"


@pytest.mark.parametrize(
    "text",
    [
        *("", "hf_prune", "hf_", TOKEN[:22], "hf_internal_testing_tiny_random_bert_model", "hf-" + "a" * 40),
        *("perf_" + "a" * 8, "shelf_" + "a" * 40, "hf_ " + "a" * 40, "HF_" + "a" * 8),
    ],
)
def test_what_is_not_like_a_token_is_none(text):
    assert find_secret(text.encode()) is None


# ---- The cost of a forward pass ----


def costs_of(*forwards, **options):
    """What calls cost that are no passes of models."""
    costs, passes = measure_costs([nn.Identity() for _ in forwards], forwards, **options)
    return [cost.seconds for cost in costs], passes


def test_forward_passes_take_turns_after_those_to_count_and_to_warm_up():
    calls = []
    seconds, passes = costs_of(lambda: calls.append("a"), lambda: calls.append("b"), passes=3)
    assert calls == [*"ab", *"ab", *"ab", *"ba", *"ab"]  # every other round of passes in the opposite order
    assert passes == 3
    assert len(seconds) == 2


def test_no_passes_are_begun_when_the_time_is_up():
    calls = []

    def forward():
        calls.append(1)
        time.sleep(0.02)

    _, passes = costs_of(forward, forward, passes=1000, seconds=0.1)
    assert 1 <= passes <= 3
    assert len(calls) == 2 * (passes + 2)


def test_at_least_one_pass_of_each_is_measured():
    _, passes = costs_of(lambda: None, lambda: None, passes=5, seconds=0.0)
    assert passes == 1


def test_the_median_of_the_passes_is_given_for_each():
    durations = iter([0.0] * 4 + [0.03, 0.001, 0.03, 0.001, 0.2, 0.001])
    seconds, passes = costs_of(*[lambda: time.sleep(next(durations))] * 2, passes=3)
    assert passes == 3
    assert seconds[0] == pytest.approx(0.03, abs=0.02)
    assert seconds[1] == pytest.approx(0.001, abs=0.02)
    assert seconds[1] < seconds[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3.0, 3.0, 3.0)), ([1.0, 3.0], (1.5, 2.0, 2.5)), ([5.0, 1.0, 2.0, 3.0, 4.0], (2.0, 3.0, 4.0))],
)
def test_quartiles_lie_between_values(values, expected):
    assert quartiles(values) == expected


def test_operations_and_memory_of_a_pass_are_counted():
    model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 1)).eval()
    inputs = torch.randn(8, 10)
    with torch.no_grad():
        flops, memory = count_pass(model, lambda: model(inputs))
    assert flops == 2 * 8 * (10 * 100 + 100 * 1)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert memory == weights + 4 * 8 * (100 + 100)  # the input and the output of the ReLU, together


def test_memory_is_counted_once_for_views_and_given_back():
    weight = nn.Parameter(torch.zeros(1000, 1000))
    model = nn.ParameterList([weight, weight])
    with torch.no_grad():
        _, memory = count_pass(model, lambda: [weight.t()[:10].contiguous().view(-1) for _ in range(5)])
        assert memory == 4 * (1000 * 1000 + 5 * 10 * 1000)
        _, memory = count_pass(model, lambda: sum(float(weight[:10].clone().sum()) for _ in range(5)))
        assert memory == 4 * (1000 * 1000 + 10 * 1000 + 1)


def test_shapes_are_those_of_the_inputs_and_not_of_labels():
    batch = {
        "input_ids": torch.ones(2, 3),
        "labels": torch.ones(2),
        "label_ids": torch.ones(2),
        "text": "a",
        "pixel_values": torch.ones(1, 3, 8, 8),
    }
    assert input_shapes(batch) == {"input_ids": [2, 3], "pixel_values": [1, 3, 8, 8]}


# ---- Emissions ----


# Of the shape of codecarbon 3.3.2; with the genuine one in a Trainer, the same was found by hand.
def callback(**data):
    return SimpleNamespace(tracker=SimpleNamespace(final_emissions_data=SimpleNamespace(**data)))


def test_emissions_are_those_that_codecarbon_measured():
    callbacks = [object(), callback(emissions=0.002, duration=30.5, energy_consumed=0.5, country_name="Canada")]
    expected = Emissions(kilograms=0.002, kilowatt_hours=0.5, country="Canada", seconds=30.5)
    assert emissions_of(callbacks) == expected


def test_emissions_where_no_country_was_found_have_none():
    found = emissions_of([callback(emissions=0.0, duration=1, energy_consumed=0, country_name="")])
    assert found == Emissions(kilograms=0.0, kilowatt_hours=0.0, country=None, seconds=1.0)


@pytest.mark.parametrize(
    "callbacks",
    [
        [],
        [object()],
        [SimpleNamespace(tracker=None)],
        [SimpleNamespace(tracker=SimpleNamespace())],
        [SimpleNamespace(tracker=SimpleNamespace(final_emissions_data=None))],
        [callback(emissions=math.nan, duration=1.0)],
        [callback(emissions=None, duration=1.0)],
    ],
    ids=["no callbacks", "others", "no tracker", "not stopped", "nothing", "nan", "none"],
)
def test_without_a_measurement_there_are_no_emissions(callbacks):
    assert emissions_of(callbacks) is None


# ---- The base model ----


@pytest.mark.parametrize("name", ["bert", "google/bert_uncased.v1", "a-b/c"])
def test_names_of_the_hub(name):
    assert is_hub_name(name)


@pytest.mark.parametrize("name", [None, "", "/a/b", "a/b/c", "./a", "a b", "a--b", "model.git", "~/a", "-a", "a" * 97])
def test_names_that_cannot_be_on_the_hub(name):
    assert not is_hub_name(name)


def base(folder, content):
    (folder / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def test_a_base_in_a_folder_is_described_by_its_card(tmp_path):
    name = base(tmp_path, "---\nlicense: mit\nlanguage:\n- en\n- de\n---\n\n# x\n")
    expected = Source(name=tmp_path.name, license="mit", languages=["en", "de"])
    assert describe_base(name) == (expected, None)


def test_a_base_in_a_folder_has_its_name_on_the_hub_where_that_is_told(tmp_path):
    source, _ = describe_base(base(tmp_path, "---\nlicense: mit\n---\n"), hub_name="google/bert", revision="abc")
    assert (source.name, source.hub_name, source.revision) == ("google/bert", "google/bert", "abc")


def test_a_path_in_place_of_a_name_on_the_hub_is_shown_by_its_last_part(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "my-base"
    folder.mkdir(parents=True)
    base(folder, "---\nlicense: mit\n---\n")
    expected = (Source(name="my-base", license="mit"), None)
    assert describe_base("google/bert", hub_name=str(folder)) == expected
    monkeypatch.chdir(tmp_path)
    assert describe_base("models/my-base", hub_name="models/my-base") == expected
    monkeypatch.chdir(folder)
    assert describe_base(".") == expected


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("MNLI / matched", "MNLI / matched"),
        ("ada/films", "ada/films"),
        ("/data/films.csv", "films.csv"),
        ("./films/", "films"),
        ("../films", "films"),
        ("~/films", "films"),
        ("C:\\data\\films", "films"),
    ],
)
def test_of_a_path_a_card_shows_the_last_part(name, shown):
    assert describe_name(name).name == shown
    assert (describe_name(name).hub_name is not None) == (name == "ada/films")


def test_of_several_licenses_the_first_is_told(tmp_path):
    source, problem = describe_base(base(tmp_path, "---\nlicense: [mit, apache-2.0]\n---\n"))
    assert (source.license, problem) == ("mit", None)


@pytest.mark.parametrize("front", ["language: en", "license:", "license: 5", "license: []", "license: {a: b}"])
def test_a_card_without_a_license_is_said_to_be_one(tmp_path, front):
    source, problem = describe_base(base(tmp_path, f"---\n{front}\n---\n"))
    assert source.license is None
    assert problem == f"the model card of {tmp_path.name} states no license"


@pytest.mark.parametrize(
    "content",
    [
        "---\n- a list\n---\n",
        b"---\nlicense: mit\n---\n\xe9",
        "---\na: [\n---\n",
        "---\n1: x\n---\n",
        "---\nlicense: !!python/object:os.system x\n---\n",
        "---\ntags: 5\n---\n",
    ],
    ids=str,
)
def test_a_broken_card_is_no_obstacle(tmp_path, content):
    source, problem = describe_base(base(tmp_path, content))
    assert source == Source(name=tmp_path.name)
    assert problem.startswith(f"the model card of {tmp_path.name} cannot be read: ")
    assert str(tmp_path) not in problem


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_card_is_no_obstacle(tmp_path, name):
    source, problem = describe_base(base(tmp_path, f"---\n{HOSTILE[name][0]}\n---\n"))
    assert source == Source(name=tmp_path.name)
    assert problem == f"the model card of {tmp_path.name} cannot be read: MarkedYAMLError"


def test_a_folder_without_a_card_is_described_by_its_name(tmp_path):
    source, problem = describe_base(str(tmp_path))
    assert source == Source(name=tmp_path.name)
    assert problem == f"the folder of {tmp_path.name} has no model card (README.md)"


def test_a_folder_that_is_gone_is_described_by_its_name_without_where_it_was(tmp_path):
    source, problem = describe_base(str(tmp_path / "deep" / "model"))
    assert source == Source(name="model")
    assert str(tmp_path) not in problem


def test_without_a_network_a_name_on_the_hub_is_described_by_itself():
    source, problem = describe_base("google/no-such-model-here", revision="abc")
    assert source == Source(name="google/no-such-model-here", hub_name="google/no-such-model-here", revision="abc")
    assert problem.startswith("the model card of google/no-such-model-here cannot be read: ")


def test_norwegian_is_a_language(tmp_path):
    source, _ = describe_base(base(tmp_path, "---\nlicense: mit\nlanguage: [no, en]\n---\n"))
    assert source.languages == ["no", "en"]


# ---- Data sets ----


def dataset(checksums=None, split=None, **info):
    info = datasets.DatasetInfo(download_checksums=checksums, **info)
    return datasets.Dataset.from_dict({"a": [1, 2, 3]}, info=info, split=split)


def test_a_data_set_of_the_hub_knows_its_name_and_revision():
    checksums = {"hf://datasets/stanfordnlp/imdb@e6281661/plain_text/test.parquet": {"num_bytes": 1}}
    found = describe_dataset(dataset(checksums, datasets.Split.TEST, dataset_name="imdb", config_name="plain_text"))
    expected = Source(name="stanfordnlp/imdb", hub_name="stanfordnlp/imdb", revision="e6281661", config="plain_text")
    assert found == expected.model_copy(update={"split": "test"})


def test_a_data_set_of_the_hub_without_a_namespace():
    found = describe_dataset(dataset({"hf://datasets/imdb@abc/test.parquet": {}}, config_name="default"))
    assert (found.name, found.hub_name, found.revision, found.config) == ("imdb", "imdb", "abc", None)


def test_a_data_set_that_was_mapped_and_selected_is_the_same_one():
    made = dataset({"hf://datasets/u/d@abc/test.parquet": {}}, "train[:10%]")
    found = describe_dataset(made.map(lambda row: {"b": row["a"]}).select([0, 1]))
    assert (found.hub_name, found.split) == ("u/d", "train[:10%]")


def test_a_data_set_of_other_files_has_no_name_on_the_hub():
    found = describe_dataset(dataset({"/home/ada/a.csv": {}, "https://a.b/c": {}}, dataset_name="reviews"))
    assert found == Source(name="reviews")


@pytest.mark.parametrize(
    "made", [[{"a": 1}], None, object(), dataset(), dataset({})], ids=["list", "nothing", "object", "empty", "unnamed"]
)
def test_a_data_set_that_knows_nothing_is_not_described(made):
    assert describe_dataset(made) is None


def test_a_data_set_of_a_file_is_not_called_by_the_kind_of_file(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\na,1\nb,0\n", encoding="utf-8")
    loaded = datasets.load_dataset("csv", data_files=str(tmp_path / "reviews.csv"), split="train", cache_dir=tmp_path)
    found = describe_dataset(loaded)
    assert found is None or found.name != "csv"
