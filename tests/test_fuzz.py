"""Random bytes and random edits of every file that is read: each ends in a line or in a right result.

Never in a traceback or a hang; and an edit of masks or pruning state is never taken for what was saved.
"""

import contextlib
import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import bert
from shrunk import LAYERS, NEURONS, chosen_of, save_shrunk

from hf_prune import Pruner, PruningConfig
from hf_prune.config.pruning import load_configs
from hf_prune.errors import HfPruneError, PruningStateError
from hf_prune.publish.card import make_files, read_card, write_card
from hf_prune.publish.card_merge import merge_cards
from hf_prune.publish.push_plan import choose_files
from hf_prune.publish.record import Evaluation, RunRecord, Source, load_record, save_record
from hf_prune.publish.sources import describe_base
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.schema import Recipe
from hf_prune.saved.model import SavedModel
from hf_prune.saved.report import make_report
from hf_prune.saved.unit_scores import read_unit_scores, write_unit_scores
from hf_prune.structure.chosen import SEARCH_NAME, write_chosen
from hf_prune.trainer.checkpoints import is_complete, newest_complete, was_distilled

CONFIG = PruningConfig(sparsity=0.5, begin=1, end=8, frequency=2, overrides={r".*query\.weight": 0.3})

RECIPE = (Path(__file__).parents[1] / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")

# What is put in: marks of YAML, JSON and Markdown, and values that are hard to hold.
PIECES = [
    *(b"\0", b"\xff", b"\n", b"\r", b"\t", b"  ", b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"#", b"-"),
    *(b"- ", b"? ", b": ", b"&a ", b"*a", b"<<: *a", b"| ", b"!!int ", b"!!set ", b"!!timestamp ", b"---\n", b"...\n"),
    *(b"NaN", b"1e999", b"-1", b"0", b"9" * 400, b"9" * 5000, b"[" * 3000, b"{a: " * 300, b"\\ud800", b"\xe2\x80\xa8"),
    *(b"<!-- hf-prune: begin summary -->\n", b"<!-- hf-prune: end summary -->\n", b"null", b"true", b"2001-13-45"),
]

# What JSON values are replaced with, as text.
VALUES = [
    *("null", "true", "-1", "0", "1", "2", "1.5", "1e300", "1e999", "NaN", "-Infinity", "9" * 400, "9" * 5000),
    *('""', '"x"', '"1"', '"a\\nb"', '"\\u0000"', '"\\ud800"', '"../../x"', f'"{"x" * 5000}"', '"[*](/)"'),
    *("[]", "{}", "[[[]]]", "[null]", '["a", 1, null]', '{"a": {"b": []}}', '{"": 0}', f"{'[' * 200}{']' * 200}"),
]

PLACE = "\x01 the place of a value"


def quick(examples):
    ignored = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=ignored)


@st.composite
def edited(draw, content: bytes):
    """Bytes with one to three edits: a piece put in, in place of others or not; some left out, repeated or changed."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = at + draw(st.integers(1, 30))
        before, part, after = content[:at], content[at:end], content[end:]
        what = draw(st.sampled_from(["put in", "replace", "leave out", "repeat", "change", "cut", "random"]))
        if what == "put in":
            content = before + draw(st.sampled_from(PIECES)) + part + after
        elif what == "replace":
            content = before + draw(st.sampled_from(PIECES)) + after
        elif what == "leave out":
            content = before + after
        elif what == "repeat":
            content = before + part + part + after
        elif what == "change":
            content = before + bytes(byte ^ draw(st.sampled_from([1, 2, 128])) for byte in part[:1]) + part[1:] + after
        elif what == "cut":
            content = before
        else:
            content = before + draw(st.binary(min_size=1, max_size=10)) + after
    return content


def places_in(content, above=()):
    """The paths of all values in a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [above, *(place for key, value in items for place in places_in(value, (*above, key)))]


