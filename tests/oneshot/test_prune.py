import copy
import json

import pytest
import torch
import transformers
from models import LENGTH, VOCABULARY, bert, gpt2, llama, mixtral, t5
from safetensors.torch import load_file
from text_models import texts, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_prune import (
    CalibrationConfig,
    CalibrationConfigError,
    Pruner,
    PruningConfig,
    PruningConfigError,
    prune,
)
from hf_prune.config.pruning import load_configs
from hf_prune.errors import ArgumentError, CalibrationError
from hf_prune.methods.patterns import count_of, parse_pattern
from hf_prune.oneshot.work import WORK_NAME
from hf_prune.saved.report import make_report

SETTINGS = CalibrationConfig(batch_size=2)


def tokens(samples=6, length=LENGTH):
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


def masked(model, pruned):
    """How many weights of each pruned tensor are zero, and whether they are those that its mask says."""
    parameters = dict(model.named_parameters())
    for name, mask in pruned.masks.items():
        assert not bool(parameters[name][~mask].any())
    return {name: int((~mask).sum()) for name, mask in pruned.masks.items()}


def error_of(model, dense, inputs):
    with torch.no_grad():
        expected, found = dense(**inputs).logits, model(**inputs).logits
    return float((found - expected).norm() / expected.norm())


METHODS = (
    {"method": "sparsegpt"},
    {"method": "alps"},
    {"method": "wanda"},
    {"method": "magnitude"},
    {"method": "random"},
    {"method": "wanda", "reconstruction": "least_squares"},
    {"method": "magnitude", "reconstruction": "least_squares"},
    {"method": "random", "reconstruction": "least_squares"},
)


