"""What `workers.py` runs on every process at once."""

import math
from fractions import Fraction

import torch
import torch.distributed
from collectives import CountedCollectives
from models import ARCHITECTURES, bert, mixtral
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hf_prune import Pruner, PruningConfig, PruningConfigError, PruningStateError
from hf_prune.engines.holdings import Holding, holding_of
from hf_prune.engines.processes import all_reduce, raised_by_all
from hf_prune.errors import CheckpointError, HfPruneError, PlacementError
from hf_prune.masking.agreement import compare_replicas
from hf_prune.masking.groups import make_groups
from hf_prune.masking.ranking import LocalTensor, update_masks
from hf_prune.masking.selection import alone
from hf_prune.methods.scopes import SCOPES, Prunable
from hf_prune.model.layouts import Target
from hf_prune.trainer.claims import claimed


def masks_of_parts(config, targets, sparsities, parts, sharded=True):
    """The masks of this process's parts after updates to these sparsities.

    `parts` has (weights, mask, region, counted, peers) of each target; a part's weights and mask are flat.
    """
    groups = make_groups(0, PruningConfig(**config), [Target(*target) for target in targets])
    add = all_reduce if sharded else alone
    masks = {name: mask.clone() for name, (_, mask, *_) in parts.items()}
    for sparsity in sparsities:
        here = [int((~masks[name]).sum()) * counted for name, (_, _, _, counted, _) in parts.items()]
        masked = dict(zip(parts, add(torch.tensor(here)).tolist(), strict=True))
        held = {
            target.name: LocalTensor(
                target=target,
                holding=Holding(parts[target.name][2], sharded, parts[target.name][3], parts[target.name][4], "part"),
                weight=parts[target.name][0],
                mask=masks[target.name],
                masked=masked[target.name],
                counted=parts[target.name][3],
            )
            for group in groups
            for target in group.members
        }

        def pools_of(place, gone, sparsity=sparsity, held=held):
            group = groups[place]
            prunable = [
                Prunable(group.units_of(target), count, target.sides)
                for target, count in zip(group.members, gone, strict=True)
            ]
            return SCOPES[group.scope].pools(prunable, Fraction(str(sparsity)))

        for change in update_masks(groups, held, pools_of, add):
            assert change.positions is None or not masks[change.target.name][change.positions].any()
    return masks


def sent_in_updates(config, shape, tensors, mesh_shape):
    """What a process hands to collectives in the two updates of a pruner: calls, bytes, and the dtypes.

    Tensors are cut by rows over the last dimension of the mesh, and copied over the others.
    """
    mesh = init_device_mesh("cpu", mesh_shape)
    torch.manual_seed(0)
    model = nn.Module()
    for index in range(tensors):
        weight = torch.randn(shape).bfloat16()  # with many ties
        placements = [Replicate()] * (len(mesh_shape) - 1) + [Shard(0)]
        model.register_parameter(f"w{index}", nn.Parameter(distribute_tensor(weight, mesh, placements)))
    window = {"initial_sparsity": 0.1, "sparsity": 0.5, "begin": 1, "end": 2, "frequency": 1}
    pruner = Pruner(model, PruningConfig(targets=["w[0-9]+"], **window, **config), total_steps=10)
    with CountedCollectives() as counted:
        assert pruner.update(1)
        assert pruner.update(2)
    assert pruner.sparsity == 0.5
    return counted.calls, counted.bytes, counted.dtypes


def held_of_dtensor(shape, mesh_shape, placements):
    """What this process holds of a tensor of its own indices, and where `holding_of` says it lies."""
    mesh = init_device_mesh("cpu", mesh_shape)
    places = [Shard(place) if isinstance(place, int) else Replicate() for place in placements]
    indices = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    holding = holding_of("w", sharded := distribute_tensor(indices, mesh, places))
    return sharded.to_local().reshape(-1), holding


