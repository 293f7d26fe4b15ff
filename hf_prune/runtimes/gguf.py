"""Export of Llama models to GGUF, the format of llama.cpp: `model.gguf`, which transformers reads too."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import ExportError, one_line
from ..model.opening import LOADING_ERRORS
from ..model.per_layer import has_overrides
from .formats import Runtime, Work
from .passes import stages_of

_MODEL = "model.gguf"

# Weights of a block of Q8_0.
_BLOCK = 32


def write_gguf(work: Work, folder: Path) -> None:
    """Write a Llama as `model.gguf`: float32, or with `int8` Q8_0 where 32 divides the inputs of a matrix.

    A byte-level BPE tokenizer is written with it, which llama.cpp needs. Raises ExportError for
    layers that have sizes of their own.
    """
    import gguf
    import numpy as np

    model, config = work.model, work.model.config
    if has_overrides(config):
        raise ExportError("--to", "gguf is written for models whose layers have the same sizes, which this one has not")
    writer = gguf.GGUFWriter(folder / _MODEL, "llama")
    _add_sizes(writer, config)
    if work.tokenizer is not None:
        _add_tokenizer(writer, work.tokenizer, gguf)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ExportError("--to", f"gguf has no name for the tensor {name}")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = _as_in_llama_cpp(tensor, heads)
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        if work.int8 and values.ndim == 2 and values.shape[1] % _BLOCK == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(known, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(known, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: PreTrainedConfig) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)


def _as_in_llama_cpp(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries or keys in the order of llama.cpp, which rotates neighbouring dimensions of a head, not its halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, gguf: Any) -> None:
    """Write a byte-level BPE tokenizer; others are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if content["model"].get("type") != "BPE" or content["model"].get("byte_fallback"):
        return
    special, vocabulary = set(tokenizer.all_special_tokens), tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)


def open_gguf(folder: Path) -> dict[str, Runtime]:
    """The model as transformers reads it: dense, in float32, and run by PyTorch. llama.cpp is not run."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_MODEL, dtype=torch.float32)
    except LOADING_ERRORS as error:
        raise ExportError(f"the exported model does not open: {one_line(error)}") from error
    return dict(stages_of(model.eval()))
