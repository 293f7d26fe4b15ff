"""Adapters of PEFT over what is pruned: sparse bases, merging that keeps zeros, sparse adapters."""

import copy

import peft
import pytest
import torch
from models import ARCHITECTURES, gpt2, llama, training_arguments
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_prune
from hf_prune import MergeError, Pruner, PruningCallback, PruningConfig, PruningConfigError, PruningTrainer, TargetError
from hf_prune.model.names import named_parameters

SCHEDULE = {"schedule": "linear", "begin": 2, "end": 8, "frequency": 2}
MODULES = ["q_proj", "v_proj", "down_proj"]

# What adds to the weight and can be masked, and what only scales it.
MERGEABLE = {
    "LoRA": LoraConfig(r=2, target_modules=MODULES),
    "LoRA with dropout": LoraConfig(r=2, target_modules=MODULES, lora_dropout=0.3, use_rslora=True),
    "DoRA": LoraConfig(r=2, target_modules=MODULES, use_dora=True),
    "DoRA with dropout": LoraConfig(r=2, target_modules=MODULES, use_dora=True, lora_dropout=0.3),
    "LoHa": peft.LoHaConfig(r=2, target_modules=MODULES),
    "LoKr": peft.LoKrConfig(r=2, target_modules=MODULES),
    "VeRA": peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "HiRA": peft.HiraConfig(r=2, target_modules=MODULES),
    "LN tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}

# What changes the weight in another way: some of it fills zeros, and none can be masked from outside.
OTHERS = {
    "AdaLoRA": peft.AdaLoraConfig(target_modules=MODULES, total_step=10),
    "OFT": peft.OFTConfig(target_modules=MODULES, oft_block_size=4),
    "HRA": peft.HRAConfig(r=2, target_modules=MODULES),
    "MiSS": peft.MissConfig(r=2, target_modules=MODULES),
    "FourierFT": peft.FourierFTConfig(n_frequency=10, target_modules=MODULES),
}


def config(adapters, **changes):
    return PruningConfig(**{"sparsity": 0.5, "adapters": adapters} | SCHEDULE | changes)


def dense():
    torch.manual_seed(0)
    return llama()


def adapted(peft_config, model=None):
    """A model with adapters that do something from the beginning."""
    model = get_peft_model(model if model is not None else dense(), copy.deepcopy(peft_config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def trainer_of(directory, model, pruning_config, **arguments):
    return PruningTrainer(
        model=model,
        args=training_arguments(directory, label_names=["labels"], **arguments),
        train_dataset=ARCHITECTURES["llama"].examples(40),
        pruning_config=pruning_config,
    )


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ARCHITECTURES["llama"].batch()["input_ids"]).logits


def zeros_of(model, names):
    parameters = dict(named_parameters(model))
    return {name: int((parameters[name] == 0).sum()) for name in names}


# ---- Sparse base ----


def test_a_base_is_pruned_under_adapters_that_train_and_rebuilt_from_the_original_on_resuming(tmp_path):
    whole = trainer_of(
        tmp_path / "whole", adapted(MERGEABLE["LoRA"]), config(None), save_strategy="steps", save_steps=5
    )
    whole.train()
    assert whole.pruner.sparsity == whole.pruner.target_sparsity == 0.5
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "pruning_masks.safetensors", "pruning_config.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names

    resumed = trainer_of(tmp_path / "resumed", adapted(MERGEABLE["LoRA"]), config(None))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = whole.model.state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in resumed.model.state_dict().items())


def test_a_sparse_base_and_its_adapter_apart_give_what_the_trained_model_gives(tmp_path):
    trainer = trainer_of(tmp_path / "run", adapted(MERGEABLE["LoRA"]), config("sparse_base"))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    expected = logits_of(trainer.model)

    opened = PeftModel.from_pretrained(dense(), tmp_path / "adapter")
    assert not torch.allclose(logits_of(opened), expected), "the base is not sparse yet"
    hf_prune.load_masks(opened, tmp_path / "adapter")
    assert torch.equal(logits_of(opened), expected)

    trainer.model.unload().save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert zeros_of(plain, trainer.pruner.masked) == trainer.pruner.masked
    assert torch.equal(logits_of(PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected)


def test_merging_into_a_sparse_base_is_refused_before_anything_is_changed(tmp_path):
    trainer = trainer_of(tmp_path, adapted(MERGEABLE["LoRA"]), config("sparse_base"))
    trainer.train()
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(MergeError, match=r"self_attn\.q_proj\.weight: merging would fill 128 zeros.*sparse_merge"):
        hf_prune.merge(trainer.model)
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())


def test_a_directory_without_masks_is_told(tmp_path):
    with pytest.raises(hf_prune.PruningStateError, match="has no masks; give a directory where"):
        hf_prune.load_masks(dense(), tmp_path)


# ---- Sparse merge ----


@pytest.mark.filterwarnings("ignore:Unsupported layer type.*LlamaRMSNorm")  # LN tuning's, of norms that it knows not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MERGEABLE)
def test_what_is_trained_is_what_is_merged_and_every_zero_stays(tmp_path, kind, dtype):
    model = adapted(MERGEABLE[kind], dense().to(dtype))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(tmp_path / "run", model, config("sparse_merge"))
    trainer.train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in trained)
    with model.disable_adapter():
        without = logits_of(model)
    expected = logits_of(model)
    assert not torch.equal(without, expected)

    merged = hf_prune.merge(trainer.model)
    assert not isinstance(merged, PeftModel)
    assert list(merged.state_dict()) == list(dense().state_dict())
    masked = trainer.pruner.masked
    assert sum(masked.values()) == 0.5 * sum(target.weights for target in trainer.pruner.targets)
    assert zeros_of(merged, masked) == masked
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert torch.allclose(logits_of(merged), expected, atol=tolerance, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(weight, opened.state_dict()[name]) for name, weight in merged.state_dict().items())


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "VeRA"])
def test_weights_are_ranked_as_they_would_be_merged(kind):
    model = adapted(MERGEABLE[kind])
    plain = copy.deepcopy(model).merge_and_unload()
    settings = {"schedule": "one_shot", "begin": 0, "end": None, "scope": "global"}
    expected = Pruner(plain, config(None, **settings), total_steps=1).masks
    found = Pruner(model, config("sparse_merge", **settings), total_steps=1).masks
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_resumed_training_that_merges_ends_with_the_same_weights(tmp_path, kind):
    arguments = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer_of(tmp_path / "whole", adapted(MERGEABLE[kind]), config("sparse_merge"), **arguments)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", adapted(MERGEABLE[kind]), config("sparse_merge"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    merged, expected = hf_prune.merge(resumed.model), hf_prune.merge(whole.model)
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in merged.state_dict().items())