@pytest.mark.parametrize("fields", METHODS, ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x2"])
def test_every_method_masks_exactly_the_share_of_each_tensor(fields, pattern):
    model = llama()
    config = PruningConfig(**fields, pattern=pattern, sparsity=None if pattern == "2:4" else 0.45)
    pruned = prune(model, config, tokens(), SETTINGS)
    unit = parse_pattern(pattern)
    for name, count in masked(model, pruned).items():
        units = pruned.masks[name].numel() // unit.unit_size
        expected = units * 2 if pattern == "2:4" else count_of(0.45, units) * unit.unit_size
        assert count == expected, name
    assert len(pruned.masks) == 14  # seven layers in each of two blocks


def test_zeros_that_are_there_stay_and_are_counted():
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[torch.rand_like(weight) < 0.3] = 0
    before = weight == 0
    pruned = prune(model, PruningConfig(method="alps", sparsity=0.5), tokens(), SETTINGS)
    assert bool((weight == 0)[before].all())
    assert int((weight == 0).sum()) == count_of(0.5, weight.numel())
    assert pruned.sparsity == pytest.approx(0.5, abs=0.01)


def test_each_row_has_the_same_share_where_the_scope_says_so():
    model = llama()
    prune(model, PruningConfig(method="wanda", sparsity=0.5, scope="row"), tokens(), SETTINGS)
    for layer in model.model.layers:
        zeros = (layer.self_attn.q_proj.weight == 0).sum(1)
        assert set(zeros.tolist()) == {layer.self_attn.q_proj.weight.shape[1] // 2}


def test_a_share_for_some_tensors_of_their_own():
    model = llama()
    config = PruningConfig(method="sparsegpt", sparsity=0.5, overrides={".*down_proj.*": 0.25}, exclude=[".*q_proj.*"])
    pruned = prune(model, config, tokens(), SETTINGS)
    shares = {name: count / pruned.masks[name].numel() for name, count in masked(model, pruned).items()}
    assert not any("q_proj" in name for name in shares)
    for name, share in shares.items():
        assert share == pytest.approx(0.25 if "down_proj" in name else 0.5, abs=0.01)


def test_the_same_data_give_the_same_weights_bit_for_bit():
    first, dense = llama(), None
    dense = copy.deepcopy(first)
    second = copy.deepcopy(first)
    config = PruningConfig(method="alps", sparsity=0.6)
    for model in (first, second):
        prune(model, config, tokens(), SETTINGS)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    other = copy.deepcopy(dense)
    prune(other, config, tokens(samples=8), SETTINGS)
    assert not torch.equal(other.model.layers[0].mlp.up_proj.weight, first.model.layers[0].mlp.up_proj.weight)


def test_a_layer_that_approximates_its_own_output_is_damped_as_the_paper_says():
    """With a tenth of what is best where it approximates that of the dense model; `alps` has one damping for both."""
    config, own = PruningConfig(method="sparsegpt", sparsity=0.5), {"dense_weight": 0, "residual_weight": 0}
    by_default, data = llama(), tokens()
    asked = copy.deepcopy(by_default)
    dampings = [
        prune(model, config, data, CalibrationConfig(**fields)).damping
        for model, fields in ((by_default, own), (asked, {**own, "damping": 0.01}), (llama(), {}))
    ]
    assert dampings == [0.01, 0.01, 0.1]
    for one, other in zip(by_default.parameters(), asked.parameters(), strict=True):
        assert torch.equal(one, other)
    assert prune(llama(), PruningConfig(method="alps", sparsity=0.5), tokens(), CalibrationConfig(**own)).damping == 0.3


def test_weights_that_make_up_for_others_leave_the_outputs_nearer():
    torch.manual_seed(0)
    dense, inputs = llama(), {"input_ids": tokens(32, 16)}
    errors = {}
    for name, fields, settings in (
        ("magnitude", {"method": "magnitude"}, {}),
        ("own", {"method": "sparsegpt"}, {"dense_weight": 0.0, "residual_weight": 0.0}),
        ("dense", {"method": "sparsegpt"}, {}),
    ):
        model = copy.deepcopy(dense)
        prune(model, PruningConfig(**fields, sparsity=0.5), inputs["input_ids"], CalibrationConfig(**settings))
        errors[name] = error_of(model, dense, inputs)
    assert errors["dense"] < errors["own"] < errors["magnitude"]


@pytest.mark.parametrize("build", [gpt2, t5, bert, mixtral], ids=lambda build: build.__name__)
def test_other_architectures_are_pruned_whole(build):
    model = build()
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens(12).split(3)]
    if build is t5:
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    pruned = prune(model, PruningConfig(method="sparsegpt", sparsity=0.5), batches, SETTINGS)
    expected = Pruner(build(), PruningConfig(sparsity=0.5), total_steps=10).masks
    assert pruned.masks.keys() == expected.keys()
    for name, count in masked(model, pruned).items():
        assert count == count_of(0.5, pruned.masks[name].numel()), name


class Parallel(PreTrainedModel):
    """A model in which a layer that writes into the stream, and one that does not, get the same inputs."""

    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.norm = nn.Embedding(VOCABULARY, 16), nn.LayerNorm(16)
        self.first, self.writer, self.other = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 24)
        self.post_init()

    def forward(self, input_ids):
        stream = self.embedding(input_ids)
        stream = stream + self.first(self.norm(stream))
        inputs = self.norm(stream)
        return stream + self.writer(inputs), self.other(inputs)


def test_what_the_stream_lacks_is_not_taken_for_the_next_layer_with_the_same_inputs():
    model = Parallel(transformers.BertConfig())
    config = PruningConfig(method="sparsegpt", sparsity=0.5, targets=[r"(first|writer|other)\.weight"])
    pruned = prune(model, config, tokens(12), SETTINGS)
    assert masked(model, pruned) == {"first.weight": 128, "writer.weight": 128, "other.weight": 192}


class Learned(Parallel):
    """A model whose first inputs are a parameter."""

    def __init__(self, config):
        super().__init__(config)
        self.latents = nn.Parameter(torch.randn(24, 16))

    def forward(self, input_ids):
        return self.other(self.latents + self.first(self.latents)) + self.embedding(input_ids).mean()


def test_inputs_may_be_a_parameter():
    model = Learned(transformers.BertConfig())
    config = PruningConfig(method="sparsegpt", sparsity=0.5, targets=[r"(first|other)\.weight"])
    assert masked(model, prune(model, config, tokens(), SETTINGS)) == {"first.weight": 128, "other.weight": 192}


