"""However the Trainer trains, pruning gives what a reference by hand makes of the stock Trainer, bit for bit."""

import itertools
from fractions import Fraction
from functools import cache

import optuna
import pytest
import torch
from models import bert, bert_examples, training_arguments
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_prune import Pruner, PruningCallback, PruningConfig, PruningTrainer
from hf_prune.trainer.checkpoints import UNFINISHED, is_complete

STEPS = 8
SPARSITIES = {3: 0.2, 5: 0.6}  # after so many steps, the first a small share and the second a large one
CONFIG = PruningConfig(initial_sparsity=0.2, sparsity=0.6, schedule="linear", begin=3, end=5, frequency=2)


class ByHand(TrainerCallback):
    """The lowest of each layer are dropped; gradients, weights and moments are zero from then on."""

    def __init__(self, model):
        suffixes = ("query.weight", "key.weight", "value.weight", "dense.weight")
        self.weights = [
            weight for name, weight in model.named_parameters() if ".layer." in name and name.endswith(suffixes)
        ]
        assert len(self.weights) == 12
        self.masks = [torch.ones_like(weight) for weight in self.weights]
        for index, weight in enumerate(self.weights):
            weight.register_hook(lambda gradient, index=index: gradient.where(self.masks[index] != 0, 0))

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            for index, weight in enumerate(self.weights):
                if state.global_step in SPARSITIES:
                    count = round(Fraction(str(SPARSITIES[state.global_step])) * weight.numel())
                    lowest = weight.abs().flatten().argsort(stable=True)[:count]
                    self.masks[index].view(-1)[lowest] = 0
                weight.mul_(self.masks[index])
                for value in kwargs["optimizer"].state[weight].values():
                    if torch.is_tensor(value) and value.shape == weight.shape:
                        value.mul_(self.masks[index])


