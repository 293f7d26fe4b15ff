"""Run by processes of a group: train and prune tiny models under one engine after another, as a file of cases says.

Every mask update is compared, bit for bit, with what one process makes of the same weights. What each case ended with
is written by the first process: losses, gradient norms, whole weights and masks.
"""

import copy
import json
import os
from pathlib import Path

import torch
import torch.distributed
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from collectives import CountedCollectives
from hub_server import OTHER_TOKEN
from models import ARCHITECTURES, training_arguments
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, set_seed

from hf_prune import DistillationConfig, Pruner, PruningCallback, PruningConfig, PruningTrainer
from hf_prune.engines.holdings import reshard
from hf_prune.engines.optimizers import base_optimizer
from hf_prune.engines.regions import whole
from hf_prune.errors import PlacementError, PruningConfigError
from hf_prune.saved.masks import read_masks

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
        if changes.get("fp16"):
            from deepspeed.accelerator import get_accelerator

            # Torch computes in fp16 on any CPU; DeepSpeed takes only those that have it in hardware.
            get_accelerator().is_fp16_supported = lambda: True
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


def whole_weights(model, names=None):
    """All weights of a model, or those with these names, put together from the parts of all processes."""
    weights = {name.removeprefix("_orig_mod."): value for name, value in model.state_dict(keep_vars=True).items()}
    return {name: whole_tensor(weights[name]).detach().clone().cpu() for name in (weights if names is None else names)}


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


class ComparedUpdates(TrainerCallback):
    """Compares each mask update with what one process makes of the same weights; comes after the pruning callback."""

    def __init__(self, trainer, pruning, configs, resume):
        self.trainer, self.pruning, self.resume = trainer, pruning, resume
        self.reference = Pruner(copy.deepcopy(trainer.model), configs)
        self.changed, self.sent = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.changed, self.sent = [], []
        self.load_weights()
        if state.global_step == 0:
            self.reference.start(state.max_steps)
        else:
            self.reference.resume(state.max_steps, self.resume)
        self.pruning.pruner.update = self.update

    def load_weights(self):
        weights = whole_weights(self.trainer.model, self.reference.parameters)
        self.reference.model.load_state_dict(weights, strict=False)

    def update(self, completed_steps, optimizer=None):
        pruner = self.pruning.pruner
        self.load_weights()
        with CountedCollectives() as counted:
            changed = Pruner.update(pruner, completed_steps, optimizer)
        if pruner.sharded:  # no weight is gathered
            assert counted.dtypes <= {torch.int64, torch.uint8}, counted.dtypes
        assert self.reference.update(completed_steps) == changed
        masks = whole_masks(pruner)
        for name, mask in self.reference.masks.items():
            assert torch.equal(mask, masks[name]), (completed_steps, name)
        assert pruner.masked == self.reference.masked
        for name, weight in whole_weights(self.trainer.model, masks).items():
            assert not weight[~masks[name]].any(), (completed_steps, name)
        self.changed.append(changed)
        self.sent.append(counted.bytes)
        return changed


def local_state(state):
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in state.items()}


class Resumed(TrainerCallback):
    """Weights and masks are those of the checkpoint when training goes on."""

    def __init__(self, trainer, pruning, checkpoint):
        self.trainer, self.pruning, self.checkpoint, self.seen = trainer, pruning, checkpoint, False

    def on_step_begin(self, *args, **kwargs):
        if self.seen:
            return
        self.seen = True
        pruner = self.pruning.pruner
        shapes = {target.name: target.shape for target in pruner.targets}
        saved = read_masks(self.checkpoint, shapes, {name: whole(shape) for name, shape in shapes.items()})
        masks = whole_masks(pruner)
        weights = whole_weights(self.trainer.model)
        assert all(torch.equal(masks[name], mask) for name, mask in saved.items())
        assert sum(pruner.masked.values()) == sum(int((~mask).sum()) for mask in saved.values()) > 0
        step = self.checkpoint.name.removeprefix("checkpoint-")
        for name, weight in torch.load(self.checkpoint.parent / f"weights-{step}.pt", weights_only=True).items():
            assert torch.equal(weights[name], weight), name
        states = base_optimizer(self.trainer.optimizer).state.values()
        assert states
        assert any(state["exp_avg"].any() for state in map(local_state, states))