class Branches(PreTrainedModel):
    """A model in which convolutions of several kinds read one tensor."""

    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.strided, self.pointwise = nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.Conv2d(4, 8, 1)
        self.post_init()

    def forward(self, pixel_values):
        return [branch(pixel_values) for branch in (self.first, self.second, self.strided, self.pointwise)]


def test_convolutions_of_one_tensor_are_each_pruned_from_their_own_patches():
    model, batches = Branches(transformers.BertConfig()), [{"pixel_values": torch.randn(3, 4, 6, 6)}]
    config = PruningConfig(method="sparsegpt", sparsity=0.5, targets=[r".*weight"])
    pruned = prune(model, config, batches, SETTINGS)
    assert [layer.tokens for layer in pruned.layers] == [108, 108, 27, 108]
    assert masked(model, pruned) == {
        "first.weight": 144,
        "second.weight": 144,
        "strided.weight": 144,
        "pointwise.weight": 16,
    }


def switch():
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        d_ff=24,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        decoder_start_token_id=0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def test_experts_that_are_modules_may_be_reached_by_some_batches_only_or_by_none():
    model = switch()
    short, long = ({"input_ids": ids, "labels": ids} for ids in (tokens(1, 2), tokens(3, 8)))
    pruned = prune(model, PruningConfig(method="sparsegpt", sparsity=0.5), [short, long], SETTINGS)
    tokens_of = {layer.name: layer.tokens for layer in pruned.layers}
    unseen = [note.split(": ")[0] for note in pruned.notes if "no token reached this expert" in note]
    assert len(unseen) >= 1
    assert not set(unseen) & set(tokens_of)
    assert {*unseen, *tokens_of} == set(pruned.masks)
    assert any("expert_" in name and count > 4 for name, count in tokens_of.items())  # more than the first batch has
    assert any("matrices of experts got fewer tokens" in note for note in pruned.notes)
    for name, count in masked(model, pruned).items():
        assert count == count_of(0.5, pruned.masks[name].numel()), name


class Gated(Parallel):
    """A model that calls one of its layers for long inputs only."""

    def forward(self, input_ids):
        stream = self.first(self.embedding(input_ids))
        return self.other(stream) if input_ids.shape[1] > 4 else stream


def test_a_layer_that_the_first_batch_does_not_call_is_refused_or_left_dense():
    batches = [{"input_ids": tokens(2, 3)}, {"input_ids": tokens(2, 8)}]
    config = PruningConfig(method="sparsegpt", sparsity=0.5, targets=[r"(first|other)\.weight"])
    model = Gated(transformers.BertConfig())
    with pytest.raises(CalibrationError, match=r"other\.weight: expected a call .* of the first batch, saw none"):
        prune(model, config, batches, SETTINGS)
    pruned = prune(model, config, batches, SETTINGS, leave_unreached=True)
    assert (masked(model, pruned), pruned.left_dense) == ({"first.weight": 128}, ["other.weight"])
    assert model.other.weight.all()
    assert prune(model, config, batches[::-1], SETTINGS).left_dense == []


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_a_layer_whose_inputs_are_not_finite_is_named(method):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[2] = 1e30
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight: expected .* finite"):
        prune(model, PruningConfig(method=method, sparsity=0.5), tokens(), SETTINGS)


def test_experts_with_few_tokens_are_named_with_what_was_done():
    model = mixtral()
    pruned = prune(model, PruningConfig(method="alps", sparsity=0.5), tokens(2), SETTINGS)
    assert any("experts got fewer tokens" in note or "no token reached" in note for note in pruned.notes)
    for name, count in masked(model, pruned).items():
        assert count == count_of(0.5, pruned.masks[name].numel()), name


