"""A criterion, a solver and a scope of another package: an entry each, through contract, Trainer, card and resume."""

import json
import re
import tomllib
from pathlib import Path

import peft
import pytest
import torch
from forks import run_script
from method_contract import check_criterion, check_solver
from models import bert, bert_examples, training_arguments
from transformers import AutoModelForSequenceClassification

from hf_prune import Pruner, PruningConfig, PruningConfigError, PruningStateError, PruningTrainer
from hf_prune.methods.criteria import CRITERIA, Criterion
from hf_prune.methods.scopes import SCOPES, Pool, Scope, count_of
from hf_prune.methods.solvers import SOLVERS, Solver

GUIDE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", GUIDE.partition("## Adding a method")[2], flags=re.MULTILINE | re.DOTALL)
DECLARED = tomllib.loads(re.search(r"^```toml\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)[1])


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


# ---- The commands, which only an installed package can tell of a method ----

COMMAND = """
import sys
sys.path[:0] = [sys.argv[1]]
sys.argv = ["hf-prune", *sys.argv[2:]]
from hf_prune.cli.commands import main
try:
    main()
finally:
    print("somebodys_methods" in sys.modules, file=sys.stderr)
"""


@pytest.fixture
def package(tmp_path):
    """What pip makes of a package that declares its methods as CONTRIBUTING.md shows."""
    folder = tmp_path / "installed"
    described = folder / "somebodys-1.0.dist-info"
    described.mkdir(parents=True)
    [(group, names)] = DECLARED["project"]["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {module}" for name, module in names.items())]
    (described / "entry_points.txt").write_text("\n".join(lines))
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (folder / "somebodys_methods.py").write_text("\n".join(BLOCKS))
    return folder


@pytest.fixture
def command(tmp_path):
    """A command of hf-prune in a process of its own, with a folder of packages: its output, and what it said."""
    (tmp_path / "command.py").write_text(COMMAND)

    def run(packages, *arguments):
        done = run_script(tmp_path / "command.py", packages, *arguments)
        said, imported = done.stderr.splitlines()[:-1], done.stderr.splitlines()[-1]
        return done.returncode, done.stdout, "\n".join(said), imported == "True"

    return run


@pytest.fixture
def trained(tmp_path):
    trainer = trainer_of(tmp_path / "run", PruningConfig(**METHODS["criterion"]), save_strategy="no")
    trainer.train()
    trainer.create_model_card()
    return trainer


def zeros_in(output):
    return json.loads(output)["prunable"]["zeros"]


@pytest.fixture
def model(trained):
    return Path(trained.args.output_dir)


def test_the_method_of_an_installed_package_is_found_by_its_name_alone(tmp_path, command, package, model):
    (model / "run_record.json").unlink()
    code, _, said, imported = command(package, "card", model)
    assert (code, said, imported) == (0, "", True)
    assert CRITERIA["average"].paper in (model / "README.md").read_text(encoding="utf-8")
    code, _, said, imported = command(package, "plan", model, "method=average", "sparsity=0.7")
    assert (code, said, imported) == (0, "", True)
    bert().save_pretrained(tmp_path / "dense")
    code, _, said, imported = command(package, "plan", tmp_path / "dense", "sparsity=0.7")
    assert (code, said, imported) == (0, "", False)


def test_without_the_package_a_saved_model_loses_nothing(tmp_path, command, trained, model):
    (tmp_path / "nothing").mkdir()
    code, output, said, _ = command(tmp_path / "nothing", "report", model, "--json")
    assert (code, said) == (0, "")
    assert zeros_in(output) == sum(trained.pruner.masked.values())
    card = (model / "README.md").read_text(encoding="utf-8")
    for arguments in (["card", model], ["push", model, "somebody/sparse", "--dry-run"]):
        code, _, said, _ = command(tmp_path / "nothing", *arguments)
        assert (code, said) == (0, "")
    assert (model / "README.md").read_text(encoding="utf-8") == card
    assert CRITERIA["average"].words in card


def test_a_card_of_a_method_that_nothing_describes_has_its_name_and_a_note_says_why(tmp_path, command, model):
    (tmp_path / "nothing").mkdir()
    record = json.loads((model / "run_record.json").read_text(encoding="utf-8"))
    del record["methods"]  # as it was written before it had them
    (model / "run_record.json").write_text(json.dumps(record), encoding="utf-8")
    code, _, said, _ = command(tmp_path / "nothing", "card", model)
    assert code == 0
    assert re.search("'average' is not known here, .* Install the package .* hf_prune.methods", said)
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "the weights that the method `average` selects, in each tensor separately" in card


def test_a_method_that_cannot_be_imported_is_told_and_keeps_nobody_from_reading(command, package, model):
    (package / "somebodys_methods.py").write_text("import a_module_that_is_not_there")
    code, output, _, _ = command(package, "report", model, "--json")
    assert code == 0
    assert zeros_in(output)
    code, _, said, _ = command(package, "plan", model, "method=average", "sparsity=0.7")
    assert code == 2
    assert "the package somebodys as somebodys_methods, which cannot be imported: No module named" in said
