"""Solvers that read the products of inputs, in an optimizer step of a training."""

from dataclasses import replace

import pytest
import torch
from models import ARCHITECTURES, bert, bert_examples, gpt2, llama, mixtral, resnet, training_arguments

from hf_prune import Pruner, PruningConfig, PruningConfigError, PruningTrainer, TargetError
from hf_prune.masking.readings import check_reads
from hf_prune.methods.patterns import count_of, parse_pattern
from hf_prune.methods.solvers import SOLVERS
from hf_prune.model.layouts import as_matrices

BUILD = {"bert": bert, "llama": llama, "gpt2": gpt2}
READING = [name for name, solver in SOLVERS.items() if solver.reads == "products"]


def at_once(method, **changes):
    return PruningConfig(**{"method": method, "sparsity": 0.5, "schedule": "one_shot", "begin": 1} | changes)


def build(kind):
    torch.manual_seed(0)
    model = BUILD[kind]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def batches(kind):
    """Two batches of different sizes, one of them with padding."""
    batch = ARCHITECTURES[kind].batch(32)["input_ids"]
    parts = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in (batch[:20], batch[20:])]
    parts[1]["attention_mask"][3, 5:] = 0
    return parts


@pytest.fixture
def problems(monkeypatch):
    """The problems that solvers were given, by name."""
    seen = {}
    for name in READING:

        def solve(problem, solver=SOLVERS[name]):
            seen[problem.name] = problem
            return solver.solve(problem)

        monkeypatch.setitem(SOLVERS, name, replace(SOLVERS[name], solve=solve))
    return seen


@pytest.mark.parametrize("kind", BUILD)
def test_a_solver_gets_the_gram_matrix_of_all_tokens_without_padding(kind, problems):
    model, data = build(kind), batches(kind)
    pruner = Pruner(model, at_once("sparsegpt"), total_steps=1)
    seen = {target.name: [] for target in pruner.targets}
    for batch in data:
        hooks = [
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda module, arguments, name=name, batch=batch: seen[name].append(
                    arguments[0][batch["attention_mask"].bool()].detach().double()
                )
            )
            for name in seen
        ]
        model(**batch)
        for hook in hooks:
            hook.remove()
    before = {name: parameter.detach().clone() for name, parameter in pruner.parameters.items()}
    pruner.step()
    assert list(problems) == [target.name for target in pruner.targets]
    for target in pruner.targets:
        inputs = torch.cat(seen[target.name])
        problem = problems[target.name]
        torch.testing.assert_close(problem.gram, (inputs.T @ inputs / len(inputs)).float(), rtol=1e-4, atol=1e-6)
        kept, values = SOLVERS["sparsegpt"].solve(problem)
        assert torch.equal(as_matrices(pruner.masks[target.name], target.layout), kept)
        assert torch.equal(as_matrices(pruner.parameters[target.name].detach(), target.layout), values)
        assert not torch.equal(pruner.parameters[target.name][pruner.masks[target.name]], before[target.name])
        assert int((~kept).sum()) == target.weights // 2


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x1"])
def test_layers_keep_their_outputs_better_than_with_scores(pattern, problems):
    errors = {}
    for method in (*READING, "wanda"):
        model, data = build("llama"), batches("llama")
        pruner = Pruner(model, at_once(method, pattern=pattern), total_steps=1)
        before = {name: parameter.detach().clone() for name, parameter in pruner.parameters.items()}
        for batch in data:
            model(**batch)
        pruner.step()
        grams = {name: problem.gram for name, problem in problems.items()}
        errors[method] = 0.0
        for name, parameter in pruner.parameters.items():
            lost = parameter.detach() - before[name]
            scale = ((before[name] @ grams[name]) * before[name]).sum()
            errors[method] += float(((lost @ grams[name]) * lost).sum() / scale)
    assert errors["alps"] < errors["sparsegpt"] < 0.9 * errors["wanda"]


RUNS = [("sparsegpt", "unstructured"), ("sparsegpt", "2:4"), ("alps", "unstructured"), ("alps", "block:4x1")]


@pytest.mark.parametrize(("method", "pattern"), RUNS)
def test_a_training_a_card_and_a_resume(tmp_path, method, pattern):
    config = PruningConfig(
        method=method, pattern=pattern, sparsity=None if pattern == "2:4" else 0.6, begin=2, end=6, frequency=2
    )

    def trainer_of(directory, **arguments):
        torch.manual_seed(0)
        args = training_arguments(directory, save_strategy="steps", save_steps=3, **arguments)
        return PruningTrainer(
            model=bert(), args=args, train_dataset=bert_examples(), eval_dataset=bert_examples(8), pruning_config=config
        )

    trainer = trainer_of(tmp_path / "run")
    trainer.train()
    assert trainer.pruner.at_final_sparsity
    for name, mask in trainer.pruner.masks.items():
        units = mask.numel() // parse_pattern(pattern).unit_size
        expected = mask.numel() // 2 if pattern == "2:4" else count_of(0.6, units) * parse_pattern(pattern).unit_size
        assert int((~mask).sum()) == expected
        assert not trainer.pruner.parameters[name][~mask].any()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert SOLVERS[method].words in card
    assert SOLVERS[method].paper in card
    resumed = trainer_of(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_what_is_no_linear_layer_is_refused():
    message = "expected the weight of a linear layer for a reconstruction or method that reads inputs, got one of"
    with pytest.raises(TargetError, match=message):
        Pruner(resnet(), at_once("sparsegpt"), total_steps=2)
    with pytest.raises(TargetError, match=message):
        Pruner(mixtral(), at_once("alps", targets=[".*experts.*"]), total_steps=2)


def test_a_compiled_model_is_refused():
    message = "methods that read inputs cannot be used with torch_compile, got 'sparsegpt'; use 'magnitude'"
    with pytest.raises(PruningConfigError, match=message):
        check_reads(at_once("sparsegpt"), shows_inputs=False)


def test_the_first_step_is_needed():
    with pytest.raises(PruningConfigError, match="expected 1 or more for 'alps', which needs the data of one step"):
        Pruner(bert(), PruningConfig(method="alps", sparsity=0.5, begin=0, end=4), total_steps=5)