@st.composite
def edited_json(draw, content):
    """The text of a JSON document, one or two values of which are replaced, left out, or called otherwise."""
    content = {"": copy.deepcopy(content)}
    pieces = []
    for _ in range(draw(st.integers(1, 2))):
        *above, key = draw(st.sampled_from(places_in(content)[1:]))
        parent = content
        for part in above:
            parent = parent[part]
        what = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "rename"]))
        if not above or what == "replace":
            parent[key] = f"{PLACE}{len(pieces)}"
            pieces.append(draw(st.sampled_from(VALUES)))
        elif what == "leave out" or isinstance(key, int):
            del parent[key]
        else:
            parent[f"{key} "] = parent.pop(key)
    text = json.dumps(content[""])
    for index, piece in enumerate(pieces):
        text = text.replace(json.dumps(f"{PLACE}{index}"), piece)
    return text.encode()


@contextlib.contextmanager
def edited_file(path, data, header=False):
    """A file with an edit that is drawn, and afterwards as before; `header`: the JSON header of safetensors."""
    before = path.read_bytes()
    end = 8 + int.from_bytes(before[:8], "little") if header else 0
    is_json = header or path.suffix in (".json",)
    if is_json and data.draw(st.booleans(), label="as JSON"):
        content = data.draw(edited_json(json.loads(before[8:end] if header else before)), label=path.name)
        content = len(content).to_bytes(8, "little") + content + before[end:] if header else content
    else:
        content = data.draw(edited(before), label=path.name)
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def or_lines():
    """Nothing but errors of hf-prune, whose text can be printed."""
    try:
        yield
    except HfPruneError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.strip() for line in lines)
        str(error).encode()


def pruner_of(model):
    return Pruner(model, CONFIG, 10)


@pytest.fixture(scope="module")
def pruner():
    torch.manual_seed(0)
    found = pruner_of(bert())
    for _ in range(5):
        found.step()
    return found


@pytest.fixture(scope="module")
def others():
    """Another pruner of the same kind, that has made no step."""
    return [pruner_of(bert())]


@pytest.fixture(scope="module")
def folder(pruner, tmp_path_factory):
    """A pruned model with all that lies beside one. Every test leaves it as it was."""
    path = tmp_path_factory.mktemp("model")
    pruner.model.save_pretrained(path)
    pruner.save(path)
    evaluation = Evaluation(
        metrics={"accuracy": 0.75, "loss": 0.5},
        main_metric="accuracy",
        dense_metrics={"accuracy": 0.8},
        samples=10,
        dataset=Source(name="films", hub_name="ada/films", split="test"),
    )
    record = RunRecord(
        name="m",
        chosen={"license": "mit"},
        tags=["film"],
        base_model=Source(name="ada/bert", hub_name="ada/bert", license="mit", languages=["en"]),
        pruning=[CONFIG.to_dict()],
        target_sparsity=0.5,
        steps=10,
        seed=1,
        history=[{"step": 1, "loss": 0.9, "sparsity": 0.0}, {"step": 2, "loss": 0.7, "sparsity": 0.5}],
        evaluations=[evaluation],
        training_arguments={"learning_rate": 0.1},
        recipe={"task": "text-classification"},
        weights=SavedModel(path).hashes,
    )
    save_record(path, record)
    write_card(path)
    (path / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (path / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 0.5, "step": 1}], "global_step": 5}))
    return path


