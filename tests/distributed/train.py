"""Run by torchrun: train and prune tiny models under one engine after another, as a file of cases says.

Every mask update is compared, bit for bit, with what one process makes of the same weights. What each case ended with
is written by the first process: losses, gradient norms, whole weights and masks.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from models import ARCHITECTURES, training_arguments
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, set_seed

from hf_prune import Pruner, PruningConfig, PruningTrainer
from hf_prune.mask_files import read_masks
from hf_prune.optimizers import base_optimizer
from hf_prune.regions import whole

LAYERS = {"bert": "BertLayer", "llama": "LlamaDecoderLayer", "mixtral": "MixtralDecoderLayer", "gpt2": "GPT2Block"}


def make_arguments(directory, case):
    changes = dict(case.get("arguments", {}))
    engine = case["engine"]
    if case["model"] == "bert":
        # Or the Trainer multiplies the loss by the number of processes, for a model that does not divide by tokens.
        changes["average_tokens_across_devices"] = False
    if engine in ("fsdp", "hsdp"):
        changes["fsdp"] = True
        changes["fsdp_config"] = {
            "state_dict_type": case.get("state_dict", "FULL_STATE_DICT"),
            "transformer_layer_cls_to_wrap": [LAYERS[case["model"]]],
        }
    if engine.startswith("zero"):
        changes["optim"] = "adamw_torch"
        changes["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": changes.get("bf16", False)},
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": int(engine[-1]),
                "stage3_gather_16bit_weights_on_model_save": True,
                "stage3_param_persistence_threshold": 100,
            }
            | case.get("zero", {}),
        } | case.get("deepspeed", {})
    if engine == "hsdp":
        changes["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    AcceleratorState._reset_state()
    args = training_arguments(directory, **changes)
    if engine in ("fsdp", "hsdp"):
        # On a CPU accelerate makes DDP of FSDP without a word: it is told of an accelerator, once gloo has been chosen.
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    return args


def whole_tensor(tensor):
    """All of a parameter as it is trained: under ZeRO that is its master weight."""
    if tensor.requires_grad and (hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    if hasattr(tensor, "ds_id"):  # frozen
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model):
    weights = model.state_dict(keep_vars=True)
    weights = {name: whole_tensor(value).detach().clone().cpu() for name, value in weights.items()}
    return {name.removeprefix("_orig_mod."): value for name, value in weights.items()}  # of a compiled model


def whole_masks(pruner):
    """The masks put together from the parts of all processes."""
    parts = [None] * torch.distributed.get_world_size()
    here = {name: (pruner._masks.regions[name], mask) for name, mask in pruner.masks.items()}
    torch.distributed.all_gather_object(parts, here)
    masks = {}
    for target in pruner.targets:
        whole = torch.zeros(target.shape, dtype=torch.bool)
        for part in parts:
            region, mask = part[target.name]
            box = tuple(slice(start, start + size) for start, size in zip(region.start, region.size, strict=True))
            whole.view(region.shape)[box] = mask.cpu()
        masks[target.name] = whole
    return masks


def compare_every_update(trainer, config, resume):
    """Make each mask update tell the weights before it and the masks after it, to one process that prunes the same."""
    reference = Pruner(copy.deepcopy(trainer.model), config)
    update = trainer.pruner.update
    compared = []

    def compared_update(completed_steps, optimizer=None):
        if not compared:
            reference.model.load_state_dict(whole_weights(trainer.model))
            if resume is None:
                reference.start(trainer.state.max_steps)
            else:
                reference.resume(trainer.state.max_steps, resume)
        weights = whole_weights(trainer.model)
        changed = update(completed_steps, optimizer)
        reference.model.load_state_dict(weights)
        assert reference.update(completed_steps) == changed
        masks = whole_masks(trainer.pruner)
        for name, mask in reference.masks.items():
            assert torch.equal(mask, masks[name]), (completed_steps, name)
        assert trainer.pruner.masked == reference.masked
        after = whole_weights(trainer.model)
        assert all(not after[name][~mask].any() for name, mask in masks.items())
        compared.append(changed)
        return changed

    trainer.pruner.update = compared_update
    return compared


def local_state(state):
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in state.items()}


class Resumed(TrainerCallback):
    """Weights and masks are those of the checkpoint when training goes on."""

    def __init__(self, trainer, checkpoint):
        self.trainer, self.checkpoint, self.seen = trainer, checkpoint, False

    def on_step_begin(self, *args, **kwargs):
        if self.seen:
            return
        self.seen = True
        pruner = self.trainer.pruner
        shapes = {target.name: target.shape for target in pruner.targets}
        saved = read_masks(self.checkpoint, shapes, {name: whole(shape) for name, shape in shapes.items()})
        masks = whole_masks(pruner)
        weights = whole_weights(self.trainer.model)
        assert all(torch.equal(masks[name], mask) for name, mask in saved.items())
        assert sum(pruner.masked.values()) == sum(int((~mask).sum()) for mask in saved.values()) > 0
        for name, weight in torch.load(self.checkpoint.parent / "weights.pt", weights_only=True).items():
            assert torch.equal(weights[name], weight), name
        states = base_optimizer(self.trainer.optimizer).state.values()
        assert states
        assert any(state["exp_avg"].any() for state in map(local_state, states))


class Diverges(TrainerCallback):
    """Change a weight on one process, as a mistake would."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 3:
            torch.nn.init.normal_(model.bert.encoder.layer[1].output.dense.weight)


