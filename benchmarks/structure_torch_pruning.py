"""Prune a BERT classifier at once with Torch-Pruning.

python benchmarks/structure_torch_pruning.py --neurons 0.75 --heads 0.5 --dense FOLDER --batches FILE --output FOLDER

`structure_rival.py` runs this in an environment without hf-prune. It does what Torch-Pruning's own examples for
transformers do: `GroupTaylorImportance` with its defaults, which they recommend; gradients added up over ten training
batches in evaluation mode; whole heads are removed (`prune_num_heads`), and the attributes of the attention are set
afterwards.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.bert.modeling_bert import BertSelfAttention

Batch = dict[str, torch.Tensor]


def read_batches(path: Path) -> list[Batch]:
    """The batches of a file whose tensors are named `INDEX.NAME`."""
    batches: dict[int, Batch] = {}
    for key, tensor in load_file(path).items():
        index, _, name = key.partition(".")
        batches.setdefault(int(index), {})[name] = tensor
    return [batches[index] for index in sorted(batches)]


def without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def add_gradients(model: PreTrainedModel, batches: list[Batch]) -> None:
    """Add up the gradients of a model in evaluation mode over batches."""
    model.eval().zero_grad()
    for batch in batches:
        model(**batch).loss.backward()


def make_pruner(model: PreTrainedModel, example: Batch, neurons: float, heads: float, hidden: bool) -> Any:
    """The pruner of a model, which removes these shares of neurons and heads.

    They are ranked over all layers, neurons and heads each by themselves (`isomorphic`), and the hidden states keep
    their width. With `hidden`, the share of neurons is removed from the hidden states too, and the same shares in each
    layer: the configuration of BERT has no layer with more heads than fit into the hidden states.
    """
    num_heads = {
        linear: attention.num_attention_heads
        for attention in model.modules()
        if isinstance(attention, BertSelfAttention)
        for linear in (attention.query, attention.key, attention.value)
    }
    kept: list[nn.Module] = [model.classifier]
    if not hidden:
        kept += [model.bert.embeddings, model.bert.pooler]
        for layer in model.bert.encoder.layer:
            kept += [layer.attention.output.dense, layer.output.dense]
    return torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=not hidden,
        isomorphic=not hidden,
        pruning_ratio=neurons,
        head_pruning_ratio=heads,
        num_heads=num_heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=kept,
        output_transform=lambda outputs: outputs.logits.sum(),
    )


def prune(model: PreTrainedModel, pruner: Any) -> None:
    """Prune a model that has gradients, in place."""
    for group in pruner.step(interactive=True):
        group.prune()
    for attention in model.modules():
        if isinstance(attention, BertSelfAttention):
            attention.num_attention_heads = attention.query.out_features // attention.attention_head_size
            attention.all_head_size = attention.query.out_features


def widths_of(model: PreTrainedModel) -> dict[str, Any]:
    """The widths of a model, read from its modules: hidden states, one head, and neurons and heads of each layer."""
    layers = model.bert.encoder.layer
    return {
        "hidden": model.bert.embeddings.word_embeddings.embedding_dim,
        "head_size": layers[0].attention.self.attention_head_size,
        "neurons": [layer.intermediate.dense.out_features for layer in layers],
        "heads": [layer.attention.self.num_attention_heads for layer in layers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=float, required=True, help="share of them to remove")
    parser.add_argument("--heads", type=float, required=True, help="share of them to remove")
    parser.add_argument("--hidden", action="store_true", help="remove the share of neurons from the hidden states too")
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--batches", type=Path, required=True, help="safetensors file of training batches")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, widths and answers")
    options = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(options.dense, dtype=torch.float32)
    batches = read_batches(options.batches)
    add_gradients(model, batches)
    inputs = without_labels(batches[0])
    example = {name: tensor[:1] for name, tensor in inputs.items()}
    prune(model, make_pruner(model, example, options.neurons, options.heads, options.hidden))
    with torch.no_grad():
        logits = model(**inputs).logits
    options.output.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, options.output / "model.safetensors")
    save_file({"logits": logits}, options.output / "answers.safetensors")
    (options.output / "widths.json").write_text(json.dumps(widths_of(model), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
