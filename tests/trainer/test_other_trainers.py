"""Other Trainers, and loops of one's own: exact sparsity, exact resuming, models that open, and cards."""

import copy
import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from huggingface_hub import ModelCard
from models import ARCHITECTURES, training_arguments
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense
from text_models import save_text_models, texts, tokenizer
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import hf_prune
from hf_prune import Pruner, PruningCallback, PruningConfig, PruningMixin, TeacherError
from hf_prune.model.names import named_parameters
from hf_prune.publish.push_plan import UNKNOWN, make_push_plan
from hf_prune.publish.record import load_record
from hf_prune.saved.masks import MASKS_NAME
from hf_prune.saved.report import make_report

trl = pytest.importorskip("trl")

# What TRL 1.16 calls of transformers 5.23 while activations are checkpointed, as is its default.
pytestmark = pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing_\w+` is deprecated:FutureWarning")

CONFIG = PruningConfig(sparsity=0.7, schedule="linear", begin=2, end=8, frequency=2)
SAVING = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_text_models(folder)
    return folder


# ---- The trainers ----


def columns(*names):
    """A data set of random texts to train on, and one to evaluate on."""
    return tuple(Dataset.from_dict({name: texts(count, seed=f"{name} {count}") for name in names}) for count in (40, 8))


def seq2seq_arguments(material, directory, **changes):
    train, test = (
        data.map(lambda row: tokenizer()(row["text"], text_target=row["target"]), remove_columns=["text", "target"])
        for data in columns("text", "target")
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(material / "seq2seq")
    arguments = {"predict_with_generate": True, "generation_max_length": 6} | SAVING | changes
    return {
        "model": model,
        "args": training_arguments(directory, Seq2SeqTrainingArguments, **arguments),
        "train_dataset": train,
        "eval_dataset": test,
        "data_collator": DataCollatorForSeq2Seq(tokenizer(), model=model),
        "compute_metrics": lambda prediction: {"generated": int((prediction.predictions > 0).sum())},
    }


def causal_arguments(material, directory, arguments_class, *names, **changes):
    train, test = columns(*names)
    changes = {"max_length": 24, "bf16": False, "activation_checkpointing": True} | SAVING | changes
    return {
        "model": AutoModelForCausalLM.from_pretrained(material / "causal"),
        "args": training_arguments(directory, arguments_class, **changes),
        "train_dataset": train,
        "eval_dataset": test,
        "processing_class": tokenizer(),
    }


def sft_arguments(material, directory, **changes):
    return causal_arguments(material, directory, trl.SFTConfig, "text", **changes)


def dpo_arguments(material, directory, **changes):
    return causal_arguments(material, directory, trl.DPOConfig, "prompt", "chosen", "rejected", **changes)


def sentences_arguments(material, directory, **changes):
    train, test = columns("anchor", "positive")
    set_seed(0)
    model = SentenceTransformer(str(material / "sentences"), device="cpu")
    model.append(Dense(16, 8))  # whose weights are saved in a folder of their own
    return {
        "model": model,
        "args": training_arguments(directory, SentenceTransformerTrainingArguments, **SAVING | changes),
        "train_dataset": train,
        "eval_dataset": test,
        "loss": MultipleNegativesRankingLoss(model),
    }


@dataclass(frozen=True)
class Kind:
    """A Trainer class, what it is made with, how saved models are opened, and the tags that it gives them."""

    trainer: type
    arguments: Callable
    opened_by: Callable
    targets: int
    tags: frozenset[str] = frozenset()
    adapters: str | None = None

    def pruned(self, way, material, directory, config=None, **changes):
        """A trainer that prunes, as a class with the mixin or with a callback; and what has its pruner.

        `config` changes the pruning configuration, `changes` are arguments of the trainer or its training arguments.
        """
        set_seed(0)
        config = replace(CONFIG, adapters=self.adapters, **config or {})
        of_trainer = inspect.signature(self.trainer).parameters
        more = {name: changes.pop(name) for name in list(changes) if name in of_trainer}
        made = self.arguments(material, directory, **changes)
        if self.adapters is not None:
            made["peft_config"] = LORA
        if way == "mixin":
            extended = type(f"Pruning{self.trainer.__name__}", (PruningMixin, self.trainer), {})
            trainer = extended(**made | more, pruning_config=config)
            return trainer, trainer
        callback = PruningCallback(config)
        return self.trainer(**made | more, callbacks=[callback]), callback


OPEN = AutoModelForCausalLM.from_pretrained
SFT, DPO = frozenset({"trl", "sft"}), frozenset({"trl", "dpo"})
KINDS = {
    "seq2seq": Kind(Seq2SeqTrainer, seq2seq_arguments, AutoModelForSeq2SeqLM.from_pretrained, 32),
    "sft": Kind(trl.SFTTrainer, sft_arguments, OPEN, 14, SFT),
    "sft with LoRA": Kind(trl.SFTTrainer, sft_arguments, OPEN, 14, SFT, adapters="sparse_merge"),
    "dpo": Kind(trl.DPOTrainer, dpo_arguments, OPEN, 14, DPO),
    "dpo with LoRA": Kind(trl.DPOTrainer, dpo_arguments, OPEN, 14, DPO, adapters="sparse_base"),
    "sentences": Kind(
        SentenceTransformerTrainer,
        sentences_arguments,
        partial(SentenceTransformer, device="cpu"),
        12,
        frozenset({"sentence-transformers"}),
    ),
}

RUNS = [(name, way) for name in KINDS for way in ("mixin", "callback")]


def only(choose):
    """Run a test with those of the runs that are chosen by name and way."""
    chosen = [(name, way) for name, way in RUNS if choose(name, way)]
    return pytest.mark.parametrize("run", chosen, indirect=True, ids=" by ".join)


@pytest.fixture(scope="module", params=RUNS, ids=" by ".join)
def run(request, material, tmp_path_factory):
    """A finished training with a checkpoint in its middle, and its saved model."""
    name, way = request.param
    kind, folder = KINDS[name], tmp_path_factory.mktemp("run")
    trainer, has_pruner = kind.pruned(way, material, folder)
    before = weights_of(trainer)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    pruner, weights = has_pruner.pruner, weights_of(trainer)
    return SimpleNamespace(
        way=way, kind=kind, folder=folder, trainer=trainer, pruner=pruner, before=before, weights=weights
    )


def weights_of(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def assert_same(first, second):
    assert list(first) == list(second)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def zeros_of(model, names):
    parameters = dict(named_parameters(model))
    return {name: int((parameters[name] == 0).sum()) for name in names}


def assert_exact(pruner, targets):
    """As many weights of each tensor are masked as the configuration asks for, and are zero."""
    assert len(pruner.targets) == targets
    assert pruner.masked == {target.name: round(Fraction("0.7") * target.weights) for target in pruner.targets}
    for name, parameter in pruner.parameters.items():
        assert int((~pruner.masks[name]).sum()) == pruner.masked[name]
        assert torch.count_nonzero(parameter[~pruner.masks[name]]) == 0, name


def read_card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def card_of(trainer, folder, **arguments):
    """The card that a trainer makes in another folder than the one that it trained in."""
    trainer.args.output_dir = str(folder)
    trainer.create_model_card(**arguments)
    return read_card(folder)


def test_sparsity_is_exact_and_masked_weights_are_zero(run):
    assert_exact(run.pruner, run.kind.targets)
    changed = [name for name, weight in run.before.items() if not torch.equal(weight, run.weights[name])]
    assert len(changed) > run.kind.targets
    steps = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert [entry["sparsity"] for entry in steps[7:]] == [pytest.approx(run.pruner.sparsity)] * 3
    assert steps[2]["sparsity"] == 0 < steps[5]["sparsity"] < run.pruner.sparsity


def test_a_run_that_is_resumed_ends_with_the_same_weights_and_masks(run, material, tmp_path):
    shutil.copytree(run.folder / "checkpoint-5", tmp_path / "checkpoint-5")
    trainer, has_pruner = run.kind.pruned(run.way, material, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 10
    assert_same(run.weights, weights_of(trainer))
    assert_same(run.pruner.masks, has_pruner.pruner.masks)


@only(lambda name, way: "LoRA" not in name)
def test_the_saved_model_opens_with_the_same_zeros(run):
    opened = run.kind.opened_by(str(run.folder / "model"))
    assert zeros_of(opened, run.pruner.masked) == run.pruner.masked
    assert_same(run.weights, opened.state_dict())


@only(lambda name, way: "LoRA" in name)
def test_saved_adapters_open_over_the_original_model_made_sparse_with_their_masks(run, material, tmp_path):
    assert not (run.folder / "model" / "model.safetensors").exists()
    opened = PeftModel.from_pretrained(run.kind.opened_by(material / "causal"), run.folder / "model")
    hf_prune.load_masks(opened, run.folder / "checkpoint-10")  # the mixin has put masks into `model`, too
    assert (run.folder / "model" / MASKS_NAME).exists() == (run.way == "mixin")
    assert zeros_of(opened, run.pruner.masked) == run.pruner.masked
    assert_same(run.weights, opened.state_dict())
    plain = hf_prune.merge(opened) if run.kind.adapters == "sparse_merge" else opened.unload()
    plain.save_pretrained(tmp_path)
    again = run.kind.opened_by(tmp_path)
    assert zeros_of(again, run.pruner.masked) == run.pruner.masked


# ---- Cards ----


@only(lambda name, way: "LoRA" not in name and way == "mixin")
def test_the_card_says_what_was_counted_and_measured(run, tmp_path):
    metrics = run.trainer.evaluate()
    card, record = card_of(run.trainer, tmp_path, model_name="Tiny"), load_record(tmp_path)
    masked, weights = sum(run.pruner.masked.values()), sum(target.weights for target in run.pruner.targets)
    assert f"| prunable tensors | {weights:,} | {masked:,} | {masked / weights:.2%} |" in card
    saved = load_file(tmp_path / "model.safetensors").values()
    zeros = sum(int((tensor == 0).sum()) for tensor in saved)
    assert f"| all tensors | {sum(tensor.numel() for tensor in saved):,} | {zeros:,} |" in card
    assert (record.name, record.steps, record.train_samples, record.evaluation.samples) == ("Tiny", 10, 40, 8)
    assert record.evaluation.metrics["loss"] == metrics["eval_loss"]
    assert f"| `loss` | {metrics['eval_loss']:.4f} |" in card
    assert run.kind.tags <= set(ModelCard(card).data.tags)


def with_teacher(name, material, directory):
    """A trainer with the mixin that learns from the model it begins with."""
    kind = KINDS[name]
    made = kind.arguments(material, directory, save_strategy="no")
    extended = type(f"Pruning{kind.trainer.__name__}", (PruningMixin, kind.trainer), {})
    return extended(**made, pruning_config=CONFIG, teacher_model=copy.deepcopy(made["model"]))


def test_summaries_are_distilled(material, tmp_path):
    trainer = with_teacher("seq2seq", material, tmp_path)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx((entry["task_loss"] + entry["distillation_loss"]) / 2, rel=1e-3)
    assert "distillation_loss" not in trainer.evaluate()


@pytest.mark.filterwarnings("ignore:.return_outputs=True.:FutureWarning")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sft", "expected a trainer that computes its loss from the logits"),
        ("dpo", "distillation needs inputs with labels"),
        ("sentences", "distillation needs inputs with labels"),
    ],
)
def test_trainers_that_keep_no_logits_are_refused_a_teacher(material, tmp_path, name, message):
    with pytest.raises(TeacherError, match=message):
        with_teacher(name, material, tmp_path).train()


@only(lambda name, way: "LoRA" not in name and way == "mixin")
def test_a_person_can_say_of_the_model_what_any_trainer_takes(run, tmp_path):
    card = card_of(run.trainer, tmp_path, license="mit", tags=["films"], language="en")
    assert (ModelCard(card).data.license, ModelCard(card).data.language) == ("mit", ["en"])
    assert {"films", "pruned"} <= set(ModelCard(card).data.tags)
    positional = list(inspect.signature(run.kind.trainer.create_model_card).parameters)[1:3]
    run.trainer.create_model_card("en", "apache-2.0")
    assert load_record(tmp_path).chosen.get("license") == ("apache-2.0" if "license" in positional else "mit")


@only(lambda name, way: "LoRA" in name and way == "mixin")
def test_the_card_of_adapters_is_the_extended_classes_own(run, tmp_path):
    card = card_of(run.trainer, tmp_path, model_name="Tiny")
    assert "hf-prune: begin" not in card
    assert "Tiny" in card
    assert not (tmp_path / "run_record.json").exists()


@only(lambda name, way: "LoRA" not in name and way == "mixin")
def test_the_saving_of_a_checkpoint_makes_no_card_and_no_second_copy_of_the_model(run):
    assert {"checkpoint-5", "checkpoint-10", "model"} == {path.name for path in run.folder.iterdir()}


@only(lambda name, way: "LoRA" not in name and way == "mixin")
def test_a_card_leaves_what_the_trainer_measures_alone(run, tmp_path):
    run.trainer.evaluate()  # what was noted before goes into this one
    first = run.trainer.evaluate()
    card_of(run.trainer, tmp_path)
    second = run.trainer.evaluate()
    timings = ("_runtime", "_per_second")
    assert {name for name in first if not name.endswith(timings) and first[name] != second[name]} == set()


# ---- Seq2Seq ----


@only(lambda name, way: name == "seq2seq" and way == "mixin")
def test_what_was_generated_counts_in_the_card(run, tmp_path):
    metrics = run.trainer.evaluate()
    with torch.no_grad():
        (batch,) = run.trainer.get_eval_dataloader()
        tokens = run.trainer.model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=6)
    assert metrics["eval_generated"] == int((tokens > 0).sum()) > 0
    card_of(run.trainer, tmp_path)
    assert load_record(tmp_path).evaluation.metrics["generated"] == metrics["eval_generated"]


# ---- DPO: the model that is compared with is not pruned ----


@pytest.mark.parametrize("way", ["mixin", "callback"])
@pytest.mark.parametrize("kind", ["dpo", "dpo with LoRA"])
def test_a_reference_model_stays_dense(material, tmp_path, kind, way):
    given = AutoModelForCausalLM.from_pretrained(material / "causal") if "LoRA" in kind else None
    trainer, has_pruner = KINDS[kind].pruned(way, material, tmp_path, save_strategy="no", ref_model=given)
    original = weights_of(SimpleNamespace(model=trainer.ref_model))
    trainer.train()
    assert_same(original, AutoModelForCausalLM.from_pretrained(material / "causal").state_dict())
    assert_same(original, trainer.ref_model.state_dict())
    assert_exact(has_pruner.pruner, 14)


def logps_of_the_reference(trainer):
    (batch,) = trainer.get_eval_dataloader()
    return torch.stack(trainer.compute_ref_log_probs(trainer.model, batch))


def test_with_adapters_the_reference_is_the_sparse_base_unless_it_was_computed_before(material, tmp_path):
    trainer, _ = KINDS["dpo with LoRA"].pruned("mixin", material, tmp_path / "a", save_strategy="no")
    assert trainer.ref_model is None
    dense = logps_of_the_reference(trainer)
    trainer.train()
    sparse = logps_of_the_reference(trainer)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    with trainer.model.disable_adapter():
        assert zeros_of(trainer.model, trainer.pruner.masked) == trainer.pruner.masked

    before, _ = KINDS["dpo with LoRA"].pruned(
        "mixin", material, tmp_path / "b", save_strategy="no", precompute_ref_log_probs=True
    )
    before.train()
    found = [before.eval_dataset[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
    assert torch.allclose(torch.tensor(found), dense, atol=1e-4)


def test_the_adapter_that_is_compared_with_is_not_pruned(material, tmp_path):
    model = get_peft_model(OPEN(material / "causal"), LORA)
    kind = replace(KINDS["dpo with LoRA"], adapters="sparse_adapters")
    trainer, _ = kind.pruned("mixin", material, tmp_path, save_strategy="no", model=model, peft_config=None)
    reference = {name: weight for name, weight in weights_of(trainer).items() if ".ref." in name}
    trainer.train()
    assert len(reference) == len(trainer.pruner.masked) == 12
    assert not [name for name in trainer.pruner.masked if ".ref." in name]
    assert_same(reference, {name: weight for name, weight in weights_of(trainer).items() if ".ref." in name})


# ---- Sentences ----


def test_what_a_person_wrote_into_a_card_is_kept_though_the_model_saves_one_of_its_own(material, tmp_path):
    trainer, _ = KINDS["sentences"].pruned("mixin", material, tmp_path, save_strategy="no")
    trainer.train()
    trainer.create_model_card()
    card = read_card(tmp_path)
    assert ModelCard(card).data.library_name == "sentence-transformers"
    assert "from sentence_transformers import SentenceTransformer" in card
    (tmp_path / "README.md").write_text(card + "\nA word of mine.\n", encoding="utf-8")
    trainer.save_model()
    trainer.create_model_card()
    again = read_card(tmp_path)
    assert again.count("A word of mine.") == again.count("# SentenceTransformer\n") == 1
    assert again.count("hf-prune: begin summary") == 1


def test_modules_in_folders_of_their_own_are_pushed(material, tmp_path):
    trainer, _ = KINDS["sentences"].pruned("mixin", material, tmp_path, save_strategy="no")
    trainer.train()
    trainer.create_model_card()
    files = make_push_plan(tmp_path, "somebody/sentences", UNKNOWN).files
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "model.safetensors"} <= set(files)


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        ({"targets": [r"0\.model\..*\.query\.weight", r"2\.linear\.weight"]}, 2),
        ({"exclude": [r"0\.model\.encoder\.layer\.0\..*", r"2\..*"]}, 6),
        ({"targets": [r"2\.linear\.weight"]}, 0),
    ],
)
def test_tensors_are_chosen_by_the_names_that_they_have_in_training(material, tmp_path, changes, tensors):
    trainer, _ = KINDS["sentences"].pruned("mixin", material, tmp_path, save_strategy="no", config=changes)
    trainer.train()
    trainer.create_model_card()
    in_first = {name: zeros for name, zeros in trainer.pruner.masked.items() if name.startswith("0.")}
    found = {f"0.model.{tensor.name}": tensor.zeros for tensor in make_report(tmp_path).tensors if tensor.prunable}
    assert len(found) == tensors
    assert found == in_first


class HalfOfThem(BaseEvaluator):
    """An evaluator with data of its own."""

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        return {"half": 0.5}


@pytest.mark.parametrize("changes", [{}, {"eval_dataset": None}], ids=["beside a data set", "alone"])
def test_what_an_evaluator_measured_is_not_said_to_be_of_the_data_set(material, tmp_path, changes):
    trainer, _ = KINDS["sentences"].pruned(
        "mixin", material, tmp_path, save_strategy="no", evaluator=HalfOfThem(), **changes
    )
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    evaluation = load_record(tmp_path).evaluation
    assert (evaluation.metrics["half"], evaluation.samples, evaluation.dataset) == (0.5, None, None)
    assert "0 samples" not in read_card(tmp_path).replace("40 samples", "")


# ---- A loop of one's own with accelerate ----


def loop(directory, material, from_checkpoint=None):
    """Ten steps of two micro-batches each, with a checkpoint after five; the model, optimizer and pruner."""
    AcceleratorState._reset_state(reset_partial_state=True)
    set_seed(0)
    seedable = DataLoaderConfiguration(use_seedable_sampler=True)  # so that the order is the same when it is resumed
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=seedable)
    model = AutoModelForCausalLM.from_pretrained(material / "causal")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    batches = DataLoader(ARCHITECTURES["llama"].examples(40), batch_size=2, shuffle=True)
    model, optimizer, schedule, batches = accelerator.prepare(model, optimizer, schedule, batches)
    pruner = Pruner(accelerator.unwrap_model(model), CONFIG)
    if from_checkpoint is None:
        pruner.start(10, optimizer=optimizer)
    else:
        accelerator.load_state(from_checkpoint)
        pruner.resume(10, from_checkpoint, optimizer=optimizer)
        batches = accelerator.skip_first_batches(batches, 2 * pruner.completed_steps)
    model.train()
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                pruner.mask_gradients()
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            pruner.step(optimizer)
            if pruner.completed_steps == 5 and from_checkpoint is None:
                accelerator.save_state(directory / "half")
                pruner.save(directory / "half")
    accelerator.unwrap_model(model).save_pretrained(directory / "model")
    pruner.save(directory / "model")
    return model, optimizer, pruner


def test_a_loop_with_accelerate(material, tmp_path):
    model, optimizer, pruner = loop(tmp_path / "whole", material)
    assert pruner.completed_steps == 10
    assert_exact(pruner, 14)
    for name, parameter in pruner.parameters.items():
        moments = optimizer.state[parameter]
        assert torch.count_nonzero(moments["exp_avg"][~pruner.masks[name]]) == 0

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert zeros_of(opened, pruner.masked) == pruner.masked
    assert_same(model.state_dict(), opened.state_dict())
    assert make_report(tmp_path / "whole" / "model").prunable_sparsity == pytest.approx(pruner.sparsity)

    resumed, _, again = loop(tmp_path / "resumed", material, from_checkpoint=tmp_path / "whole" / "half")
    assert_same(model.state_dict(), resumed.state_dict())
    assert_same(pruner.masks, again.masks)
