"""Run by processes of a group: remove structures from a tiny BERT under an engine, and save what is left."""

import json
from pathlib import Path

import torch
from models import ARCHITECTURES, bert, bert_examples, llama
from train import make_arguments, whole_weights
from transformers import AutoModelForSequenceClassification, Trainer, set_seed

from hf_prune import PruningCallback, PruningConfig, PruningTrainer, StructureError
from hf_prune.errors import HfPruneError

WINDOW = {"method": "taylor", "begin": 1, "end": 5, "frequency": 1}
CONFIGS = {
    "small": [{"structure": "neurons", "sparsity": 0.75, **WINDOW}, {"structure": "layers", "sparsity": 0.5, **WINDOW}],
    "different": [
        {"structure": "neurons", "scope": "global", "sparsity": 0.75, **WINDOW},
        {"structure": "layers", "sparsity": 0.25, **WINDOW},
    ],
    "narrow": [{"structure": "hidden", "sparsity": 0.5, **WINDOW}],
    "target": [{"target_parameters": 0.6, **WINDOW}],
    "target_per_layer": [{"target_parameters": 0.6, "scope": "global", **WINDOW}],
}


def dense():
    set_seed(0)
    return bert(num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def dense_llama():
    set_seed(0)
    return llama(num_attention_heads=4, num_key_value_heads=2)


MODELS = {"bert": dense, "llama": dense_llama}


def main(directory, engine, kind):
    run(directory, {"engine": engine, "configs": CONFIGS[kind], "arguments": {"max_steps": 8}})


def main_of_cases(directory):
    """Run the cases of a file one after another."""
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        (run_refused if case.get("refused") else run)(directory / name, case)


def make_trainer(directory, case):
    """A trainer, and its callback that prunes."""
    case = {"model": "bert"} | case
    arguments = {"args": make_arguments(directory, case), "train_dataset": ARCHITECTURES[case["model"]].examples(48)}
    configs = [PruningConfig(**config) for config in case["configs"]]
    if case.get("opened"):  # after its arguments are made: ZeRO-3 shards a model when it is opened
        if torch.distributed.get_rank() == 0:
            dense().save_pretrained(directory / "dense")
        torch.distributed.barrier()
        arguments["model"] = AutoModelForSequenceClassification.from_pretrained(directory / "dense")
    else:
        arguments["model"] = MODELS[case["model"]]()
    if case.get("fails") == torch.distributed.get_rank():
        arguments["model"].register_forward_pre_hook(fail)
    if case.get("callback"):
        callback = PruningCallback(configs)
        return Trainer(**arguments, callbacks=[callback]), callback
    trainer = PruningTrainer(**arguments, pruning_config=configs)
    return trainer, trainer._pruning


def fail(module, arguments):
    raise OSError("no more room")


def run(directory, case):
    """Train, save, and write what a case ended with."""
    trainer, callback = make_trainer(directory, case)
    trainer.train(resume_from_checkpoint=case.get("resume"))
    if case.get("card"):
        trainer.evaluate(ARCHITECTURES["bert"].examples(8))
        trainer.create_model_card()
    trainer.save_model(str(directory / "saved"))
    pruner, weights = callback.pruner, whole_weights(trainer.model)
    if case.get("callback"):
        pruner.save_from_all(directory / "saved", trainer.args.should_save)
    left = None if pruner.chosen is None else pruner.chosen.candidate.parameters
    chosen = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(chosen, None if pruner.chosen is None else pruner.chosen.to_dict())
    assert all(one == chosen[0] for one in chosen)
    if torch.distributed.get_rank() == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {"weights": weights, "sparsity": pruner.sparsity, "left": left}
        torch.save(
            result | {name: [entry[name] for entry in logs] for name in ("loss", "grad_norm")}, directory / "result.pt"
        )
    torch.distributed.barrier()


def run_refused(directory, case):
    """Write what each process raises before it has trained a step."""
    trainer = None
    try:
        trainer, _ = make_trainer(directory, case)
        trainer.train()
        said = "nothing"
    except (HfPruneError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    assert trainer is None or trainer.state.global_step == 0
    (directory / f"{torch.distributed.get_rank()}.txt").write_text(said)
    torch.distributed.barrier()


class Spoiling(PruningTrainer):
    """Writes another number of neurons into the configuration that it saves."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if torch.distributed.get_rank() == 0:
            path = Path(output_dir, "config.json")
            content = json.loads(path.read_text())
            path.write_text(json.dumps(content | {"intermediate_size": content["intermediate_size"] + 1}))


def refused_save(directory):
    """Write into a file what each process raises that saves the smaller model of a sharded one, spoilt."""
    case = {"engine": "fsdp", "model": "bert", "arguments": {"max_steps": 6}}
    trainer = Spoiling(
        model=dense(),
        args=make_arguments(directory, case),
        train_dataset=bert_examples(48),
        pruning_config=[PruningConfig(**config) for config in CONFIGS["small"]],
    )
    trainer.train()
    try:
        trainer.save_model(str(directory / "saved"))
    except StructureError as error:
        (directory / f"{torch.distributed.get_rank()}.txt").write_text(str(error))
