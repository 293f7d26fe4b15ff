"""How weights are held and trained: by torch, FSDP2, DeepSpeed or several replicas, and by which optimizer.

The only wing that knows torch.distributed and DeepSpeed.
May import: errors, foreign, model.
"""
