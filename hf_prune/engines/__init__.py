"""How weights are held and trained: by torch, DDP, FSDP2 or DeepSpeed; and what optimizers keep for each weight.

The only wing that knows torch.distributed and DeepSpeed.
May import: errors, foreign, model.
"""
