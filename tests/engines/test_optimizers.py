"""Every `optim` of TrainingArguments, as the table of docs/optimizers.md has it."""

from pathlib import Path

import pytest
import torch
from models import bert, bert_examples, training_arguments
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from hf_prune import Pruner, PruningCallback, PruningConfig, PruningConfigError, PruningTrainer
from hf_prune.quantise.codebooks import distinct_values

TABLE = Path(__file__).parents[2] / "docs" / "optimizers.md"
CONFIG = PruningConfig(sparsity=0.7, schedule="linear", begin=2, end=6, frequency=2)
LOW_RANK = {"optim_target_modules": ["query", "value"], "optim_args": "rank=4,update_proj_gap=2"}
ARGUMENTS = {
    "sgd": {"optim_args": "momentum=0.9"},
    "galore_adamw": LOW_RANK,
    "galore_adafactor": LOW_RANK,
    "galore_adamw_layerwise": LOW_RANK,
    "apollo_adamw": LOW_RANK,
    "apollo_adamw_layerwise": LOW_RANK,
    "rmsprop": {"optim_args": "momentum=0.9,centered=True"},
}


def rows_of_the_table():
    """The documented lines: optim -> (weights, moments, run on)."""
    rows: dict[str, tuple[str, ...]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `") and not line.startswith("| `optim`"):
            names, _package, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows |= {name.strip(" `"): tuple(cells) for name in names.split(",")}
    return rows


ROWS = rows_of_the_table()
RUN_HERE = [name for name, (*_, run_on) in ROWS.items() if run_on == "CPU"]


class AfterEachStep(TrainerCallback):
    """Calls a function with the optimizer itself after each step, added last."""

    def __init__(self, function):
        self.function = function

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.function(kwargs["optimizer"].optimizer)

    on_step_end = on_optimizer_step


def states_of(optimizer, parameter):
    """All that the optimizer keeps of a parameter, as plain numbers: name -> tensor."""
    found = dict(optimizer.state.get(parameter, {}))
    for group in optimizer.param_groups:
        found |= group.get("state", {}).get(parameter, {})
    if hasattr(optimizer, "optimizer_dict"):
        found |= optimizer.optimizer_dict[parameter].state[parameter]
    plain = {}
    for name, value in found.items():
        if not torch.is_tensor(value) or name.startswith(("qmap", "absmax")):
            continue
        if value.dtype is torch.uint8:
            value = found[f"qmap{name[-1]}"][value.long()]
        plain[name] = value.float() if type(value) is torch.Tensor else value.dequantize()
    return plain


def test_the_table_has_every_optim():
    known = {name.value for name in OptimizerNames}
    assert known <= set(ROWS)
    assert len(RUN_HERE) >= 34
    assert set(RUN_HERE) <= known
    assert all(weights == "zero" for name, (weights, *_) in ROWS.items() if name in RUN_HERE)


# The packages warn of what is old in them (galore-torch, grokadamw) and of pages that a CPU has not (bitsandbytes).
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", RUN_HERE)
def test_masked_weights_and_moments_are_zero_with_every_optim(tmp_path, name):
    """Weights large enough to be kept in 8 and 4 bits, too."""
    model = bert(hidden_size=64, intermediate_size=96)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = {"optim": name, "weight_decay": 0.1, "max_steps": 8} | ARGUMENTS.get(name, {})
    trainer = PruningTrainer(
        model=model,
        args=training_arguments(tmp_path, **arguments),
        train_dataset=bert_examples(),
        pruning_config=CONFIG,
    )
    shaped, nonzero, other = set(), set(), set()

    def check(optimizer):
        for key, parameter in trainer.pruner.parameters.items():
            masked = ~trainer.pruner.masks[key]
            assert not torch.count_nonzero(parameter[masked])
            for state, value in states_of(optimizer, parameter).items():
                if value.shape[value.dim() - 2 :] != parameter.shape:
                    other.update({state} if value.dim() else ())
                    continue
                shaped.add(state)
                if torch.count_nonzero(value * masked):
                    nonzero.add(state)

    trainer.add_callback(AfterEachStep(check))
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes a minute and a C++ compiler
        trainer.train()
    moments = ROWS[name][1]
    if moments == "zero":
        assert (bool(shaped), nonzero, other) == (True, set(), set())
    elif moments == "zero, except in the low-rank space":
        assert (bool(shaped), nonzero, bool(other)) == (True, set(), True)
    elif moments == "first zero, second at its lowest code":
        assert (shaped, nonzero) == ({"exp_avg", "exp_avg_sq"}, {"exp_avg_sq"})
    elif moments == "row and column means":
        assert (shaped, bool(other)) == (set(), True)
    else:
        assert (moments, shaped, other) == ("none", set(), set())
    assert trainer.pruner.sparsity == pytest.approx(0.7, abs=1e-3)
    for key, parameter in trainer.pruner.parameters.items():
        kept = trainer.pruner.masks[key]
        assert not torch.equal(parameter.detach()[kept], before[key][kept]), f"{key} was not trained"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", RUN_HERE)
def test_weights_share_few_values_with_every_optim_or_it_is_refused(tmp_path, name):
    arguments = {"optim": name, "weight_decay": 0.1, "max_steps": 4} | ARGUMENTS.get(name, {})
    trainer = PruningTrainer(
        model=bert(hidden_size=64, num_hidden_layers=1, intermediate_size=96),
        args=training_arguments(tmp_path, **arguments),
        train_dataset=bert_examples(),
        pruning_config=PruningConfig(sparsity=0.7, schedule="one_shot", begin=1, shared_values=5),
    )
    if name.startswith("schedule_free"):
        with pytest.raises(PruningConfigError, match=r"shared_values: .*schedule-free"):
            trainer.train()
        return
    codebooks = []

    def check(optimizer):
        codebooks.append(dict(trainer.pruner.codebooks))
        for key, codebook in codebooks[-1].items():
            parameter = trainer.pruner.parameters[key]
            assert set(distinct_values([parameter]).tolist()) <= set(codebook.tolist())
            assert len(codebook) <= 5
            assert int(parameter.count_nonzero()) == int(trainer.pruner.masks[key].sum())

    trainer.add_callback(AfterEachStep(check))
    with torch.compiler.set_stance("force_eager"):
        trainer.train()
    assert len(codebooks[-1]) == len(trainer.pruner.parameters) == 6
    first = next(one for one in codebooks if one)
    assert any(not torch.equal(first[key], codebook) for key, codebook in codebooks[-1].items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_moments_in_a_space_of_lower_rank_are_left_alone_whatever_their_shape(tmp_path):
    model = bert(hidden_size=64)
    arguments = {"optim": "galore_adamw", "optim_target_modules": ["query"], "optim_args": "rank=128"}
    args = training_arguments(tmp_path, **arguments)
    trainer = PruningTrainer(model=model, args=args, train_dataset=bert_examples(), pruning_config=CONFIG)
    trainer.train()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    moment = trainer.optimizer.optimizer.state[model.get_parameter(name)]["exp_avg"]
    assert moment.shape == (64, 64)
    assert torch.count_nonzero(moment) == 64 * 64
    assert not torch.count_nonzero(model.get_parameter(name)[~trainer.pruner.masks[name]])


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer, and goes half of the way to where that has gone (Zhang et al., arXiv 1907.08610)."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.clone())
                parameter.copy_(slow.lerp_(parameter, 0.5))


def test_an_optimizer_that_wraps_another_is_no_other_than_itself(tmp_path):
    model = bert()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    keywords = {"model": model, "train_dataset": bert_examples(), "pruning_config": CONFIG}
    optimizer = Lookahead(inner)
    trainer = PruningTrainer(**keywords, args=training_arguments(tmp_path), optimizers=(optimizer, None))
    trainer.train()
    for name, parameter in trainer.pruner.parameters.items():
        masked = ~trainer.pruner.masks[name]
        for tensor in (parameter, optimizer.state[parameter]["slow"], inner.state[parameter]["exp_avg"]):
            assert not torch.count_nonzero(tensor[masked])


def test_weights_that_are_unfrozen_while_training_stay_zero(tmp_path):
    model = bert()
    frozen = [parameter for name, parameter in model.named_parameters() if ".layer.0." in name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in frozen:
        parameter.requires_grad_(False)

    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for parameter in frozen if state.global_step == 4 else ():
                parameter.requires_grad_(True)

    holder = PruningCallback(CONFIG)
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path),
        train_dataset=bert_examples(),
        optimizers=(optimizer, None),
        callbacks=[holder, Unfreeze()],
    )
    trainer.train()
    for name, parameter in holder.pruner.parameters.items():
        assert int((parameter == 0).sum()) == holder.pruner.masked[name] == round(0.7 * parameter.numel())


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_weights_of_another_optimizer_and_of_one_without_epsilon_stay_zero(eps):
    model = bert()
    batch = {name: torch.stack([row[name] for row in bert_examples(4)]) for name in ("input_ids", "labels")}
    pruner = Pruner(model, PruningConfig(sparsity=0.5, schedule="one_shot", begin=0), total_steps=4)
    others = {parameter for name, parameter in model.named_parameters() if ".layer.0." in name}
    noisy = torch.optim.Muon([parameter for parameter in others if parameter.dim() == 2], lr=1e-2)
    adamw = torch.optim.AdamW([one for one in model.parameters() if one not in others], lr=1e-2, eps=eps)
    for _ in range(4):
        model(**batch).loss.backward()
        pruner.mask_gradients()
        noisy.step()
        adamw.step()
        pruner.step(adamw)
        for name, parameter in pruner.parameters.items():
            assert not torch.count_nonzero(parameter[~pruner.masks[name]])


@pytest.mark.parametrize("kind", ["trainer", "callback"])
def test_weights_are_zero_between_micro_batches_where_backward_changes_them(tmp_path, kind):
    arguments = {"optim": "lomo", "gradient_accumulation_steps": 2, "max_steps": 8}
    keywords = {
        "model": bert(),
        "args": training_arguments(tmp_path, **arguments),
        "train_dataset": bert_examples(),
    }
    if kind == "trainer":
        trainer = holder = PruningTrainer(**keywords, pruning_config=CONFIG)
    else:
        holder = PruningCallback(CONFIG)
        trainer = Trainer(**keywords, callbacks=[holder])
    zeros = []

    class AfterEachMicroBatch(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            pruner = holder.pruner
            zeros.append(sum(int((weight == 0).sum()) for weight in pruner.parameters.values()))
            assert zeros[-1] == sum(pruner.masked.values())

    trainer.add_callback(AfterEachMicroBatch())
    trainer.train()
    assert len(zeros) == 8
    assert zeros[-1] > 0