def test_an_adapter_that_was_saved_is_merged_into_the_original_model(tmp_path):
    trainer = trainer_of(tmp_path / "run", adapted(MERGEABLE["DoRA"]), config("sparse_merge"))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    opened = PeftModel.from_pretrained(dense(), tmp_path / "adapter")
    hf_prune.load_masks(opened, tmp_path / "adapter")
    merged, expected = hf_prune.merge(opened), hf_prune.merge(trainer.model)
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in merged.state_dict().items())


def test_an_output_of_dora_without_weights_stays_zero():
    model = adapted(MERGEABLE["DoRA"])
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")[3] = 0
    Pruner(model, config("sparse_merge"), total_steps=10)
    expected = logits_of(model)
    assert expected.isfinite().all()
    merged = hf_prune.merge(model)
    assert not merged.model.layers[0].self_attn.q_proj.weight[3].any()
    assert torch.allclose(logits_of(merged), expected, atol=1e-6)


def test_conv1d_layers_are_merged_too():
    model = adapted(LoraConfig(r=2, target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True), gpt2())
    pruner = Pruner(model, config("sparse_merge", schedule="one_shot", begin=0, end=None), total_steps=1)
    expected = logits_of(model)
    merged = hf_prune.merge(model)
    assert zeros_of(merged, pruner.masked) == pruner.masked
    assert torch.allclose(logits_of(merged), expected, atol=1e-6)


def test_the_callback_merges_as_the_trainer_does(tmp_path):
    from transformers import Trainer

    ours = trainer_of(tmp_path / "ours", adapted(MERGEABLE["LoRA"]), config("sparse_merge"))
    stock = Trainer(
        model=adapted(MERGEABLE["LoRA"]),
        args=training_arguments(tmp_path / "stock", label_names=["labels"]),
        train_dataset=ARCHITECTURES["llama"].examples(40),
        callbacks=[PruningCallback(config("sparse_merge"))],
    )
    ours.train()
    stock.train()
    merged, expected = hf_prune.merge(stock.model), hf_prune.merge(ours.model)
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in merged.state_dict().items())