def test_padding_does_not_count():
    dense = llama()
    ids, padded = tokens(4), torch.cat([tokens(4), torch.zeros(4, 5, dtype=torch.int64)], 1)
    mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long().expand_as(padded)
    models = []
    for batches in ([{"input_ids": ids}], [{"input_ids": padded, "attention_mask": mask}]):
        models.append(copy.deepcopy(dense))
        pruned = prune(models[-1], PruningConfig(method="sparsegpt", sparsity=0.5), batches, SETTINGS)
        assert pruned.tokens == ids.numel()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_forward_passes_can_compute_in_bfloat16():
    dense, inputs = llama(), tokens(16, 16)
    models = []
    for autocast in (None, "bfloat16"):
        models.append(copy.deepcopy(dense))
        pruned = prune(
            models[-1], PruningConfig(method="alps", sparsity=0.5), inputs, CalibrationConfig(autocast=autocast)
        )
        assert pruned.sparsity == pytest.approx(0.5, abs=0.01)
    whole, half = (model.model.layers[0].mlp.up_proj.weight for model in models)
    assert whole.dtype == half.dtype == torch.float32
    assert not torch.equal(whole, half)
    assert error_of(models[1], dense, {"input_ids": inputs}) == pytest.approx(
        error_of(models[0], dense, {"input_ids": inputs}), rel=0.1
    )
    with pytest.raises(CalibrationConfigError, match="autocast: expected bfloat16, float16 or None, got 'int8'"):
        CalibrationConfig(autocast="int8")


# ---- Files ----


def test_what_is_saved_opens_plainly_and_is_reported(tmp_path):
    model = llama()
    config = PruningConfig(method="sparsegpt", sparsity=0.5)
    pruned = prune(model, config, tokens(), SETTINGS, directory=tmp_path)
    model.save_pretrained(tmp_path)
    pruned.save(tmp_path)
    assert not (tmp_path / WORK_NAME).exists()
    assert load_configs(tmp_path) == [config]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error_of(opened, model, {"input_ids": tokens()}) == 0
    assert make_report(tmp_path).prunable_sparsity == pruned.sparsity


def test_training_goes_on_with_the_zeros_that_it_left():
    model = llama()
    pruned = prune(model, PruningConfig(method="sparsegpt", sparsity=0.5), tokens(), SETTINGS)
    pruner = Pruner(model, PruningConfig(method="keep"), total_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    assert masked(model, pruned) == {name: int((~mask).sum()) for name, mask in pruned.masks.items()}


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("done", [1, 9])
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(tmp_path, done):
    dense = llama()
    config = PruningConfig(method="alps", sparsity=0.6)
    whole = copy.deepcopy(dense)
    expected = prune(whole, config, tokens(), SETTINGS)

    def stop(number, total, layer):
        if number == done:
            raise StoppedError

    with pytest.raises(StoppedError):
        prune(copy.deepcopy(dense), config, tokens(), SETTINGS, directory=tmp_path, progress=stop)
    resumed = copy.deepcopy(dense)
    solved = []
    pruned = prune(
        resumed,
        config,
        tokens(),
        SETTINGS,
        directory=tmp_path,
        resume=True,
        progress=lambda number, total, layer: solved.append(layer.name),
    )
    assert len(solved) == 14
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(pruned.masks[name], mask) for name, mask in expected.masks.items())
    assert [layer.name for layer in pruned.layers] == [layer.name for layer in expected.layers]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": PruningConfig(method="alps", sparsity=0.7)}, "expected the same pruning"),
        ({"calibration": CalibrationConfig(batch_size=2, damping=0.5)}, "expected the same calibration"),
        ({"data": tokens(5)}, "expected the same data"),
        ({"model": "other"}, "expected the same model"),
        ({"directory": "elsewhere"}, "expected a run to resume"),
    ],
)
def test_a_run_is_resumed_with_the_same_settings_only(tmp_path, change, message):
    dense = llama()

    def stop(number, total, layer):
        raise StoppedError

    given = {"config": PruningConfig(method="alps", sparsity=0.6), "data": tokens(), "calibration": SETTINGS}
    with pytest.raises(StoppedError):
        prune(copy.deepcopy(dense), **given, directory=tmp_path / "run", progress=stop)
    given = {"directory": "run", **given, **change}
    model = llama() if given.pop("model", None) else copy.deepcopy(dense)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=message):
        prune(model, **{**given, "directory": tmp_path / given["directory"]}, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_finished_layer_that_is_damaged_is_named(tmp_path):
    def stop(number, total, layer):
        raise StoppedError

    model = llama()
    with pytest.raises(StoppedError):
        prune(
            copy.deepcopy(model),
            PruningConfig(method="alps", sparsity=0.5),
            tokens(),
            SETTINGS,
            directory=tmp_path,
            progress=stop,
        )
    [file] = (tmp_path / WORK_NAME).glob("*.safetensors")
    assert load_file(file).keys() == {"weight", "kept"}
    assert (
        json.loads((tmp_path / WORK_NAME / "settings.json").read_text(encoding="utf-8"))["pruning"]["method"] == "alps"
    )
    file.write_bytes(b"broken")
    with pytest.raises(CalibrationError, match=r"00000\.safetensors: expected a finished layer"):
        prune(model, PruningConfig(method="alps", sparsity=0.5), tokens(), SETTINGS, directory=tmp_path, resume=True)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"method": "taylor", "sparsity": 0.5}, "method"),
        ({"method": "movement", "sparsity": 0.5}, "method"),
        ({"method": "keep"}, "method"),
        ({"method": "wanda", "sparsity": 0.5, "scope": "global"}, "scope"),
        ({"structure": "neurons", "sparsity": 0.5}, "structure"),
        ({"target_speedup": 2}, "structure"),
        ({"method": "wanda", "sparsity": 0.5, "penalty": "l1", "penalty_weight": 0.1}, "penalty"),
    ],
)
def test_a_configuration_that_is_for_training_is_refused(fields, key):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningConfigError) as caught:
        prune(model, PruningConfig(**fields), tokens(), SETTINGS)
    assert caught.value.problems[0][0] == key
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "wanda", "sparsity": 0.5, "scope": "row"},
        {"method": "magnitude", "sparsity": 0.5, "reconstruction": "least_squares"},
    ],
)
def test_what_only_calibration_can_do_is_refused_in_training(fields):
    with pytest.raises(PruningConfigError, match=r"hf_prune\.prune"):
        Pruner(llama(), PruningConfig(**fields), total_steps=10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "expected calibration data"),
        ([], "got none"),
        ("a text", "expected texts"),
        (torch.rand(3, 4), "expected token ids"),
        (["some", "texts"], "tokenizer"),
        ([1, 2], "expected texts or batches"),
    ],
)
def test_what_is_no_calibration_data_is_refused(data, message):
    with pytest.raises(CalibrationError, match=message):
        prune(llama(), PruningConfig(method="sparsegpt", sparsity=0.5), data, SETTINGS)


