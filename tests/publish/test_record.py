import hashlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hf_prune import PruningConfig
from hf_prune.errors import RecordError
from hf_prune.publish.record import (
    RECORD_NAME,
    Cost,
    Emissions,
    Evaluation,
    Hardware,
    PassCost,
    RunRecord,
    Source,
    load_record,
    save_record,
)
from hf_prune.saved.files import SavedFile, saved_files

quick = settings(max_examples=50, deadline=None, derandomize=True)

texts = st.text(max_size=10)
counts = st.integers(0, 2**40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
plains = st.dictionaries(texts, plain, max_size=3)
sources = st.builds(
    Source,
    name=texts,
    hub_name=st.none() | texts,
    revision=st.none() | texts,
    config=st.none() | texts,
    split=st.none() | texts,
    rows=st.none() | texts,
    license=st.none() | texts,
    languages=st.lists(texts, max_size=2),
)


@st.composite
def evaluations(draw):
    metrics = draw(st.dictionaries(texts, numbers, min_size=1, max_size=3))
    return Evaluation(
        metrics=metrics,
        main_metric=draw(st.none() | st.sampled_from(sorted(metrics))),
        part=draw(texts),
        given_in=draw(st.none() | texts),
        not_finite=draw(st.lists(texts, max_size=2)),
        dense_metrics=draw(st.none() | st.dictionaries(texts, numbers, max_size=2)),
        samples=draw(st.none() | counts),
        dataset=draw(st.none() | sources),
    )


pass_costs = st.builds(
    PassCost,
    seconds=numbers,
    quartiles=st.none() | st.tuples(numbers, numbers).map(list),
    flops=st.none() | counts,
    memory_bytes=st.none() | counts,
)
configs = st.sampled_from(
    [
        PruningConfig(sparsity=0.5),
        PruningConfig(pattern="2:4", targets=[r".*query\.weight"], exclude=["a|b"]),
        PruningConfig(sparsity=0.8, overrides={".*": 0.1}, scope="global"),
        PruningConfig(method="keep"),
    ]
)
records = st.builds(
    RunRecord,
    name=texts,
    chosen=plains,
    tags=st.lists(texts, max_size=2),
    base_model=st.none() | sources,
    pruning=st.lists(configs.map(PruningConfig.to_dict), max_size=2),
    target_sparsity=st.none() | st.floats(0, 1),
    steps=st.none() | counts,
    kept_step=st.none() | counts,
    epochs=st.none() | numbers,
    train_samples=st.none() | counts,
    training_data=st.none() | sources,
    training_arguments=plains,
    seed=st.none() | st.integers(),
    recipe=st.none() | plains,
    history=st.lists(st.builds(lambda step, entry: entry | {"step": step}, numbers, st.dictionaries(texts, numbers))),
    evaluations=st.lists(evaluations(), max_size=2),
    costs=st.lists(
        st.builds(
            Cost,
            shapes=st.dictionaries(texts, st.lists(counts, max_size=3), max_size=2),
            passes=counts,
            model=pass_costs,
            dense=st.none() | pass_costs,
            dense_is_new=st.booleans(),
        ),
        max_size=2,
    ),
    hardware=st.none()
    | st.builds(
        Hardware, processor=texts, cores=counts, threads=counts, accelerator=st.none() | texts, processes=counts
    ),
    emissions=st.none()
    | st.builds(Emissions, kilograms=numbers, kilowatt_hours=numbers, country=st.none() | texts, seconds=numbers),
    versions=st.dictionaries(texts, texts, max_size=3),
    weights=st.dictionaries(texts, st.builds(SavedFile, size=counts, sha256=texts), max_size=2),
)

SMALL = {"name": "a model"}


def write(folder, content):
    path = folder / RECORD_NAME
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


# ---- What is written is read ----


@quick
@given(record=records)
def test_a_record_is_read_as_it_was_written(record, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    save_record(folder, record)
    assert load_record(folder) == record


@quick
@given(record=records)
def test_a_record_is_plain_json(record, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    save_record(folder, record)
    text = (folder / RECORD_NAME).read_text(encoding="utf-8")
    assert json.loads(text) == record.model_dump()
    assert text.endswith("}\n")


def test_without_a_record_there_is_none(tmp_path):
    assert load_record(tmp_path) is None
    assert load_record(tmp_path / "nowhere") is None


def test_little_is_enough(tmp_path):
    write(tmp_path, SMALL)
    assert load_record(tmp_path) == RunRecord(name="a model")


def test_pruning_configurations_are_completed(tmp_path):
    write(tmp_path, SMALL | {"pruning": [{"sparsity": 0.5}]})
    assert load_record(tmp_path).pruning == [PruningConfig(sparsity=0.5).to_dict()]


def test_the_first_evaluation_is_the_main_one():
    evaluations = [Evaluation(metrics={name: 0.5}, main_metric=name) for name in ("accuracy", "f1")]
    assert RunRecord(name="a", evaluations=evaluations).evaluation == evaluations[0]
    assert RunRecord(name="a").evaluation is None


def test_a_record_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        RunRecord(name="a").name = "b"


# ---- What is refused ----


EVALUATION = {"metrics": {"accuracy": 0.5}, "main_metric": "accuracy"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"name": "caf\xe9"}',
        {},
        {"name": None},
        {"name": 5},
        SMALL | {"unknown": 1},
        SMALL | {"steps": "many"},
        SMALL | {"steps": 1.5},
        SMALL | {"history": [{"loss": 1.0}]},
        SMALL | {"history": [{"step": 1, "loss": "high"}]},
        SMALL | {"history": {"step": 1}},
        SMALL | {"base_model": "a/b"},
        SMALL | {"base_model": {"hub_name": "a/b"}},
        SMALL | {"weights": {"model.safetensors": 5}},
        SMALL | {"latency": {"seconds": 1}},
        SMALL | {"latency": 1},
        SMALL | {"costs": [{"shapes": {}, "passes": 1}]},
        SMALL | {"costs": {}},
        SMALL | {"pruning": [{"sparsity": 0.5, "patern": "2:4"}]},
        SMALL | {"pruning": [{"sparsity": 2}]},
        SMALL | {"pruning": [{}]},
        SMALL | {"pruning": ["magnitude"]},
        SMALL | {"pruning": {"sparsity": 0.5}},
        SMALL | {"evaluations": [EVALUATION | {"main_metric": "f1"}]},
        SMALL | {"evaluations": [EVALUATION, EVALUATION | {"metrics": {}}]},
        SMALL | {"evaluations": [EVALUATION | {"metrics": {"accuracy": None}}]},
        SMALL | {"evaluations": [EVALUATION | {"not_finite": "loss"}]},
        SMALL | {"evaluations": [EVALUATION | {"part": None}]},
        SMALL | {"evaluations": EVALUATION},
        SMALL | {"evaluation": EVALUATION},
        SMALL | {"kept_step": 1.5},
        SMALL | {"training_data": "u/d"},
        SMALL | {"format_version": 2},
        SMALL | {"format_version": 0},
        SMALL | {"format_version": None},
        b'{"name": "a", "target_sparsity": NaN}',
        b'{"name": "a", "evaluations": [{"metrics": {"accuracy": NaN}, "main_metric": "accuracy"}]}',
        b'{"name": "a", "latency": {"shapes": {}, "passes": 1, "seconds": Infinity}}',
        b'{"name": "a", "training_arguments": {"learning_rate": NaN}}',
    ],
    ids=str,
)
def test_a_broken_record_is_refused_by_name(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(RecordError) as caught:
        load_record(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_a_record_is_refused_by_name(tmp_path):
    (tmp_path / RECORD_NAME).mkdir()
    with pytest.raises(RecordError, match=RECORD_NAME):
        load_record(tmp_path)


def test_a_record_of_a_newer_version_is_refused_as_such(tmp_path):
    write(tmp_path, SMALL | {"format_version": 2, "what_is_new": {}})
    with pytest.raises(RecordError, match=r"version 1, got 2; a newer hf-prune may read it"):
        load_record(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_is_never_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"JSON compliant|finite"):
        save_record(tmp_path, RunRecord(name="a", training_arguments={"learning_rate": value}))
    assert not (tmp_path / RECORD_NAME).exists()


def test_a_main_metric_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValidationError, match=r"main_metric: expected one of accuracy, loss, got 'f1'"):
        Evaluation(metrics={"accuracy": 0.5, "loss": 1.0}, main_metric="f1")


# ---- Files ----


def test_files_have_their_size_and_hash(tmp_path):
    contents = {"model-1.safetensors": b"abc" * 100_000, "model-2.safetensors": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = saved_files([tmp_path / name for name in contents])
    assert found == {
        name: SavedFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }


def test_of_no_files_there_is_nothing():
    assert saved_files([]) == {}


def test_a_record_from_before_costs_were_counted_is_read():
    latency = {"shapes": {"input_ids": [1, 8]}, "passes": 20, "seconds": 0.5, "dense_seconds": 1.5}
    (cost,) = RunRecord(**SMALL, latency=latency).costs
    assert (cost.model, cost.dense, cost.speedup) == (PassCost(seconds=0.5), PassCost(seconds=1.5), 3.0)
    (cost,) = RunRecord(**SMALL, latency=latency | {"dense_seconds": None}).costs
    assert (cost.dense, cost.speedup) == (None, None)
    assert RunRecord(**SMALL, latency=None).costs == []
