"""What a process hands to collectives, whoever calls them: every one passes through torch's dispatcher."""

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Where the tensors that are sent are among a collective's arguments.
_SENT = {"allreduce_": 0, "allgather_": 1, "_allgather_base_": 1, "alltoall_base_": 1}


class CountedCollectives(TorchDispatchMode):
    """Within the `with` block: how many collectives were called, and what this process handed to them."""

    def __init__(self):
        super().__init__()
        self.calls = self.bytes = 0
        self.dtypes = set()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if DTensor in types:
            return NotImplemented  # it comes again with the parts
        if operator.namespace == "c10d":
            sent = arguments[_SENT[operator._schema.name.split("::")[1]]]
            sent = [sent] if torch.is_tensor(sent) else sent
            self.calls += 1
            self.bytes += sum(tensor.nbytes for tensor in sent)
            self.dtypes |= {tensor.dtype for tensor in sent}
        assert operator.namespace != "_c10d_functional", operator
        return operator(*arguments, **(options or {}))