@pytest.fixture(scope="module")
def sharded(pruner, tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    pruner.model.save_pretrained(path, max_shard_size="20KB")
    return path


@quick(120)
@given(data=st.data())
def test_recipes(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    as_json = edited_json(yaml.safe_load(RECIPE))  # which is YAML, too
    path.write_bytes(data.draw(as_json if data.draw(st.booleans(), label="as JSON") else edited(RECIPE.encode())))
    with or_lines():
        assert isinstance(load_recipe(path), Recipe)


@quick(150)
@given(data=st.data())
def test_configurations(data, folder):
    with edited_file(folder / "pruning_config.json", data), or_lines():
        for config in load_configs(folder):
            assert PruningConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["pruning_masks.safetensors", "pruning_state.json", "pruning_config.json"])
@quick(120)
@given(data=st.data())
def test_masks_and_state(data, folder, pruner, others, name):
    other = others[0]
    with edited_file(folder / name, data, header=name.endswith(".safetensors")):
        try:
            other.load(folder)
        except PruningStateError as error:
            refused = str(error)
        else:
            refused = ""
    if refused:
        assert refused.encode().startswith(str(folder).encode())
        assert other.completed_steps == 0
        return
    others[0] = pruner_of(other.model)  # at the start again
    assert all(torch.equal(other.masks[name], mask) for name, mask in pruner.masks.items())
    assert other._state == pruner._state


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pruning_config.json"])
@quick(40)
@given(data=st.data())
def test_reports(data, folder, name):
    expected = make_report(folder)
    with edited_file(folder / name, data, header=name.endswith(".safetensors")), or_lines():
        found = make_report(folder)
        if name == "config.json" and found.note is None:
            assert (found.sparsity, found.file_bytes) == (expected.sparsity, expected.file_bytes)


@quick(60)
@given(data=st.data())
def test_indexes(data, sharded):
    with edited_file(sharded / "model.safetensors.index.json", data), or_lines():
        make_report(sharded)


@quick(60)
@given(data=st.data())
def test_records(data, folder):
    with edited_file(folder / "run_record.json", data), or_lines():
        record = load_record(folder)
        assert record == RunRecord.model_validate(record.model_dump())


@quick(15)
@given(data=st.data())
def test_cards_of_records(data, folder):
    with edited_file(folder / "run_record.json", data), or_lines():
        make_files(folder)


@pytest.mark.parametrize("name", ["README.md", "sparsity.json"])
@quick(100)
@given(data=st.data())
def test_cards_and_figures(data, folder, name):
    generated = (folder / "README.md").read_text(encoding="utf-8")
    with edited_file(folder / name, data), or_lines():
        merged = merge_cards(generated, here=read_card(folder))
        assert merged.encode()


@quick(60)
@given(data=st.data())
def test_cards_of_base_models(data, folder):
    with edited_file(folder / "README.md", data):
        source, _ = describe_base(str(folder))
        assert source.name == folder.name


@pytest.mark.parametrize("name", ["modules.json", "tokenizer_config.json"])
@quick(40)
@given(data=st.data())
def test_files_to_push(data, folder, name):
    with edited_file(folder / name, data), or_lines():
        chosen, _ = choose_files(folder, {"model.safetensors"}, with_masks=True)
        assert all(path.is_relative_to(folder) for path in chosen.values())


@quick(40)
@given(data=st.data())
def test_states_of_trainers(data, folder):
    assert is_complete(folder)
    with edited_file(folder / "trainer_state.json", data):
        newest_complete(folder.parent)
        is_complete(folder)
        was_distilled(folder)


# ---- A model out of which units were cut ----


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model out of which neurons and layers were cut, with all that lies beside one."""
    path = tmp_path_factory.mktemp("small")
    save_shrunk(path)
    write_card(path)
    return path


@quick(120)
@given(data=st.data())
def test_reports_of_smaller_models(data, small):
    with edited_file(small / "pruning_structure.json", data), or_lines():
        report = make_report(small)
        assert report.removed is None or report.removed.words.encode()
        json.dumps(report.to_dict())


@quick(20)
@given(data=st.data())
def test_cards_of_smaller_models(data, small):
    with edited_file(small / "pruning_structure.json", data), or_lines():
        assert make_files(small)["README.md"].decode()


@quick(40)
@given(data=st.data())
def test_choices_beside_smaller_models(data, small):
    write_chosen(small, chosen_of())
    try:
        with edited_file(small / SEARCH_NAME, data), or_lines():
            assert make_files(small)["README.md"].decode()
    finally:
        (small / SEARCH_NAME).unlink()


@quick(60)
@given(data=st.data())
def test_checkpoints_of_smaller_models(data, small):
    pruner = Pruner(bert(num_hidden_layers=4), [NEURONS, LAYERS])
    with edited_file(small / "pruning_structure.json", data), or_lines():
        pruner.cut_as_saved(small)


@quick(120)
@given(data=st.data())
def test_scores_of_units(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    units = {"neurons of a": 3, "layers of b": 1}
    write_unit_scores(folder, {name: torch.rand(number).double() for name, number in units.items()})
    with edited_file(folder / "pruning_unit_scores.safetensors", data, header=True), or_lines():
        for name, scores in read_unit_scores(folder, units).items():
            assert scores.shape == (units[name],)
            assert bool(scores.isfinite().all())
