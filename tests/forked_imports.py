"""What a fork server imports before it forks; it must start no thread."""

import importlib
import importlib.util
import io
import os

os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # read by pyarrow when it is imported

import peft  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp
from transformers import (  # noqa: F401
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Trainer,
)

import hf_prune.cli.commands
import hf_prune.recipe.run
import hf_prune.trainer.trainer  # noqa: F401
from hf_prune.foreign.transformers import revert_weight_conversion
from hf_prune.publish.plots import plot_layers

for name in ("trl", "sentence_transformers"):
    if importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
if importlib.util.find_spec("trl") is not None:
    from trl import DPOTrainer, SFTTrainer  # noqa: F401  # which are imported when they are asked for

# What these libraries make when they are first used, each process would make anew: tables of names, and fonts.
with torch.device("meta"):
    revert_weight_conversion(BertForSequenceClassification(BertConfig(num_hidden_layers=1)), {})
plot_layers({"a": 0.5}, io.BytesIO(), "a")

torch.set_num_threads(1)

if len(os.listdir("/proc/self/task")) != 1:
    raise RuntimeError("imports started threads: forking would not be safe")