def held_of_fsdp_over_tensor_parallelism(shape, mesh_shape, dim):
    """The same, where tensor parallelism shards a dimension and FSDP2 then the first one."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("data", "model"))
    linear = nn.Linear(shape[1], shape[0], bias=False)
    indices = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    linear.weight = nn.Parameter(distribute_tensor(indices, mesh["model"], [Shard(dim)]))
    fully_shard(linear, mesh=mesh["data"])
    return linear.weight.to_local().detach().reshape(-1), holding_of("w", linear.weight)


def zeros_of_sharded_experts(placement):
    """What a sharded pruner masks of a tensor of experts, one of which is wholly zero and one in part."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    torch.manual_seed(0)
    model = mixtral()
    for name, weight in model.named_parameters():
        if name.endswith("mlp.experts.down_proj"):
            weight.data[1] = 0
            weight.data[2, 0] = 0
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim == 3:
                module.register_parameter(name, nn.Parameter(distribute_tensor(weight, mesh, [Shard(placement)])))
    pruner = Pruner(model, PruningConfig(sparsity=0.5, begin=2, end=4), 10)
    masks = {name: mask.count_nonzero().item() for name, mask in pruner.masks.items() if "down_proj" in name}
    return {name: count for name, count in pruner.masked.items() if "down_proj" in name}, masks


def refusal_of_a_partial_tensor():
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    partial = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    try:
        holding_of("layers.0.weight", partial)
    except PlacementError as error:
        return str(error)
    return None


def refusal_of_different_masks(masks):
    """What is said where processes that hold the same tensors come to these masks; None if nothing is."""
    holdings = {name: holding_of(name, mask) for name, mask in masks.items()}
    with CountedCollectives() as counted:
        try:
            compare_replicas(masks, holdings)
            said = None
        except PruningStateError as error:
            said = str(error)
    return said, (counted.calls, counted.bytes)


def refusal_of_a_different_mask_beside_a_sharded_one(mask):
    """The same, where each process also holds a part of another tensor, which is nobody else's."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    sharded = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)])
    holdings = {"sharded": holding_of("sharded", sharded), "whole": holding_of("whole", mask)}
    try:
        compare_replicas({"sharded": sharded.to_local().bool(), "whole": mask}, holdings)
    except PruningStateError as error:
        return str(error)
    return None


def save_shards(folder):
    """Save the masks of a sharded model, and load them again; the sparsity."""
    torch.manual_seed(0)
    model = bert()
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    pruner = Pruner(model, PruningConfig(sparsity=0.5, schedule="one_shot", begin=0), 10)
    pruner.save(folder)
    pruner.load(folder)
    return pruner.sparsity


def refusal_of_a_claim(folder):
    """What this process is told when it may not train into a folder."""
    try:
        with claimed(folder, writes=torch.distributed.get_rank() == 0):
            return None
    except CheckpointError as error:
        return str(error)


def update_with_nan(config, bad_rank):
    """A sharded pruner of which one process has a weight that is NaN: what each says, and whether masks changed."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)]))
    pruner = Pruner(model, PruningConfig(**config), total_steps=10)
    if torch.distributed.get_rank() == bad_rank:
        model.weight.to_local().detach()[0, 0] = math.nan
    try:
        pruner.update(1)
    except PruningStateError as error:
        return str(error), bool(pruner.masks["weight"].all())
    return None, bool(pruner.masks["weight"].all())


def _halving_and_solving():
    return PruningConfig(
        structure="neurons",
        method="wanda",
        sparsity=0.5,
        schedule="one_shot",
        begin=1,
        reconstruction="least_squares",
    )


def refusal_of_solving_shards():
    model = bert()
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    try:
        Pruner(model, _halving_and_solving(), total_steps=2)
    except PruningConfigError as error:
        return str(error)
    return None


def refusal_of_a_solver_of_shards():
    model = bert()
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    try:
        Pruner(model, PruningConfig(method="sparsegpt", sparsity=0.5), total_steps=2)
    except PruningConfigError as error:
        return str(error)
    return None


def pruned_by_a_solver(batches, method):
    """The weights and masks of a BERT that a solver pruned, after forward passes with these token ids."""
    torch.manual_seed(0)
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    pruner = Pruner(model, PruningConfig(method=method, sparsity=0.5, schedule="one_shot", begin=1), total_steps=1)
    for ids in batches:
        model(input_ids=ids)
    pruner.step()
    return {name: value.clone() for name, value in model.state_dict().items()}, pruner.masks


def allotted_from(batches, scope, pattern="unstructured", sharded=False):
    """How many weights of each tensor a scope lets a pruner mask, after steps with the gradients of these batches.

    Each process passes its own; the second update comes after a step that is not read.
    """
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"].build().train()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    config = PruningConfig(scope=scope, pattern=pattern, sparsity=0.6, begin=1, end=2, frequency=1)
    pruner = Pruner(model, config, total_steps=2)
    for _ in range(2):
        for batch in batches:
            model(**batch).loss.backward()
        pruner.step()
    return pruner.masked