class OwnLoss(Trainer):
    """A Trainer with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.logits.square().mean() + outputs.loss
        return (loss, outputs) if return_outputs else loss


class Scales(TrainerCallback):
    """The scale of the gradients after each step: it falls where a step was skipped."""

    def __init__(self, accelerator):
        self.accelerator, self.scales = accelerator, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.scales.append(self.accelerator.scaler.get_scale())


def scale_gradients(trainer):
    """What accelerate does for fp16 on a GPU, where it trains in float32 on a CPU: autocast and a gradient scaler.

    Its first scale is too large for the first steps, and it grows after every two that were not skipped.
    """
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2)
    trainer.scales = Scales(trainer.accelerator)
    trainer.add_callback(trainer.scales)


def own_loss_function(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels) * 3


def own_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


# As it is called from transformers 5.20 or so on, and before.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"

# Way of training -> arguments of TrainingArguments, and of the Trainer.
WAYS = {
    "plain": ({}, {}),
    "gradient accumulation": ({"gradient_accumulation_steps": 2}, {}),
    "clipping": ({"max_grad_norm": 0.05}, {}),
    "clipping and accumulation": ({"max_grad_norm": 0.05, "gradient_accumulation_steps": 3}, {}),
    "bf16": ({"bf16": True}, {}),
    "fp16 with skipped steps": ({"fp16": True, "max_grad_norm": 0.05, "optim": "adamw_torch"}, {"scaled": True}),
    "fp16 with steps that a fused optimizer skips": ({"fp16": True, "optim": "adamw_torch_fused"}, {"scaled": True}),
    "torch.compile": ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}),
    "gradient checkpointing": ({CHECKPOINTING: True}, {}),
    "label smoothing": ({"label_smoothing_factor": 0.2}, {}),
    "evaluation between": ({"eval_strategy": "steps", "eval_steps": 1}, {"eval_dataset": bert_examples(8)}),
    "compute_loss": ({}, {"base": OwnLoss}),
    "compute_loss_func": ({}, {"compute_loss_func": own_loss_function}),
    "optimizers": ({}, {"own_optimizer": True}),
    "noise in the embeddings": ({"neftune_noise_alpha": 5}, {}),
    "bfloat16 weights": ({}, {"dtype": torch.bfloat16}),
}


def train(directory, way, kind):
    """The trainer after training: `by hand`, `trainer` (PruningTrainer) or `callback` (stock Trainer with ours)."""
    arguments, keywords = WAYS[way]
    keywords = dict(keywords)
    base = keywords.pop("base", Trainer)
    torch.manual_seed(3)
    model = bert().to(keywords.pop("dtype", torch.float32))
    scaled = keywords.pop("scaled", False)
    if keywords.pop("own_optimizer", False):
        keywords["optimizers"] = own_optimizer(model)
    callbacks = {"by hand": lambda: [ByHand(model)], "callback": lambda: [PruningCallback(CONFIG)]}.get(kind, list)()
    if kind == "trainer":
        base = type("Pruning" + base.__name__, (PruningTrainer, base), {})
        keywords["pruning_config"] = CONFIG
    args = training_arguments(directory, max_steps=STEPS, weight_decay=0.1, **arguments)
    trainer = base(model=model, args=args, train_dataset=bert_examples(), callbacks=callbacks, **keywords)
    if scaled:
        scale_gradients(trainer)
    trainer.train()
    if scaled:
        falls = [later < earlier for earlier, later in itertools.pairwise(trainer.scales.scales)]
        assert 1 < sum(falls) < len(falls) - 2, "some steps are skipped and some are not"
    return trainer


def assert_same(model, other):
    weights = other.state_dict()
    assert [name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])] == []


def by_hand(trainer):
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ByHand))


def logged(trainer):
    """Loss, gradient norm and evaluated loss at each step, as text, since the norm of a skipped step may be NaN."""
    names = ("step", "loss", "grad_norm", "eval_loss")
    return [[repr(entry.get(name)) for name in names] for entry in trainer.state.log_history[:-1]]


@pytest.fixture(scope="module")
def trained_by_hand(tmp_path_factory):
    """The trainer of a way after the reference has trained in it, once for all tests."""
    return cache(lambda way: train(tmp_path_factory.mktemp("by_hand"), way, "by hand"))


@pytest.mark.parametrize("kind", ["trainer", "callback"])
@pytest.mark.parametrize("way", WAYS)
def test_pruning_is_what_a_reference_by_hand_gives(trained_by_hand, tmp_path, way, kind):
    ours, reference = train(tmp_path, way, kind), trained_by_hand(way)
    assert logged(ours) == logged(reference)
    assert_same(ours.model, reference.model)
    zeros = [int((weight == 0).sum()) for weight in by_hand(reference).weights]
    assert zeros == [round(0.6 * weight.numel()) for weight in by_hand(reference).weights]


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"plain"}))
def test_each_way_is_another_than_the_plain_one(trained_by_hand, way):
    """So that the test above cannot pass because an argument had no effect."""
    trainer = trained_by_hand(way)
    if way == "torch.compile":
        assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    elif way == "gradient checkpointing":
        assert trainer.model.bert.encoder.layer[0].gradient_checkpointing
    else:
        assert logged(trainer) != logged(trained_by_hand("plain"))


# ---- Training that begins again ----

GRADUAL = PruningConfig(sparsity=0.6, schedule="linear", begin=2, end=8, frequency=1)
SAVING = {"save_strategy": "steps", "save_steps": 2}


def out_of_memory_at_the_fourth_batch_of_four(model):
    """Raise what torch raises on a GPU, when the first steps have been made and masks were updated."""
    large = []

    def check(module, args, kwargs):
        if len(kwargs["input_ids"]) == 4:
            large.append(module)
            if len(large) == 4:
                raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return large


def make_trainer(kind, pruning_config, **keywords):
    """A PruningTrainer, or a stock Trainer with our callback; and what has its pruner."""
    if kind == "trainer":
        trainer = PruningTrainer(**keywords, pruning_config=pruning_config)
        return trainer, trainer
    callback = PruningCallback(pruning_config)
    return Trainer(**keywords, callbacks=[callback]), callback


def searching_a_batch_size(directory, kind):
    arguments = {"auto_find_batch_size": True, "max_steps": -1, "num_train_epochs": 1}
    torch.manual_seed(3)
    return make_trainer(
        kind,
        GRADUAL,
        model=bert(),
        args=training_arguments(directory, **arguments, **SAVING),
        train_dataset=bert_examples(),
    )


@pytest.mark.parametrize("kind", ["trainer", "callback"])
def test_pruning_begins_again_with_the_batch_size_that_is_found(tmp_path, kind):
    """From the zeros of the steps before, with a schedule for the steps that there are now; and it can be resumed."""
    trainer, holder = searching_a_batch_size(tmp_path, kind)
    large = out_of_memory_at_the_fourth_batch_of_four(trainer.model)
    hooks = []
    trainer.add_callback(CountHooks(hooks))
    trainer.train()
    assert len(large) == 4
    assert trainer.state.global_step == 14  # 40 examples in batches of three
    assert holder.pruner.total_steps == 14
    assert hooks == [0 if kind == "trainer" else 12] * 17  # three steps, then fourteen
    sparsities = [entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry]
    assert sparsities[0] == pytest.approx(0.1, abs=0.01)  # of the second step before
    assert sparsities == sorted(sparsities)
    assert sparsities[7:] == [pytest.approx(0.6, abs=0.001)] * 7
    for name, parameter in holder.pruner.parameters.items():
        assert int((parameter == 0).sum()) == holder.pruner.masked[name] == round(0.6 * parameter.numel())
    resumed, holder = searching_a_batch_size(tmp_path, kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 14
    expected = trainer.model.state_dict()
    assert [
        name for name, weight in resumed.model.state_dict().items() if not torch.equal(weight, expected[name])
    ] == []


class CountHooks(TrainerCallback):
    """How many parameters have a gradient hook at each step; none may have two."""

    def __init__(self, counts):
        self.counts = counts

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        hooks = [parameter._post_accumulate_grad_hooks or {} for parameter in kwargs["model"].parameters()]
        assert max(map(len, hooks)) <= 1
        self.counts.append(sum(map(len, hooks)))


@pytest.mark.parametrize("kind", ["trainer", "callback"])
def test_every_trial_of_a_hyperparameter_search_is_pruned_from_dense(tmp_path, kind):
    """Each with checkpoints of its own, complete and with masks, that training can go on from."""
    trainer, holder = make_trainer(
        kind,
        GRADUAL,
        model_init=lambda trial: bert(),
        args=training_arguments(tmp_path, eval_strategy="no", **SAVING),
        train_dataset=bert_examples(),
        eval_dataset=bert_examples(8),
    )
    if kind == "trainer":  # of a search that was killed
        (tmp_path / "run-1" / UNFINISHED / "checkpoint-2").mkdir(parents=True)
        (tmp_path / "run-1" / UNFINISHED / "checkpoint-2" / "leftover").touch()
    found = []

    def objective(metrics):
        found.append(({name: mask.clone() for name, mask in holder.pruner.masks.items()}, trainer.model))
        return metrics["eval_loss"]

    rates = [1e-3, 1e-2, 3e-2]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        compute_objective=objective,
        n_trials=3,
        backend="optuna",
        direction="minimize",
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}),
    )
    assert best.hyperparameters["learning_rate"] in rates
    assert len(found) == 3
    for masks, model in found:
        assert len(masks) == 12
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            assert int((~mask).sum()) == round(0.6 * mask.numel()) == int((weight == 0).sum())
    assert any(not torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])
    runs = sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("run-"))
    assert runs == ["run-0", "run-1", "run-2"]
    for run in runs:
        for step in (2, 4, 6, 8, 10):
            folder = tmp_path / run / f"checkpoint-{step}"
            assert is_complete(folder)
            assert not (folder / "leftover").exists()
            loaded = Pruner(bert(), GRADUAL)
            loaded.load(folder)
            assert loaded.completed_steps == step
        assert loaded.sparsity == pytest.approx(0.6, abs=0.001)
