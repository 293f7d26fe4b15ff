"""What `workers.py` runs on every process at once."""

from torch import nn

from hf_prune import Pruner


class Tensors(nn.Module):
    """Parameters of these names."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


class Parts(Pruner):
    """A pruner of tensors of which this process holds any parts, whatever shards them: `parts` are their regions."""

    def __init__(self, shapes, parts, weights, layouts, config, total_steps): ...
