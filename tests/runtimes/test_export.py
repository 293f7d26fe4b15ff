"""A saved model in other runtimes: its files, its outputs there, and what is told of both."""

import importlib.util
import json
import re
import shutil

import pytest
import tokenizers
import torch
import transformers
from models import bert, llama, t5
from shrunk import save_shrunk
from text_models import save_text_model, texts, tokenizer

import hf_prune
from hf_prune.cli.commands import app
from hf_prune.cli.print_export import print_export
from hf_prune.errors import ExportError
from hf_prune.runtimes import export, exporters
from hf_prune.runtimes.export import Texts, export_model
from hf_prune.runtimes.exporters import FORMATS, find_format
from hf_prune.runtimes.passes import agreement, difference, run_pass, stages_of
from hf_prune.runtimes.samples import drawn_samples, inputs_for, samples_of_texts


def needs(to, int8=False):
    """Skip a test where what a format needs is not installed; `make test` installs onnx and openvino."""
    entry = FORMATS[to]
    modules = (*entry.modules, *(entry.int8_modules if int8 else ()))
    missing = [name for name in modules if not exporters._is_installed(name)]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


# What the libraries of the runtimes warn of themselves.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A BERT with a tokenizer, in which 90% of the weights are zero."""
    folder = tmp_path_factory.mktemp("saved") / "sparse"
    save_text_model(folder, bert)
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.bert.encoder.parameters():
            if weight.ndim == 2:
                weight[torch.rand_like(weight) < 0.9] = 0
    model.save_pretrained(folder)
    return folder


LABELLED = Texts(texts(20), "random texts", [number % 2 for number in range(20)])


# ---- ONNX Runtime ----


@pytest.fixture(scope="module")
def in_onnx(saved, tmp_path_factory):
    output = tmp_path_factory.mktemp("exports") / "onnx"
    said = []
    with torch.random.fork_rng():
        report = export_model(saved, output, "onnx", int8=True, texts=LABELLED, say=said.append)
    return output, report, said