def shared_from(batches, steps, sharded=False):
    """The codebooks when weights begin to share values and after steps with these batches, and the local values."""
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"].build().train()
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    config = PruningConfig(sparsity=0.6, schedule="one_shot", begin=0, shared_values=4)
    pruner = Pruner(model, config, total_steps=steps)
    first = dict(pruner.codebooks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        for batch in batches:
            model(**batch).loss.backward()
        if torch.distributed.is_initialized() and not sharded:
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    pruner.hold_zeros()
    local = {name: pruner._engine.part(one).unique() for name, one in pruner.parameters.items()}
    return first, dict(pruner.codebooks), local, pruner.masked


def shared_in_groups(fields, sharded=False):
    """This process's shards of weights that share the values of groups, when they begin to and after a step."""
    torch.manual_seed(0)
    model = bert()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    pruner = Pruner(model, PruningConfig(sparsity=0.5, schedule="one_shot", begin=0, **fields), total_steps=10)
    parts = [{name: pruner._engine.part(one).clone() for name, one in pruner.parameters.items()}]
    for parameter in pruner.parameters.values():
        pruner._engine.part(parameter).pow_(3)
    pruner.after_optimizer_step()
    parts.append({name: pruner._engine.part(one).clone() for name, one in pruner.parameters.items()})
    return parts


def refusal_of_cut_groups():
    """What each process says of rows of which it has some columns."""
    model = nn.Module()
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model.weight = nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(1)]))
    config = PruningConfig(targets=["weight"], sparsity=0.5, shared_values=4, shared_values_granularity="row")
    try:
        Pruner(model, config)
    except PruningConfigError as error:
        return str(error)
    return None


def refusal_of_broken_shards(bad_rank):
    """What each process says of shared weights that are not finite on one of them."""
    model = nn.Module()
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model.weight = nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)]))
    config = PruningConfig(targets=["weight"], sparsity=0.5, schedule="one_shot", begin=0, shared_values=4)
    pruner = Pruner(model, config, total_steps=10)
    if torch.distributed.get_rank() == bad_rank:
        part = model.weight.to_local().detach()
        part[pruner.masks["weight"]] = math.inf
    try:
        pruner.after_optimizer_step()
    except PruningStateError as error:
        return str(error)
    return None


def saved_and_resumed_sharing(folder):
    """Residuals and codebooks of this process's shards: while training, and resumed from what all have saved."""
    torch.manual_seed(0)
    model = bert()
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    config = PruningConfig(sparsity=0.5, schedule="one_shot", begin=0, shared_values=4)
    pruner = Pruner(model, config, total_steps=10)
    for parameter in pruner.parameters.values():
        parameter.to_local().detach().mul_(1.01)
    pruner.after_optimizer_step()
    residuals, codebooks = dict(pruner._sharing._residuals), dict(pruner.codebooks)
    pruner.save(folder)
    again = Pruner(model, config)
    again.resume(10, folder)
    same = [torch.equal(again.codebooks[name], codebook) for name, codebook in codebooks.items()]
    same += [torch.equal(again._sharing._residuals[name].view_as(one), one) for name, one in residuals.items()]
    return same, any(bool(one.any()) for one in residuals.values())


def solved_from(batches):
    """Weights of a BERT half of whose neurons were removed, after forward passes with these token ids."""
    torch.manual_seed(0)
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    pruner = Pruner(model, _halving_and_solving(), total_steps=2)
    for ids in batches:
        model(input_ids=ids)
    pruner.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def raised_by_one(rank, kind):
    """What this process raises if the one of this rank raises an error of a kind: its class and text."""
    try:
        with raised_by_all():
            if torch.distributed.get_rank() == rank and kind == "ValueError":
                raise ValueError("too wide")
            if torch.distributed.get_rank() == rank and kind:
                raise PruningConfigError("sparsity", "expected ü, got 2", at="here")
    except (ValueError, HfPruneError) as error:
        return type(error).__name__, str(error)
    return None


def failing_search():
    """What a search raises whose model fails on the first process."""

    def fail(module, arguments):
        raise OSError("no more room")

    model = bert()
    if torch.distributed.get_rank() == 0:
        model.register_forward_pre_hook(fail)
    try:
        config = PruningConfig(target_parameters=0.5)
        Pruner(model, config, total_steps=2, example=ARCHITECTURES["bert"].batch())
    except (OSError, HfPruneError) as error:
        return type(error).__name__, str(error)
    return None
