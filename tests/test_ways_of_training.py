"""However the Trainer trains, pruning gives what a reference by hand makes of the stock Trainer, bit for bit."""

import itertools
from fractions import Fraction

import pytest
import torch
from models import bert, bert_examples, training_arguments
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_prune import PruningCallback, PruningConfig, PruningTrainer

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


def by_hand(trainer):
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ByHand))


def logged(trainer):
    """Loss, gradient norm and evaluated loss at each step, as text, since the norm of a skipped step may be NaN."""
    names = ("step", "loss", "grad_norm", "eval_loss")
    return [[repr(entry.get(name)) for name in names] for entry in trainer.state.log_history[:-1]]


@pytest.mark.parametrize("kind", ["trainer", "callback"])
@pytest.mark.parametrize("way", WAYS)
def test_pruning_is_what_a_reference_by_hand_gives(tmp_path, way, kind):
    ours, reference = train(tmp_path, way, kind), train(tmp_path, way, "by hand")
    assert logged(ours) == logged(reference)
    expected = reference.model.state_dict()
    assert [name for name, weight in ours.model.state_dict().items() if not torch.equal(weight, expected[name])] == []
    zeros = [int((weight == 0).sum()) for weight in by_hand(reference).weights]
    assert zeros == [round(0.6 * weight.numel()) for weight in by_hand(reference).weights]


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"plain"}))
def test_each_way_is_another_than_the_plain_one(tmp_path, way):
    """So that the test above cannot pass because an argument had no effect."""
    trainer = train(tmp_path, way, "by hand")
    if way == "torch.compile":
        assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    elif way == "gradient checkpointing":
        assert trainer.model.bert.encoder.layer[0].gradient_checkpointing
    else:
        assert logged(trainer) != logged(train(tmp_path, "plain", "by hand"))
