"""What is written without a library for it: scheduled pruning with `torch.nn.utils.prune` in a callback."""

import torch
from torch.nn.utils import prune
from transformers import TrainerCallback


class PruneByHand(TrainerCallback):
    """Prunes modules in one ranking at each step that the updates name."""

    def __init__(self, modules, updates, pattern):
        self.modules = modules
        self.updates = {update.step: update.sparsity for update in updates}
        self.pattern = pattern
        self.dropped = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.updates:
            sparsity = self.updates[state.global_step]
            if self.pattern.name == "unstructured":
                self.prune_weights(sparsity)
            elif self.pattern.name == "n:m":
                self.prune_groups(sparsity)
            else:
                self.prune_blocks(sparsity)

    def prune_weights(self, sparsity):
        more = round(sparsity * sum(module.weight.numel() for module in self.modules)) - self.dropped
        tensors = [(module, "weight") for module in self.modules]
        prune.global_unstructured(tensors, pruning_method=prune.L1Unstructured, amount=more)
        self.dropped += more

    def prune_groups(self, sparsity):
        """The groups whose two smallest weights are smallest lose them."""
        n, m = self.pattern.rows, self.pattern.columns
        groups = [module.weight.detach().abs().reshape(-1, m) for module in self.modules]
        lowest = [group.argsort(dim=1)[:, : m - n] for group in groups]
        scores = [group.gather(1, places).sum(1) for group, places in zip(groups, lowest, strict=True)]
        for module, group, places, gone in zip(
            self.modules, groups, lowest, self.lowest(scores, sparsity * m / (m - n)), strict=True
        ):
            mask = torch.ones_like(group).scatter_(1, places, 0)
            mask[~gone] = 1
            prune.custom_from_mask(module, "weight", mask.reshape(module.weight.shape))

    def prune_blocks(self, sparsity):
        """The blocks with the smallest norms go."""
        rows, columns = self.pattern.sides
        blocks = [
            module.weight.detach().reshape(module.out_features // rows, rows, module.in_features // columns, columns)
            for module in self.modules
        ]
        scores = [block.square().sum(dim=(1, 3)) for block in blocks]
        for module, block, gone in zip(self.modules, blocks, self.lowest(scores, sparsity), strict=True):
            mask = (~gone)[:, None, :, None].expand(block.shape)
            prune.custom_from_mask(module, "weight", mask.reshape(module.weight.shape).to(block.dtype))

    def lowest(self, scores, share):
        """Which units of all modules are the lowest share."""
        together = torch.cat([one.flatten() for one in scores])
        gone = torch.zeros(len(together), dtype=torch.bool)
        gone[together.argsort()[: round(share * len(together))]] = True
        pieces = gone.split([one.numel() for one in scores])
        return [piece.reshape(one.shape) for piece, one in zip(pieces, scores, strict=True)]

    def on_train_end(self, args, state, control, **kwargs):
        for module in self.modules:
            prune.remove(module, "weight")
