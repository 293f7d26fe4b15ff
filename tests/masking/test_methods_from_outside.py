"""A criterion, a solver and a scope of another package: an entry each, through contract, Trainer, card and resume."""

import re
from pathlib import Path

import peft
import pytest
import torch
from method_contract import check_criterion, check_solver
from models import bert, bert_examples, training_arguments
from transformers import AutoModelForSequenceClassification

from hf_prune import Pruner, PruningConfig, PruningConfigError, PruningStateError, PruningTrainer
from hf_prune.methods.criteria import CRITERIA, Criterion
from hf_prune.methods.scopes import SCOPES, Pool, Scope, count_of
from hf_prune.methods.solvers import SOLVERS, Solver

GUIDE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", GUIDE.partition("## Adding a method")[2], flags=re.MULTILINE | re.DOTALL)


def by_activity(tensors, sparsity):
    """Tensors with inputs above the median lose a quarter less, the others as much more; the total is exact."""
    norms = torch.tensor([float(tensor.inputs.mean()) for tensor in tensors])
    total = count_of(sparsity, sum(tensor.units for tensor in tensors))
    is_active = (norms > norms.median()).tolist()
    counts = [
        max(int(sparsity * tensor.units * 3 / 4) if active else 0, tensor.dropped)
        for tensor, active in zip(tensors, is_active, strict=True)
    ]
    for index, tensor in enumerate(tensors):
        if not is_active[index]:
            room = min(total - sum(counts), tensor.units - 1 - counts[index])
            counts[index] += max(room, 0)
    return [Pool((index,), count) for index, count in enumerate(counts)]


BY_ACTIVITY = Scope(
    by_activity,
    words="less where inputs are large",
    reads="inputs",
    paper="@misc{somebody2026activity,\n  title = {Activity},\n  year = {2026}\n}",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The entries that CONTRIBUTING.md shows are in the tables, and a scope."""
    names = {}
    for block in BLOCKS:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    monkeypatch.setitem(SCOPES, "by_activity", BY_ACTIVITY)
    yield
    for table, name in ((CRITERIA, "average"), (SOLVERS, "rescaled")):
        table.pop(name, None)


def test_the_contract_holds_for_entries_of_others():
    check_criterion(CRITERIA["average"])
    check_solver(SOLVERS["rescaled"])


def test_the_contract_finds_what_breaks_it():
    broken = Criterion(lambda weight, piece: weight.detach().float() - weight.sum(), words="depends on the slice")
    with pytest.raises(AssertionError):
        check_criterion(broken)

    def one_too_many(problem):
        kept, values = SOLVERS["rescaled"].solve(problem)
        kept.view(-1)[kept.view(-1).nonzero()[:1]] = False
        return kept, values

    with pytest.raises(AssertionError):
        check_solver(Solver(one_too_many, words="drops more", reads="inputs"))


WINDOW = {"begin": 2, "end": 8, "frequency": 2}
METHODS = {
    "criterion": {"method": "average", "sparsity": 0.6, **WINDOW},
    "criterion, all together": {"method": "average", "sparsity": 0.6, "scope": "global", **WINDOW},
    "solver": {"method": "rescaled", "sparsity": 0.6, **WINDOW},
    "solver of groups": {"method": "rescaled", "pattern": "2:4", **WINDOW},
    "scope": {"method": "magnitude", "sparsity": 0.4, "scope": "by_activity", **WINDOW},
    "scope and gradients": {"method": "taylor", "sparsity": 0.4, "scope": "by_activity", **WINDOW},
}


def trainer_of(directory, config, **arguments):
    torch.manual_seed(0)
    arguments = {"save_strategy": "steps", "save_steps": 1, **arguments}
    args = training_arguments(directory, **arguments)
    return PruningTrainer(
        model=bert(), args=args, train_dataset=bert_examples(), eval_dataset=bert_examples(8), pruning_config=config
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_training_a_card_and_a_resume(tmp_path, name):
    config = PruningConfig(**METHODS[name])
    trainer = trainer_of(tmp_path / "run", config)
    trainer.train()
    expected = 0.5 if config.pattern == "2:4" else config.sparsity
    assert trainer.pruner.sparsity == pytest.approx(expected, abs=2e-3)
    assert trainer.pruner.at_final_sparsity
    for parameter, mask in zip(trainer.pruner.parameters.values(), trainer.pruner.masks.values(), strict=True):
        assert not parameter[~mask].any()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    entries = {"criterion": CRITERIA["average"], "solver": SOLVERS["rescaled"], "scope": BY_ACTIVITY}
    entry = entries[name.split()[0].removesuffix(",")]
    assert entry.words in card
    assert entry.paper in card
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")

    resumed = trainer_of(tmp_path / "resumed", config, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    for key, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[key]), key
    assert all(torch.equal(mask, resumed.pruner.masks[key]) for key, mask in trainer.pruner.masks.items())


def test_a_solver_changes_what_it_keeps(tmp_path):
    config = PruningConfig(method="rescaled", sparsity=0.5, schedule="one_shot", begin=1)
    trainer = trainer_of(tmp_path, config, max_steps=1, learning_rate=0.0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.pruner.parameters.items()}
    trainer.train()
    for name, parameter in trainer.pruner.parameters.items():
        kept = parameter.detach()
        alive = kept.any(dim=1)
        torch.testing.assert_close(kept.norm(dim=1)[alive], before[name].norm(dim=1)[alive], rtol=1e-4, atol=1e-6)
        assert not torch.equal(kept[trainer.pruner.masks[name]], before[name][trainer.pruner.masks[name]])


def test_a_solver_that_does_something_else_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(SOLVERS, "wrong", Solver(lambda problem: (problem.kept, problem.weight), words="nothing"))
    trainer = trainer_of(tmp_path, PruningConfig(method="wrong", sparsity=0.5, begin=1, end=4))
    with pytest.raises(PruningStateError, match="the solver 'wrong' must drop"):
        trainer.train()


def test_a_solver_does_not_rank_tensors_together():
    with pytest.raises(PruningConfigError, match="scope: must not rank tensors together"):
        PruningConfig(method="rescaled", sparsity=0.5, scope="global")


def test_a_method_that_is_no_longer_registered_is_told_with_those_that_are(tmp_path, monkeypatch):
    PruningConfig(method="average", sparsity=0.5).save_pretrained(tmp_path)
    monkeypatch.delitem(CRITERIA, "average")
    with pytest.raises(PruningConfigError, match=r"method: expected one of magnitude, .* got 'average'"):
        PruningConfig.from_pretrained(tmp_path)


def test_a_solver_is_refused_for_weights_that_adapters_add_to():
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    config = PruningConfig(method="rescaled", sparsity=0.5, adapters="sparse_merge")
    with pytest.raises(PruningConfigError, match="methods that write weights cannot be used"):
        Pruner(model, config)