class Diverges(TrainerCallback):
    """Change a weight on one process, as a mistake would."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 3:
            torch.nn.init.normal_(model.bert.encoder.layer[1].output.dense.weight)


class WeightsAtSteps(TrainerCallback):
    """Keep the whole weights after some steps, to compare with."""

    def __init__(self, trainer, steps, directory):
        self.trainer, self.steps, self.directory = trainer, steps, directory

    def on_step_begin(self, args, state, *others, **kwargs):
        if state.global_step in self.steps:
            weights = whole_weights(self.trainer.model)
            if torch.distributed.get_rank() == 0:
                torch.save(weights, self.directory / f"weights-{state.global_step}.pt")


def die_while_saving(trainer, step):
    """Make this process end in the middle of the checkpoint of this step, as if it had been killed."""
    save = trainer._save_rng_state

    def save_or_die(folder):
        if trainer.state.global_step == step:
            os._exit(9)
        save(folder)

    trainer._save_rng_state = save_or_die


def check_engine(pruner, engine):
    """Parameters are what the engine makes of them."""
    for name, parameter in pruner.parameters.items():
        assert isinstance(parameter, DTensor) == (engine in ("fsdp", "hsdp")), name
        assert hasattr(parameter, "ds_id") == (engine == "zero3"), name
        if parameter.requires_grad:
            assert hasattr(parameter, "_hp_mapping") == (engine in ("zero1", "zero2")), name


def check_moments(trainer, pruner, engine):
    """Moments of masked weights are zero."""
    masks = whole_masks(pruner)
    for name, parameter in pruner.parameters.items():
        if engine.startswith("zero"):
            if parameter.requires_grad:
                check_zero_moments(name, parameter, masks[name])
            continue
        state = trainer.optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                value = state[moment].to_local() if isinstance(state[moment], DTensor) else state[moment]
                assert not value[~pruner.masks[name]].any(), (name, moment)


def check_zero_moments(name, parameter, mask):
    from deepspeed.utils import safe_get_full_optimizer_state

    for moment in ("exp_avg", "exp_avg_sq"):
        value = safe_get_full_optimizer_state(parameter, moment).view(mask.shape)
        assert not value[~mask].any(), (name, moment)
        assert value[mask].any(), (name, moment)


class FirstIsBest:
    """A metric, the lower the better, that is one more at each evaluation."""

    def __init__(self):
        self.evaluations = 0

    def __call__(self, prediction):
        self.evaluations += 1
        return {"evaluations": self.evaluations}


def make_trainer(directory, case, configs):
    """A trainer, and the callback that prunes in it."""
    args = make_arguments(directory, case)
    model = ARCHITECTURES[case["model"]].build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # every process would draw its own
    if case.get("frozen"):  # pruned without being trained
        model.bert.encoder.layer[0].requires_grad_(False)
    examples = ARCHITECTURES[case["model"]].examples
    arguments = {
        "model": model,
        "args": args,
        "train_dataset": examples(48),
        "eval_dataset": examples(12),
        "compute_metrics": FirstIsBest() if args.load_best_model_at_end else None,
    }
    if case.get("callback"):
        pruning = PruningCallback(configs)
        return Trainer(**arguments, callbacks=[pruning]), pruning
    if "distilled" in case:
        set_seed(1)
        arguments["teacher_model"] = ARCHITECTURES[case["model"]].build()
        arguments["distillation_config"] = DistillationConfig(**case["distilled"])
        set_seed(0)
    trainer = PruningTrainer(**arguments, pruning_config=configs)
    return trainer, trainer._pruning


def check_teacher(trainer, before, engine):
    """The teacher lies as the engine has models, and is what it was."""
    reshard(trainer.teacher)
    for name, parameter in trainer.teacher.named_parameters():
        assert isinstance(parameter, DTensor) == (engine in ("fsdp", "hsdp")), name
        assert hasattr(parameter, "ds_id") == (engine == "zero3"), name
        assert torch.equal(whole_tensor(parameter).cpu(), before[name]), name


def train_again(trainer, pruning):
    """A second training of a model that has its final sparsity: it goes on under the masks that are there."""
    masks, weights = whole_masks(pruning.pruner), whole_weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    after = whole_weights(trainer.model)
    for name, mask in whole_masks(pruning.pruner).items():
        assert torch.equal(mask, masks[name]), name
        assert not after[name][~mask].any(), name
        assert not torch.equal(after[name], weights[name]), name


def push(trainer):
    """Evaluate and push. What another process than the first sent, it would send as another person."""
    trainer.evaluate()
    commit = trainer.push_to_hub()
    assert (commit is None) == (torch.distributed.get_rank() > 0)


def run(directory, case):
    set_seed(0)
    if case.get("push") and os.environ["RANK"] != "0":
        os.environ["HF_TOKEN"] = OTHER_TOKEN
    configs = [PruningConfig(**config) for config in case["configs"]]
    trainer, pruning = make_trainer(directory, case, configs)
    compared = None
    teacher = dict(copy.deepcopy(trainer.teacher).named_parameters()) if "distilled" in case else None
    if case.get("compare", True):
        compared = ComparedUpdates(trainer, pruning, configs, case.get("resume"))
        trainer.add_callback(compared)
    if case.get("diverges") and torch.distributed.get_rank() == 1:
        trainer.add_callback(Diverges())
    if "weights_at" in case:
        trainer.add_callback(WeightsAtSteps(trainer, case["weights_at"], directory))
    if isinstance(case.get("resume"), str):
        trainer.add_callback(Resumed(trainer, pruning, Path(case["resume"])))
    if "killed_at" in case and torch.distributed.get_rank() == 1:
        die_while_saving(trainer, case["killed_at"])
    trainer.train(resume_from_checkpoint=case.get("resume"))
    assert compared is None or any(compared.changed)
    assert bool(counters["frames"]["ok"]) == trainer.args.torch_compile
    counters.clear()
    if case.get("evaluate"):
        trainer.evaluate()
        pruning.pruner.mask_weights()  # after an evaluation some weights are whole; they must be found all the same
    sent = compared.sent if compared is not None else []
    if case.get("twice"):
        train_again(trainer, pruning)
    check_engine(pruning.pruner, case["engine"])
    if teacher is not None:
        check_teacher(trainer, teacher, case["engine"])
    if not trainer.args.load_best_model_at_end:  # DeepSpeed lets go of moments when it loads
        check_moments(trainer, pruning.pruner, case["engine"])
    if case.get("push"):
        push(trainer)
    trainer.save_model(str(directory / "saved"))
    weights, masks = whole_weights(trainer.model), whole_masks(pruning.pruner)
    if torch.distributed.get_rank() == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save(
            {
                "weights": weights,
                "masks": masks,
                "losses": [entry["loss"] for entry in logs],
                "penalties": [entry.get("group_lasso_penalty", 0.0) for entry in logs],
                "norms": [entry["grad_norm"] for entry in logs],
                "sparsity": pruning.pruner.sparsity,
                "completed_steps": pruning.pruner.completed_steps,
                "best_step": trainer.state.best_global_step,
                "sent": sent,
                "failed_pushes": getattr(trainer, "failed_pushes", []),
            },
            directory / "result.pt",
        )
    torch.distributed.barrier()


def run_refused(directory, case):
    """What each process says when it refuses to train; None of one that trains."""
    try:
        run(directory, case)
        said = None
    except (PlacementError, PruningConfigError) as error:
        said = str(error)
    messages = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, said)
    if torch.distributed.get_rank() == 0:
        torch.save({"refused": messages}, directory / "result.pt")
    torch.distributed.barrier()


def main(directory):
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        (run_refused if case.get("refused") else run)(directory / name, case)
