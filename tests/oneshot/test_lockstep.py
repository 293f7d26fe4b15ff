"""Streams compared with plain forward passes, over models of every kind, and how they end."""

import copy
import re
import threading

import architectures
import models
import pytest
import torch
import transformers
from streamed import check, farthest, micro_batches, plain_outputs, randomly_masked, stream, tensors_in

from hf_prune.errors import ArgumentError, PruningStateError
from hf_prune.model.targets import find_targets
from hf_prune.oneshot.lockstep import Lockstep
from hf_prune.oneshot.settings import set_for_streaming

# Class -> the layers of one block whose residual stream is known, as expressions without the path to the block.
SAMPLE = {
    "LlamaForCausalLM": ["self_attn.o_proj", "mlp.down_proj"],
    "GPT2LMHeadModel": ["attn.c_proj", "mlp.c_proj"],
    "OPTForCausalLM": ["self_attn.out_proj", "fc2"],
    "GPTNeoXForCausalLM": ["attention.dense", "mlp.dense_4h_to_h"],
    "BloomForCausalLM": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "Gemma2ForCausalLM": [],  # a norm between each layer and the stream
    "GraniteForCausalLM": ["self_attn.o_proj", "mlp.down_proj"],  # times a number
    "MixtralForCausalLM": ["self_attn.o_proj"],  # experts return sums
    "GptOssForCausalLM": ["self_attn.o_proj"],
    "MambaForCausalLM": ["mixer.out_proj"],
    "BertForMaskedLM": ["attention.output.dense", "output.dense"],
    "AlbertForMaskedLM": ["attention.dense", "ffn_output"],
    "T5ForConditionalGeneration": ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"],
    "SwitchTransformersForConditionalGeneration": ["SelfAttention.o", "EncDecAttention.o"],  # experts that are modules
    "BartForConditionalGeneration": ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"],
    "WhisperForConditionalGeneration": ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"],
    "ConvNextForImageClassification": [],  # times a scale for each channel
}


@pytest.fixture(scope="module")
def by_class():
    return {one.class_name: one for one in architectures.architectures(SAMPLE)}


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread.name for thread in threading.enumerate() if "hf_prune" in thread.name]


def tokens(rows=2, length=8):
    return torch.randint(5, models.VOCABULARY, (rows, length))


