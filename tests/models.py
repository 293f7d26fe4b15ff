"""Tiny models of real architectures, random data for each, and arguments to train them on a CPU in a moment."""

from dataclasses import dataclass

import torch
import transformers
from transformers import TrainingArguments

VOCABULARY = 64
LENGTH = 8


_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_labels": 2,
}


def bert(**changes):
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_ENCODER | changes))


def albert():
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=2,
    )
    return transformers.AlbertForSequenceClassification(config)


_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_MIXTURE = _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER | changes))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def t5(**changes):
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_ff=24,
        d_kv=8,
        num_heads=2,
        decoder_start_token_id=0,
        **{"num_layers": 2} | changes,
    )
    return transformers.T5ForConditionalGeneration(config)


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_MIXTURE))


def gpt_oss():
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**_MIXTURE, head_dim=8, rope_parameters=rope))


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=2,
    )
    return transformers.ViTForImageClassification(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        layer_type="basic",
        num_labels=2,
    )
    return transformers.ResNetForImageClassification(config)


def segformer_config(**changes):
    """Two stages of two layers of a SegFormer."""
    return transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        **changes,
    )


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and what its inputs and labels are: `classes` or `tokens`."""

    build: callable
    inputs: str = "tokens"
    labels: str = "tokens"
    image_size: int = 8

    def examples(self, count=8):
        """Random examples, the same every time."""
        generator = torch.Generator().manual_seed(1)
        return [self._example(generator) for _ in range(count)]

    def _example(self, generator):
        if self.inputs == "tokens":
            example = {"input_ids": torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)}
        else:
            example = {"pixel_values": torch.randn(3, self.image_size, self.image_size, generator=generator)}
        if self.labels == "classes":
            example["labels"] = torch.randint(0, 2, (), generator=generator)
        else:
            example["labels"] = example["input_ids"].clone()
        return example

    def batch(self, count=4):
        """Random examples, put together."""
        examples = self.examples(count)
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


ARCHITECTURES = {
    "bert": Architecture(bert, labels="classes"),
    "albert": Architecture(albert, labels="classes"),
    "llama": Architecture(llama),
    "gpt2": Architecture(gpt2),
    "t5": Architecture(t5),
    "mixtral": Architecture(mixtral),
    "gpt_oss": Architecture(gpt_oss),
    "vit": Architecture(vit, inputs="pixels", labels="classes"),
    "resnet": Architecture(resnet, inputs="pixels", labels="classes", image_size=32),
}


def bert_examples(count=40):
    return ARCHITECTURES["bert"].examples(count)


def training_arguments(directory, arguments_class=TrainingArguments, **changes):
    """Ten optimizer steps of four examples on the CPU; nothing is reported or saved unless `changes` say so."""
    arguments = {
        "output_dir": str(directory),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return arguments_class(**arguments | changes)