class WeightsAtStep(TrainerCallback):
    """Keep the whole weights after a step, to compare with."""

    def __init__(self, trainer, step, path):
        self.trainer, self.step, self.path = trainer, step, path

    def on_step_begin(self, args, state, *others, **kwargs):
        if state.global_step == self.step:
            weights = whole_weights(self.trainer.model)
            if torch.distributed.get_rank() == 0:
                torch.save(weights, self.path)


def die_while_saving(trainer, step):
    """Make this process end in the middle of the checkpoint of this step, as if it had been killed."""
    save = trainer._save_rng_state

    def save_or_die(folder):
        if trainer.state.global_step == step:
            os._exit(9)
        save(folder)

    trainer._save_rng_state = save_or_die


def check_state(trainer, engine):
    """Parameters are what the engine makes of them, and moments of masked weights are zero."""
    for name, parameter in trainer.pruner.parameters.items():
        assert isinstance(parameter, DTensor) == (engine in ("fsdp", "hsdp")), name
        assert hasattr(parameter, "ds_id") == (engine == "zero3"), name
        if engine.startswith("zero"):
            if parameter.requires_grad:
                check_zero_state(trainer, name, parameter)
            continue
        state = trainer.optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                value = state[moment].to_local() if isinstance(state[moment], DTensor) else state[moment]
                assert not value[~trainer.pruner.masks[name]].any(), (name, moment)


def check_zero_state(trainer, name, parameter):
    from deepspeed.utils import safe_get_full_optimizer_state

    mask = whole_masks(trainer.pruner)[name]
    for moment in ("exp_avg", "exp_avg_sq"):
        value = safe_get_full_optimizer_state(parameter, moment).view(mask.shape)
        assert not value[~mask].any(), (name, moment)
        assert value[mask].any(), (name, moment)


def run(directory, case):
    set_seed(0)
    args = make_arguments(directory, case)
    model = ARCHITECTURES[case["model"]].build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # every process would draw its own
    if case.get("frozen"):  # pruned without being trained
        model.bert.encoder.layer[0].requires_grad_(False)
    examples = ARCHITECTURES[case["model"]].examples
    configs = [PruningConfig(**config) for config in case["configs"]]
    trainer = PruningTrainer(
        model=model, args=args, train_dataset=examples(48), eval_dataset=examples(12), pruning_config=configs
    )
    compared = compare_every_update(trainer, configs, case.get("resume")) if case.get("compare", True) else [True]
    if case.get("diverges") and torch.distributed.get_rank() == 1:
        trainer.add_callback(Diverges())
    if "weights_at" in case:
        trainer.add_callback(WeightsAtStep(trainer, case["weights_at"], directory / "weights.pt"))
    if isinstance(case.get("resume"), str):
        trainer.add_callback(Resumed(trainer, Path(case["resume"])))
    if "killed_at" in case and torch.distributed.get_rank() == 1:
        die_while_saving(trainer, case["killed_at"])
    trainer.train(resume_from_checkpoint=case.get("resume"))
    if case.get("evaluate"):
        trainer.evaluate()
        trainer.pruner.mask_weights()  # after an evaluation some weights are whole; they must be found all the same
    assert any(compared)
    check_state(trainer, case["engine"])
    trainer.save_model(str(directory / "saved"))
    weights, masks = whole_weights(trainer.model), whole_masks(trainer.pruner)
    if torch.distributed.get_rank() == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save(
            {
                "weights": weights,
                "masks": masks,
                "losses": [entry["loss"] for entry in logs],
                "norms": [entry["grad_norm"] for entry in logs],
                "sparsity": trainer.pruner.sparsity,
                "completed_steps": trainer.pruner.completed_steps,
            },
            directory / "result.pt",
        )
    torch.distributed.barrier()


def main(directory):
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        run(directory / name, case)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as train_replicated.py, and for its reason