def text_batches(number=3, **shape):
    return [{"input_ids": tokens(**shape)} for _ in range(number)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("class_name", SAMPLE)
def test_a_stream_is_the_changed_model_and_its_twin_the_dense_one_bit_for_bit(class_name, by_class):
    trial = architectures.find_trial(by_class[class_name])
    found = check(trial.model(), micro_batches(trial.batch))
    assert (found["pruned"], found["dense"], found["inputs"]) == (0, 0, 0)
    expected = {"MambaForCausalLM": {"conv1d", "dt_proj"}}.get(class_name, set())
    assert {name.split(".")[-2] for name in found["never"]} == expected
    assert bool(found["experts"]) == (class_name in ("MixtralForCausalLM", "GptOssForCausalLM"))
    assert bool(found["again"]) == (class_name == "AlbertForMaskedLM")
    assert {re.sub(r".*?\.\d+\.(layer\.\d+\.|albert_layers\.\d+\.)?", "", name) for name in found["residual"]} == {
        f"{name}.weight" for name in SAMPLE[class_name]
    }


@pytest.mark.filterwarnings("ignore")
def test_modules_that_a_forward_pass_replaces_are_set_back_too():
    [big_bird] = architectures.architectures({"BigBirdForMaskedLM"})
    trial = architectures.find_trial(big_bird)
    model = trial.model()
    before = {name for name, _ in model.named_modules()}
    check(model, micro_batches(trial.batch))  # which sees that all modules are in training mode afterwards
    assert {name for name, _ in model.named_modules()} - before


def read(model, batches, module, position=0):
    """What a module gets, for each micro-batch."""
    seen = []
    hook = module.register_forward_pre_hook(
        lambda module, arguments, options: seen.append([*arguments, *options.values()][position].clone()),
        with_kwargs=True,
    )
    plain_outputs(model, batches)
    hook.remove()
    return seen


def lacks_of(model, batches):
    """Name -> e of each micro-batch, and the dense model; the model is changed."""
    dense = copy.deepcopy(model)
    _, _, inputs = stream(model, batches, find_targets(model))
    return {name: [lack for _, _, lack in given] for (name, _), given in inputs.items()}, dense


def test_what_the_residual_stream_lacks_is_known_where_a_layer_writes_into_it():
    model, batches = models.llama(), text_batches()
    lacks, dense = lacks_of(model, batches)
    for index in range(2):
        ours, theirs = model.model.layers[index], dense.model.layers[index]
        for name, one, other in (
            ("self_attn.o_proj", ours.input_layernorm, theirs.input_layernorm),
            ("mlp.down_proj", ours.post_attention_layernorm, theirs.post_attention_layernorm),
        ):
            now, before = read(model, batches, one), read(dense, batches, other)
            for lack, here, there in zip(lacks[f"model.layers.{index}.{name}.weight"], now, before, strict=True):
                assert torch.equal(lack, (there - here).reshape(-1, 16))
    assert lacks["model.layers.1.mlp.down_proj.weight"][0].abs().max() > 1e-3
    assert lacks["model.layers.1.mlp.up_proj.weight"] == [None] * 3


def test_of_parallel_branches_the_second_makes_up_for_the_first_too():
    config = transformers.GPTNeoXConfig(
        vocab_size=models.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model, batches = transformers.GPTNeoXForCausalLM(config), text_batches()
    lacks, dense = lacks_of(model, batches)
    name = "gpt_neox.layers.1.{}.weight"
    layer, of_dense = model.gpt_neox.layers[1], dense.gpt_neox.layers[1]
    stream_now, stream_before = read(model, batches, layer), read(dense, batches, of_dense)
    attention_now = read(model, batches, layer.post_attention_dropout)
    attention_before = read(dense, batches, of_dense.post_attention_dropout)
    for index in range(3):
        hidden = (stream_before[index] - stream_now[index]).reshape(-1, 16)
        attention = (attention_before[index] - attention_now[index]).reshape(-1, 16)
        assert torch.equal(lacks[name.format("attention.dense")][index], hidden)
        torch.testing.assert_close(lacks[name.format("mlp.dense_4h_to_h")][index], hidden + attention)


def test_a_branch_that_is_multiplied_with_a_number_makes_up_for_as_much_more():
    sizes = {"vocab_size": models.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.GraniteConfig(
        **sizes, num_key_value_heads=2, intermediate_size=24, residual_multiplier=0.25, max_position_embeddings=32
    )
    model, batches = transformers.GraniteForCausalLM(config), text_batches()
    lacks, dense = lacks_of(model, batches)
    now = read(model, batches, model.model.layers[1].input_layernorm)
    before = read(dense, batches, dense.model.layers[1].input_layernorm)
    for lack, here, there in zip(lacks["model.layers.1.self_attn.o_proj.weight"], now, before, strict=True):
        torch.testing.assert_close(lack, (there - here).reshape(-1, 16) * 4)


def test_layers_with_the_same_input_share_it():
    model = models.llama()
    shared = [
        stop.target.name.split(".")[-2]
        for stop in Lockstep(model, text_batches(), find_targets(model))
        if stop.shares_inputs
    ]
    assert shared == ["k_proj", "v_proj", "up_proj"] * 2


def test_padding_and_positions_without_a_loss_are_left_out():
    model, ids = models.llama(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100
    kept = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 0]])
    for batch, counts in (
        ({"input_ids": ids}, torch.ones_like(ids)),
        ({"input_ids": ids, "attention_mask": mask}, mask),
        ({"input_ids": ids, "attention_mask": mask, "labels": labels}, kept * mask),
    ):
        _, _, inputs = stream(model, [batch], find_targets(model))
        seen = read(model, [batch], model.model.layers[1].mlp.down_proj)[0]
        for x, dense, lack in inputs["model.layers.1.mlp.down_proj.weight", 0]:
            assert torch.equal(x, seen[counts.bool()])
            assert len(dense) == len(lack) == counts.sum()


def test_flat_tokens_have_the_mask_of_their_samples():
    config = transformers.OPTConfig(
        vocab_size=models.VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24
    )
    model, ids = transformers.OPTForCausalLM(config), tokens()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    _, _, inputs = stream(model, [{"input_ids": ids, "attention_mask": mask}], find_targets(model))
    assert {len(x) for given in inputs.values() for x, _, _ in given} == {13}


def test_encoder_and_decoder_have_their_own_masks_also_with_as_many_tokens():
    model = models.t5()
    batch = {"input_ids": tokens(), "labels": tokens()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 5:] = 0
    batch["labels"][1, 2:] = -100
    made, _, inputs = stream(model, [batch, batch], find_targets(model))
    assert not made.never_reached
    for (name, _), given in inputs.items():
        of_encoder = name.startswith("encoder") or "EncDecAttention.k" in name or "EncDecAttention.v" in name
        assert [len(x) for x, _, _ in given] == [13 if of_encoder else 10] * 2


def test_a_shared_layer_is_met_once_and_its_further_uses_are_counted():
    model = models.albert()
    made, _, inputs = stream(model, text_batches(), find_targets(model))
    assert set(made.uses.values()) == {3}
    assert set(made.uses) == {name for name, _ in inputs} == {target.name for target in find_targets(model)}


def test_a_tied_weight_is_pruned_at_its_first_use():
    model = models.llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.gate_proj.weight = first.gate_proj.weight
    dense, batches = copy.deepcopy(model), text_batches()
    made, outputs, inputs = stream(model, batches, find_targets(model))
    assert made.uses == {"model.layers.0.mlp.gate_proj.weight": 1}
    assert ("model.layers.1.mlp.gate_proj.weight", 0) not in inputs
    assert farthest(outputs[0, False], plain_outputs(model, batches)[0]) == 0
    assert farthest(outputs[0, True], plain_outputs(dense, batches)[0]) == 0


def in_order(rows):
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_each_expert_gets_the_tokens_that_are_routed_to_it(implementation):
    model = models.mixtral()
    model.set_experts_implementation(implementation)
    ids = tokens(length=6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": tokens(length=3)}]
    made, _, inputs = stream(model, batches, find_targets(model))
    assert model.config._experts_implementation == implementation
    for index in range(2):
        experts = model.model.layers[index].mlp.experts
        hidden, routes = read(model, batches, experts), read(model, batches, experts, 1)
        for part in range(4):
            name = f"model.layers.{index}.mlp.experts.gate_up_proj"
            wanted = []
            for states, route, batch in zip(hidden, routes, batches, strict=True):
                counts = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).reshape(-1).bool()
                wanted.append(states[(route == part).any(1) & counts])
            given = [x for x, dense, lack in inputs.get((name, part), []) if dense is None and lack is None]
            assert torch.equal(in_order(torch.cat([*given, states[:0]])), in_order(torch.cat(wanted)))
            below = inputs.get((name.replace("gate_up", "down"), part), [])
            assert [len(x) for x, _, _ in below] == [len(x) for x in given]
            if (name, part) not in inputs:
                assert part in made.experts_never_reached[name]


def test_an_expert_without_tokens_is_listed_and_left():
    model = models.mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # equal scores: the first two
    made, _, _ = stream(model, text_batches(), find_targets(model))
    assert not made.never_reached
    assert len(made.experts_never_reached) == 4
    assert all(len(parts) == 2 for parts in made.experts_never_reached.values())
    for name, parts in made.experts_never_reached.items():
        assert dict(model.named_parameters())[name][parts].all()


def prune_all(made, by=2):
    for stop in made:
        stop.set(stop.weight * (1 / by))


class Odd(transformers.LlamaForCausalLM):
    """Whose second block fails for some tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].register_forward_pre_hook(self.refuse)
        self.of_thread = threading.local()

    def forward(self, input_ids=None, **others):
        self.of_thread.bad = int(input_ids[0, 0]) == 4
        return super().forward(input_ids=input_ids, **others)

    def refuse(self, module, arguments):
        if self.of_thread.bad:
            raise KeyError("no such token")


def test_an_error_in_one_forward_is_raised_and_ends_all():
    model = Odd(models.llama().config).train()
    batches = text_batches()
    made = Lockstep(model, batches, find_targets(model), dense_twin=True)
    batches[1]["input_ids"][:] = 4
    with pytest.raises(KeyError, match="no such token"):
        prune_all(made)
    check_that_all_is_as_before(model)


def check_that_all_is_as_before(model):
    assert all(module.training for module in model.modules())
    assert model.config.use_cache
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    assert sum(len(one) + len(other) for one, other in hooks) <= 1  # that of Odd
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("way", ["break", "raise", "close", "never begun"])
def test_a_caller_that_stops_ends_all(way):
    model = models.llama().train()
    made = Lockstep(model, text_batches(), find_targets(model), dense_twin=True)
    running = iter(made)
    if way == "break":
        del running
        for number, _ in enumerate(made):
            if number == 3:
                break
    elif way == "raise":
        del running
        with pytest.raises(ZeroDivisionError):
            prune_all(made, by=0)
    elif way == "close":
        next(running)
        assert not model.training
        running.close()
    check_that_all_is_as_before(model)


def test_what_cannot_be_done_with_a_stream_is_said():
    model = models.llama()
    with pytest.raises(ArgumentError, match="at least one micro-batch"):
        Lockstep(model, [], find_targets(model))
    made = Lockstep(model, text_batches(), find_targets(model))
    stops = []
    for stop in made:
        with pytest.raises(ArgumentError, match=r"expected a weight of \(\d+, 16\), got \(2, 2\)"):
            stop.set(torch.zeros(2, 2))
        stops.append(stop)
        if len(stops) == 2:
            break
    with pytest.raises(PruningStateError, match=r"q_proj.weight: expected its inputs to be read"):
        stops[0].inputs()
    with pytest.raises(PruningStateError, match="expected a new stream"):
        next(iter(made))


def test_the_threads_have_what_the_caller_has():
    """No gradients, the thread count, autocast; and a weight that was cast before is not used after it is replaced."""
    model, batches, seen = models.llama(), text_batches(), set()
    model.model.layers[0].mlp.act_fn.register_forward_hook(
        lambda *_: seen.add((torch.is_grad_enabled(), torch.get_num_threads(), torch.is_autocast_enabled("cpu")))
    )
    threads = torch.get_num_threads()
    _, outputs, _ = stream(model, batches, find_targets(model), autocast=torch.bfloat16)
    assert seen == {(False, threads, True)}
    with torch.autocast("cpu", torch.bfloat16):
        changed = plain_outputs(model, batches)
    assert all(farthest(outputs[index, False], changed[index]) == 0 for index in range(3))


def test_a_model_that_a_trainer_has_run_in_bfloat16_is_streamed_in_the_precision_of_its_weights(tmp_path):
    model, batches = models.llama(), text_batches()
    before = plain_outputs(model, batches)
    arguments = transformers.TrainingArguments(tmp_path, bf16=True, use_cpu=True, report_to="none")
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    transformers.Trainer(model, arguments, eval_dataset=rows).evaluate()
    _, outputs, _ = stream(model, batches, find_targets(model))
    assert all(farthest(outputs[index, True], before[index]) == 0 for index in range(3))
    with torch.no_grad():
        assert farthest(tensors_in(model(**batches[0])), plain_outputs(model, batches)[0]) > 0  # as the Trainer left it


def test_autocast_in_a_model_of_its_own_keeps_no_weights_from_before():
    """Its cache of weights lasts while any pass is paused in it."""
    model, batches = models.llama(), text_batches()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    _, outputs, _ = stream(model, batches, find_targets(model))
    changed = plain_outputs(model, batches)
    assert all(farthest(outputs[index, False], changed[index]) == 0 for index in range(3))


def test_the_model_can_be_run_between_two_stops():
    model, batches = models.llama(), text_batches()
    for stop in Lockstep(model, batches, find_targets(model)):
        before = plain_outputs(model, batches)
        stop.set(randomly_masked(stop))
    assert farthest(before[0], plain_outputs(model, batches)[0]) > 0


def test_weights_that_are_set_again_in_place_of_being_solved_give_the_same_model():
    """As after an interruption: what was finished is set, and the rest is solved."""
    model, batches = models.llama(), text_batches()
    again, saved = copy.deepcopy(model), {}

    def solve(stop):
        x = torch.cat([x for x, _, _ in stop.inputs()])
        return stop.weight * (stop.weight.abs() * x.norm(dim=0) > 0.03)

    for stop in Lockstep(model, batches, find_targets(model)):
        saved[stop.target.name] = solve(stop)
        stop.set(saved[stop.target.name])
    for number, stop in enumerate(Lockstep(again, batches, find_targets(again))):
        stop.set(saved[stop.target.name] if number < 9 else solve(stop))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_forward_passes_end_after_the_last_layer_where_their_outputs_are_not_wanted():
    model, heads = models.llama(), []
    model.lm_head.register_forward_hook(lambda *_: heads.append(threading.current_thread().name))
    made = Lockstep(model, text_batches(), find_targets(model), dense_twin=True)
    assert len(list(made)) == 14
    assert heads == ["MainThread"]  # that of the discovery


def test_what_is_no_layer_is_never_reached():
    model = models.llama()
    targets = find_targets(model, targets=[r".*embed_tokens.weight", r".*layers\.0\.mlp.up_proj.weight"])
    made = Lockstep(model, text_batches(), targets)
    assert [stop.target.name for stop in made] == ["model.layers.0.mlp.up_proj.weight"]
    assert made.never_reached == ["model.embed_tokens.weight"]


def test_settings_are_set_back():
    model = models.mixtral().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    implementation = model.config._experts_implementation
    with set_for_streaming(model):
        assert not any(module.training for module in model.modules())
        assert (model.config.use_cache, model.config._experts_implementation) == (False, "eager")
    assert [module.training for module in model.modules()] == before
    assert (model.config.use_cache, model.config._experts_implementation) == (True, implementation)