def test_arguments_of_the_wrong_type_are_named():
    for arguments in ((None, PruningConfig(sparsity=0.5)), (llama(), {"sparsity": 0.5})):
        with pytest.raises(ArgumentError):
            prune(*arguments, tokens())


def test_a_calibration_lists_all_its_problems():
    with pytest.raises(CalibrationConfigError) as caught:
        CalibrationConfig(samples=0, length=1.5, damping=-1, dense_weight=2)
    assert [key for key, _ in caught.value.problems] == ["samples", "length", "damping", "dense_weight"]
    with pytest.raises(CalibrationConfigError, match="set both or none"):
        CalibrationConfig(dense_weight=0)
    assert CalibrationConfig.from_dict(SETTINGS.to_dict()) == SETTINGS


# ---- Texts ----


def test_texts_become_windows_that_depend_on_the_seed():
    given, words = texts(200), tokenizer()
    models = []
    dense = llama()
    for seed in (0, 0, 1):
        models.append(copy.deepcopy(dense))
        settings = CalibrationConfig(samples=8, length=16, seed=seed)
        pruned = prune(models[-1], PruningConfig(method="sparsegpt", sparsity=0.5), given, settings, tokenizer=words)
        assert (pruned.samples, pruned.tokens) == (8, 8 * 16)
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_texts_of_another_model_are_padded():
    settings = CalibrationConfig(samples=8, length=6, batch_size=3)
    pruned = prune(bert(), PruningConfig(method="alps", sparsity=0.5), texts(20), settings, tokenizer=tokenizer())
    assert pruned.samples == 8
    assert pruned.tokens < 8 * 6 + 8


def test_too_little_text_is_said_with_the_numbers():
    settings = CalibrationConfig(samples=250, length=20)
    with pytest.raises(CalibrationError, match="expected 5,000 tokens of text for 250 windows"):
        prune(llama(), PruningConfig(method="alps", sparsity=0.5), texts(5), settings, tokenizer=tokenizer())
