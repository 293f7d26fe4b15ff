"""Run by accelerate launch: `hf-prune` with the arguments that follow, its models sharded by FSDP2 on CPUs.

On a CPU accelerate makes DDP of FSDP without a word: it is told of an accelerator, once gloo has been chosen.
"""

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from hf_prune.cli.commands import main
from hf_prune.recipe.schema import Recipe

training_arguments = Recipe.training_arguments


def training_arguments_with_accelerator(self, dense=False, **changes):
    args = training_arguments(self, dense, **changes)
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    return args


if __name__ == "__main__":
    Recipe.training_arguments = training_arguments_with_accelerator
    main()