@needs("onnx")
def test_all_models_are_measured_and_what_is_written_says_so(in_onnx):
    output, report, said = in_onnx
    assert [(row.runtime, row.model, row.precision) for row in report.rows] == [
        ("PyTorch", "dense", "float32"),
        ("PyTorch", "this model", "float32"),
        ("ONNX Runtime", "dense", "float32"),
        ("ONNX Runtime", "this model", "float32"),
        ("ONNX Runtime", "this model", "int8"),
    ]
    assert all(set(row.seconds) == {1, 8} and min(row.seconds.values()) > 0 for row in report.rows)
    assert report.rows[3].difference < 1e-5 < report.rows[4].difference < 0.2
    assert report.rows[3].agreement == 1.0
    assert report.rows[1].accuracy == report.rows[3].accuracy
    assert report.rows[0].accuracy is None
    assert report.sparsity == pytest.approx(0.9, abs=0.05)
    assert (report.number, report.samples, report.dense_is_new) == (20, "random texts", True)
    assert json.loads((output / "export_report.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(report.to_dict())
    )
    card = (output / "README.md").read_text(encoding="utf-8")
    assert card.count("| ONNX Runtime, ") == 3
    assert f"{report.rows[4].accuracy:.1%}" in card
    assert "new weights" in card
    assert str(output.parent) not in card + (output / "export_report.json").read_text(encoding="utf-8")
    assert len(said) == 4


@needs("onnx")
def test_the_command_prints_what_was_measured(in_onnx, capsys):
    output, report, _ = in_onnx
    print_export(report, output)
    printed = capsys.readouterr().out
    for row in report.rows:
        assert printed.count(f"{row.runtime}, {row.model}, {row.precision}") == 2
    assert f"{1000 * report.rows[0].seconds[1]:.1f}" in printed
    assert f"{report.rows[-1].difference:.1e}" in printed
    assert max(map(len, printed.split("Milliseconds")[0].splitlines())) <= 80


@needs("onnx")
def test_the_folder_opens_by_itself(in_onnx, saved):
    import onnxruntime
    from transformers import AutoTokenizer

    output = in_onnx[0]
    assert {file.name for file in output.parent.iterdir()} == {"onnx"}
    session = onnxruntime.InferenceSession(output / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = AutoTokenizer.from_pretrained(output)(texts(3), padding=True, return_tensors="np")
    taken = {one.name for one in session.get_inputs()}
    (found,) = session.run(["logits"], {name: value for name, value in inputs.items() if name in taken})
    model = transformers.BertForSequenceClassification.from_pretrained(saved).eval()
    with torch.inference_mode():
        expected = model(**{name: torch.tensor(value) for name, value in inputs.items()}).logits
    assert difference([torch.tensor(found)], [expected]) < 0.2  # it is the one in int8
    assert any(one.dtype.name == "int8" for one in _weights(output / "model.onnx"))


def _weights(path):
    import onnx

    return [onnx.numpy_helper.to_array(one, str(path.parent)) for one in onnx.load(path).graph.initializer]


@needs("onnx")
def test_what_is_wrong_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "difference", lambda found, expected: 0.5)
    monkeypatch.setattr(export, "_MOST_PARAMETERS", 0)  # no dense model is built
    with pytest.raises(ExportError, match=r"differ by 5\.0e-01 of the largest"):
        export_model(saved, tmp_path / "out", "onnx", dense=None)
    assert not list(tmp_path.iterdir())


# ---- OpenVINO ----


@needs("openvino", int8=True)
def test_a_model_without_some_units_runs_in_openvino(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_MOST_PARAMETERS", 0)  # no dense model is built
    save_shrunk(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    report = export_model(tmp_path / "small", tmp_path / "out", "openvino", int8=True)
    by_row = {(row.runtime, row.model, row.precision): row for row in report.rows}
    assert by_row["OpenVINO", "this model", "float32"].difference < 0.05
    assert by_row["OpenVINO", "this model", "int8"].agreement > 0.5
    assert "drawn from the vocabulary" in report.samples
    assert {"openvino_model.xml", "openvino_model.bin"} <= {file.name for file in (tmp_path / "out").iterdir()}


# ---- Generation ----


@pytest.mark.slow
@pytest.mark.parametrize("to", [pytest.param(to, marks=needs(to)) for to in ("onnx", "openvino")])
def test_a_language_model_generates_with_its_cache(tmp_path, to):
    save_text_model(tmp_path / "model", llama)
    report = export_model(tmp_path / "model", tmp_path / "out", to, dense=tmp_path / "model")
    rows = [row for row in report.rows if row.runtime != "PyTorch"]
    assert [row.model for row in rows] == ["dense", "this model"]
    assert rows[1].difference < 0.05
    assert rows[1].agreement > 0.9
    assert not report.dense_is_new
    assert "8 tokens after it" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def bart():
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
    layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = transformers.BartConfig(vocab_size=64, **sizes, **layers, **ids, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config)


def spread(build):
    """A model whose weights are large enough for outputs that depend on the input."""
    model = build()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.0)
    return model


def generated_in_onnxruntime(folder, inputs, start, number):
    """The most likely tokens, one by one, from the three graphs of an encoder-decoder; with onnxruntime alone."""
    import numpy
    import onnxruntime

    def run(name, feed):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        outputs = [one.name for one in session.get_outputs()]
        wanted = {one.name: feed[one.name.removeprefix("input.")] for one in session.get_inputs()}
        return {
            name.removeprefix("output."): value
            for name, value in zip(outputs, session.run(outputs, wanted), strict=True)
        }

    encoded = run("encoder", inputs)["last_hidden_state"]
    given = {"attention_mask": inputs["attention_mask"], "encoder_outputs.last_hidden_state": encoded}
    ids, cache, tokens = numpy.full((len(encoded), 1), start), {}, []
    while len(tokens) < number:
        found = run("decode" if tokens else "prefill", {"decoder_input_ids": ids, **given, **cache})
        ids = found["logits"][:, -1:].argmax(-1)
        cache = {name: value for name, value in found.items() if name.startswith("past_key_values.")}
        tokens.append(ids)
    return numpy.concatenate(tokens, axis=1)


@needs("onnx")
@pytest.mark.parametrize("build", [t5, pytest.param(bart, marks=pytest.mark.slow)])
def test_an_encoder_decoder_generates_with_what_was_exported(tmp_path, monkeypatch, build):
    monkeypatch.setattr(export, "_MOST_PARAMETERS", 0)  # no dense model is built
    save_text_model(tmp_path / "model", lambda: spread(build))
    report = export_model(tmp_path / "model", tmp_path / "out", "onnx", texts=Texts(texts(10), "texts"))
    assert report.stages == ["encoder", "prefill", "decode"]
    assert (report.rows[1].runtime, report.rows[1].agreement) == ("ONNX Runtime", 1.0)
    assert report.rows[1].difference < 1e-4

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    start = model.generation_config.decoder_start_token_id
    asked = texts(3, seed=1)
    inputs = tokenizer()(asked, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert not inputs["attention_mask"].all()
    model.generation_config.eos_token_id = None
    expected = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=12)[:, 1:]
    assert len({tuple(row.tolist()) for row in expected}) == 3
    arrays = {name: value.numpy() for name, value in inputs.items()}
    assert generated_in_onnxruntime(tmp_path / "out", arrays, start, 12).tolist() == expected.tolist()
    alone = {name: value[:1, : int(inputs["attention_mask"][0].sum())] for name, value in arrays.items()}
    assert generated_in_onnxruntime(tmp_path / "out", alone, start, 12).tolist() == expected[:1].tolist()

    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(tmp_path / "out"))
    names = {"texts": asked}
    exec(code, names)
    assert torch.cat(names["tokens"], dim=1)[:, :12].tolist() == expected.tolist()
    assert "9 tokens of the decoder" in card


def test_encoder_decoders_that_are_not_exported_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_format", lambda to, int8: FORMATS[to])  # what is not installed is said first
    save_text_model(tmp_path / "t5", t5)
    save_text_model(tmp_path / "encoder", lambda: transformers.T5Model(t5().config))
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    whisper = transformers.WhisperConfig(vocab_size=64, **sizes, **heads, **ids)
    transformers.WhisperForConditionalGeneration(whisper).save_pretrained(tmp_path / "whisper")
    for name, to, message in (
        (
            "t5",
            "openvino",
            "T5ForConditionalGeneration: encoder-decoders are not exported to openvino; use onnx",
        ),
        ("encoder", "onnx", "T5Model: of encoder-decoders, those that generate text are exported"),
        ("whisper", "onnx", "WhisperForConditionalGeneration: .* it reads input_features"),
    ):
        with pytest.raises(ExportError, match=message):
            export_model(tmp_path / name, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_without_a_first_token_is_refused():
    model = t5()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ExportError, match=r"expected decoder_start_token_id in config\.json"):
        inputs_for(model, {"input_ids": torch.ones(1, 3, dtype=torch.int64)})


@needs("gguf", int8=True)
def test_a_sparse_llama_opens_from_gguf_bit_for_bit_and_keeps_its_zeros_in_int8(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_MOST_PARAMETERS", 0)  # no dense model is built
    save_text_model(tmp_path / "model", lambda: llama(hidden_size=32, num_key_value_heads=2))
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:
                weight[torch.rand_like(weight) < 0.9] = 0
    model.save_pretrained(tmp_path / "model")
    report = export_model(tmp_path / "model", tmp_path / "out", "gguf", int8=True)
    rows = [row for row in report.rows if row.runtime != "PyTorch"]
    assert [(row.precision, row.difference == 0) for row in rows] == [("float32", True), ("int8", False)]
    assert rows[1].difference < 0.05
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").state_dict()
    for name, weight in model.state_dict().items():
        assert bool((again[name][weight == 0] == 0).all()), name
    assert "llama.cpp" not in report.rows[-1].runtime


@needs("gguf")
def test_a_byte_level_tokenizer_is_written_into_the_gguf_file(tmp_path, monkeypatch):
    import gguf

    monkeypatch.setattr(export, "_MOST_PARAMETERS", 0)  # no dense model is built
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    pieces.train_from_iterator(["a film that is a good film"] * 20, trainer)
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|end|>", pad_token="<|end|>")
    save_text_model(tmp_path / "model", lambda: llama(vocab_size=300))
    words.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "out", "gguf")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for text in ("a good film", "that is Ä", "film<|end|>"):
        assert again(text)["input_ids"] == words(text)["input_ids"]
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == words.eos_token_id


@needs("gguf")
def test_what_gguf_cannot_hold_is_refused(saved, tmp_path):
    with pytest.raises(ExportError, match="gguf is written for models of the type llama, got bert"):
        export_model(saved, tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())
    (tmp_path / "bare").mkdir()
    shutil.copy(saved / "config.json", tmp_path / "bare")  # without weights: the class alone decides
    with pytest.raises(ExportError, match="gguf is written for models of the type llama"):
        export_model(tmp_path / "bare", tmp_path / "out", "gguf")


@needs("litert")
def test_a_model_without_some_units_runs_in_litert(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_MOST_PARAMETERS", 0)  # no dense model is built
    save_shrunk(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    report = export_model(tmp_path / "small", tmp_path / "out", "litert", texts=LABELLED)
    assert report.rows[1].runtime == "LiteRT"
    assert report.rows[1].difference < 1e-4
    assert (tmp_path / "out" / "model.tflite").exists()


def test_a_pass_of_an_encoder_decoder_is_that_without_a_cache():
    torch.manual_seed(0)
    model = spread(t5).eval()
    ids = torch.randint(3, 64, (2, 6))
    batch = inputs_for(model, {"input_ids": ids, "attention_mask": (ids > 20).long()})
    found = run_pass(stages_of(model), model.config, batch)
    tokens = torch.cat([batch["decoder_input_ids"], found.argmax(-1)[:, :-1]], dim=1)
    with torch.inference_mode():
        whole = model(input_ids=ids, attention_mask=batch["attention_mask"], decoder_input_ids=tokens).logits
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


def test_a_pass_of_a_language_model_is_that_without_a_cache():
    torch.manual_seed(0)
    model = llama().eval()
    ids = torch.randint(3, 64, (2, 6))
    found = run_pass(stages_of(model), model.config, {"input_ids": ids})
    following = found.argmax(-1)
    with torch.inference_mode():
        whole = model(torch.cat([ids, following[:, :-1]], dim=1)).logits
    torch.testing.assert_close(found, whole[:, 5:], atol=1e-5, rtol=1e-4)
    again = run_pass(stages_of(model), model.config, {"input_ids": ids}, following)
    assert torch.equal(again, found)


# ---- What is refused ----


def test_formats_and_packages_are_checked_first(monkeypatch, capsys, tmp_path):
    with pytest.raises(ExportError, match=r"expected one of onnx, .*got 'onx'; did you mean 'onnx'"):
        find_format("onx")
    with pytest.raises(ExportError, match=r"--int8: expected one of the formats onnx, openvino.*, got executorch"):
        find_format("executorch", int8=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        app(["export", str(tmp_path), str(tmp_path / "out"), "--to", "openvino", "--int8"], standalone_mode=True)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "openvino needs transformers.exporters.base, openvino, nncf, which are not installed" in error
    assert "pip install 'hf-prune[openvino]'" in error


@needs("onnx")
def test_a_folder_with_files_and_models_that_are_no_are_refused(saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(ExportError, match="OUT: expected a new or an empty folder"):
        export_model(saved, tmp_path / "out", "onnx")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ExportError, match="OUT: expected a new or an empty folder, got a link to what does not exist"):
        export_model(saved, tmp_path / "link", "onnx")
    with pytest.raises(ExportError, match=r"OUT: .* cannot be written: "):
        export_model(saved, tmp_path / "out" / "file" / "inner", "onnx")
    hf_prune.save_packed(saved, tmp_path / "packed")
    shutil.copy(saved / "config.json", tmp_path / "packed")
    with pytest.raises(ExportError, match=r"the weights are packed, and config\.json does not say so"):
        export_model(tmp_path / "packed", tmp_path / "other", "onnx")
    assert not (tmp_path / "other").exists()


def test_labels_are_numbers_or_names_of_the_model():
    model = bert()
    model.config.label2id, model.config.id2label = {"bad": 0, "good": 1}, {0: "bad", 1: "good"}
    found = samples_of_texts(model, tokenizer(), texts(3), ["good", "bad", 1], 8, "texts")
    assert found.labels[0].tolist() == [1, 0, 1]
    with pytest.raises(ExportError, match="--label-column: expected the labels bad, good, got 'dull'"):
        samples_of_texts(model, tokenizer(), texts(1), ["dull"], 8, "texts")


# ---- Samples and measures ----


def test_samples_of_a_language_model_are_pieces_without_padding():
    found = samples_of_texts(llama(), tokenizer(), texts(40), None, 6, "texts")
    assert {tuple(batch["input_ids"].shape[1:]) for batch in found.batches} == {(6,)}
    assert all(bool(batch["attention_mask"].all()) for batch in found.batches)
    assert [len(batch["input_ids"]) for batch in found.timed] == [1, 8]
    with pytest.raises(ExportError, match="expected texts of 16 tokens or more, got"):
        samples_of_texts(llama(), tokenizer(), ["w1 w2"], None, 200, "texts")


def test_tokens_are_drawn_without_special_ones_and_the_same_every_time():
    found, again = (drawn_samples(bert(), tokenizer(), 16) for _ in range(2))
    ids = torch.cat([batch["input_ids"] for batch in found.batches])
    assert ids.shape == (16, 16)
    assert int(ids.min()) > 2
    assert torch.equal(ids, torch.cat([batch["input_ids"] for batch in again.batches]))


def test_differences_are_relative_and_nothing_hides_in_them():
    expected = [torch.tensor([[1.0, -4.0]])]
    assert difference([torch.tensor([[1.0, -3.0]])], expected) == pytest.approx(0.25)
    assert difference([torch.tensor([[1.0, float("nan")]])], expected) == float("inf")
    assert difference([torch.tensor([[1.0]])], expected) == float("inf")
    assert agreement([torch.tensor([[1.0, 2.0], [3.0, 1.0]])], [torch.tensor([[1.0, 2.0], [1.0, 3.0]])]) == 0.5


def test_every_extra_is_declared():
    import tomllib
    from pathlib import Path

    import hf_prune

    path = Path(hf_prune.__file__).parents[1] / "pyproject.toml"
    extras = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name, entry in FORMATS.items():
        declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in extras[entry.extra]}
        needed = {one.partition(".")[0] for one in (*entry.modules, *entry.int8_modules)} - {"transformers"}
        assert needed <= declared, name