@pytest.mark.parametrize("kind", OTHERS)
def test_what_cannot_be_masked_is_refused_with_what_to_use_and_can_be_kept_apart(tmp_path, kind):
    model = get_peft_model(dense(), OTHERS[kind])
    classes = [type(module) for module in model.modules()]
    with pytest.raises(TargetError, match=r"'sparse_merge' is not supported for .*; use LoRA, DoRA"):
        trainer_of(tmp_path, model, config("sparse_merge"))
    assert [type(module) for module in model.modules()] == classes
    trainer = trainer_of(tmp_path, model, config("sparse_base"))
    trainer.train()
    assert zeros_of(model, trainer.pruner.masked) == trainer.pruner.masked


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"lora_bias": True}, "lora_bias"), ({"target_modules": ["embed_tokens"]}, "Embedding")],
)
def test_layers_of_lora_that_cannot_be_masked_are_refused(changes, why):
    model = get_peft_model(llama(attention_bias=True), LoraConfig(r=2, **{"target_modules": ["q_proj"]} | changes))
    with pytest.raises(TargetError, match=f"'sparse_merge' is not supported for .*{why}"):
        Pruner(model, config("sparse_merge", targets=[r".*q_proj\.weight", r".*embed_tokens\.weight"]))


def test_merging_what_is_no_model_of_peft_is_refused():
    with pytest.raises(MergeError, match=r"expected a model with PEFT adapters that change .* got LlamaForCausalLM"):
        hf_prune.merge(dense())
    prompt = get_peft_model(dense(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(MergeError, match="adapters of other kinds cannot be merged"):
        hf_prune.merge(prompt)


def test_merging_a_saved_adapter_whose_base_was_not_made_sparse_is_refused(tmp_path):
    trainer = trainer_of(tmp_path / "run", adapted(MERGEABLE["LoRA"]), config("sparse_merge"))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    opened = PeftModel.from_pretrained(dense(), tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"have no zeros; make them sparse again with hf_prune.load_masks"):
        hf_prune.merge(opened)


@pytest.mark.filterwarnings("ignore:Model:UserWarning")
def test_merging_into_a_weight_that_another_module_has_is_refused():
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    Pruner(model, config("sparse_merge", schedule="one_shot", begin=0), total_steps=10)
    with pytest.raises(MergeError, match=r"lm_head: the weight under the adapter is shared"):
        hf_prune.merge(model)


@pytest.mark.parametrize(("saved", "configured"), [(None, "sparse_base"), ("sparse_base", None)])
def test_the_default_way_is_the_same_by_its_name(tmp_path, saved, configured):
    first = trainer_of(tmp_path, adapted(MERGEABLE["LoRA"]), config(saved), save_strategy="steps", save_steps=5)
    first.train()
    again = trainer_of(tmp_path / "again", adapted(MERGEABLE["LoRA"]), config(configured))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.pruner.masked == first.pruner.masked


def test_an_adapter_for_each_sample_is_refused():
    model = adapted(MERGEABLE["LoRA"])
    Pruner(model, config("sparse_merge"))
    model.eval()
    with pytest.raises(TargetError, match="adapter_names: must not be set with 'sparse_merge'"):
        model(input_ids=ARCHITECTURES["llama"].batch()["input_ids"], adapter_names=["default"] * 4)


# ---- Sparse adapters ----


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa"])
def test_the_adapters_own_matrices_are_pruned(tmp_path, kind):
    trainer = trainer_of(tmp_path / "run", adapted(MERGEABLE[kind]), config("sparse_adapters"))
    trainer.train()
    weights = sum(target.weights for target in trainer.pruner.targets)
    trained = [p for p in trainer.model.parameters() if p.requires_grad and p.dim() >= 2]
    assert weights == sum(parameter.numel() for parameter in trained)
    assert trainer.pruner.sparsity == pytest.approx(0.5, abs=0.01)
    trainer.save_model(str(tmp_path / "adapter"))
    opened = PeftModel.from_pretrained(dense(), tmp_path / "adapter")
    hf_prune.load_masks(opened, tmp_path / "adapter")  # which has nothing to do
    assert zeros_of(opened, trainer.pruner.masked) == trainer.pruner.masked
    assert torch.equal(logits_of(opened), logits_of(trainer.model))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa"])
def test_adapters_that_begin_with_zeros_learn_and_become_as_sparse_as_was_asked(tmp_path, kind):
    model = get_peft_model(dense(), copy.deepcopy(MERGEABLE[kind]))
    begin = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(not weight.any() for weight in begin.values())
    trainer = trainer_of(tmp_path / "run", model, config("sparse_adapters"), save_strategy="steps", save_steps=5)
    assert trainer.pruner.sparsity == 0
    trainer.train()
    assert trainer.pruner.sparsity == pytest.approx(0.5, abs=0.01)
    for name, weight in model.named_parameters():
        if name in begin:
            assert weight.any(), name
            assert not torch.equal(weight, begin[name]), name
    resumed = trainer_of(
        tmp_path / "resumed", get_peft_model(dense(), copy.deepcopy(MERGEABLE[kind])), config("sparse_adapters")
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert resumed.pruner.masked == trainer.pruner.masked


# ---- How it is asked for ----


def test_a_configuration_of_peft_puts_the_adapters_on(tmp_path):
    torch.manual_seed(3)
    given = PruningTrainer(
        model=dense(),
        args=training_arguments(tmp_path / "given"),
        train_dataset=ARCHITECTURES["llama"].examples(40),
        pruning_config=config("sparse_merge"),
        peft_config=MERGEABLE["LoRA"],
    )
    assert isinstance(given.model, PeftModel)
    given.train()
    torch.manual_seed(3)
    wrapped = trainer_of(tmp_path / "wrapped", get_peft_model(dense(), MERGEABLE["LoRA"]), config("sparse_merge"))
    wrapped.train()
    assert zeros_of(given.model, given.pruner.masked) == given.pruner.masked
    assert all(torch.equal(mask, wrapped.pruner.masks[name]) for name, mask in given.pruner.masks.items())


def test_a_configuration_of_peft_without_a_model_of_transformers_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"peft_config: expected a model of transformers .*, got NoneType"):
        PruningTrainer(model_init=dense, args=training_arguments(tmp_path), peft_config=MERGEABLE["LoRA"])
    with pytest.raises(TypeError, match=r"peft_config: expected a PEFT configuration .*, got \{'r': 4\}"):
        PruningTrainer(model=dense(), args=training_arguments(tmp_path), peft_config={"r": 4})


@pytest.mark.parametrize("way", ["sparse_base", "sparse_merge", "sparse_adapters"])
def test_a_way_to_treat_adapters_needs_adapters(way):
    with pytest.raises(TargetError, match=f"adapters: '{way}' requires a model with PEFT adapters, got one without"):
        Pruner(dense(), config(way))


def test_a_criterion_that_reads_gradients_is_refused_for_a_frozen_base():
    with pytest.raises(PruningConfigError, match="method: methods that read gradients cannot be used for weights"):
        Pruner(adapted(MERGEABLE["LoRA"]), config("sparse_base", method="taylor"))


def test_quantised_weights_are_refused():
    model = dense()
    model.is_quantized = True
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TargetError, match="expected floating-point weights, got quantised ones"):
        Pruner(model, PruningConfig(sparsity=0.5))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.filterwarnings("ignore:.*_check_is_size will be removed")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_bases_of_bitsandbytes_are_refused_and_adapters_over_them_are_pruned(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    dense().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(**{bits: True})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}
    )
    with pytest.raises(TargetError, match="expected floating-point weights, got quantised ones"):
        Pruner(model, PruningConfig(sparsity=0.5))
    with pytest.raises(TargetError, match="expected floating-point weights, got quantised ones"):
        Pruner(model, PruningConfig(sparsity=0.5, targets=[r".*q_proj\.weight"]))
    model = get_peft_model(model, copy.deepcopy(MERGEABLE["LoRA"]))
    with pytest.raises(TargetError, match="expected floating-point weights, got quantised ones"):
        Pruner(model, config("sparse_merge"))
    trainer = trainer_of(tmp_path / "out", model, config("sparse_adapters"))
    trainer.train()
    assert zeros_of(model, trainer.pruner.masked) == trainer.pruner.masked
    assert sum(trainer.pruner.masked.values()) > 0
