"""The memory of a stream, predicted without weights and measured with them."""

import subprocess
import sys

import models
import pytest
import torch
import transformers

from hf_prune.errors import PruningStateError
from hf_prune.model.targets import find_targets
from hf_prune.oneshot.lockstep import Lockstep
from hf_prune.oneshot.memory import meta_batch, stream_memory
from hf_prune.structure.live_bytes import LiveBytes

LLAMA = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 172,
    "max_position_embeddings": 256,
}
GPT2 = {"vocab_size": models.VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA)),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2)),
}


def skeleton(name):
    model_class, config = MODELS[name]
    with torch.device("meta"):
        return model_class(config)


def test_bytes_are_counted_once_for_a_storage_and_until_its_last_view_has_gone():
    weight = torch.zeros(100)
    live = LiveBytes([weight])
    with live.watching():
        one = torch.ones(10)
        view = one[2:].reshape(2, 4)
        same = weight.view(10, 10)
        assert live.now == 40
        del one
        assert live.now == 40
        other = view + 1
        assert live.now == 40 + 32
    del view, same
    assert (live.now, live.peak) == (32, 72)
    del other
    assert live.now == 0


@pytest.mark.parametrize("dense_twin", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_memory_of_a_stream_is_known_within_a_tenth(name, dense_twin):
    without_weights = skeleton(name)
    samples, length, number = 2, 200, 4
    batch = meta_batch(samples, length)
    said = stream_memory(without_weights, batch, find_targets(without_weights), number, dense_twin)
    model_class, config = MODELS[name]
    model = model_class(config)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    batches = [{"input_ids": torch.randint(models.VOCABULARY, (samples, length))} for _ in range(number)]
    held = {}
    for stop in Lockstep(model, batches, find_targets(model), dense_twin=dense_twin, around=live.watching):
        held[stop.target.name] = live.now
        stop.set(stop.weight)
    assert said.peak == pytest.approx(live.peak, rel=0.1)
    passes = number * (1 + dense_twin)
    assert said.paused * passes == pytest.approx(max(held.values()), rel=0.1)
    assert held[said.at] == pytest.approx(max(held.values()), rel=0.1)


def test_a_model_with_weights_needs_no_skeleton():
    model = models.bert()
    batch = {"input_ids": torch.randint(models.VOCABULARY, (2, 8))}
    batch["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    alone = stream_memory(model, batch, find_targets(model), 1)
    assert alone.paused <= alone.peak
    assert stream_memory(model, batch, find_targets(model), 5).peak > 4 * alone.paused


def test_a_model_of_eight_billion_weights_is_foretold():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    said = stream_memory(model, meta_batch(1, 2048), find_targets(model), 128)
    assert said.at.endswith("mlp.up_proj.weight")  # with the stream, its norm, and what the gate returns
    tokens = 2048 * 2
    assert said.paused == pytest.approx(tokens * (2 * 4096 + 14336 + 2 * 128), rel=0.4)
    assert said.peak == pytest.approx(128 * said.paused, rel=0.05)


SIZES = {"vocab_size": models.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256, "num_experts_per_tok": 2}
MIXTURES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 48, "head_dim": 16},
    "Olmoe": {"num_experts": 4, "bos_token_id": 0, "eos_token_id": 0},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_memory_of_experts_is_known_without_weights(name):
    torch.manual_seed(0)  # decides which experts get how many tokens
    config = getattr(transformers, f"{name}Config")(**SIZES, **MIXTURES[name], pad_token_id=0)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    with torch.device("meta"):
        without_weights = model_class(config)
    said = stream_memory(without_weights, meta_batch(2, 200), find_targets(without_weights), 4, dense_twin=True)
    model = model_class(config)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    batches = [{"input_ids": torch.randint(models.VOCABULARY, (2, 200))} for _ in range(4)]
    held = {}
    for stop in Lockstep(model, batches, find_targets(model), dense_twin=True, around=live.watching):
        held[stop.target.name] = max(held.get(stop.target.name, 0), live.now)
    assert held.keys() == said.held.keys()
    # The tokens are not divided evenly among them.
    assert said.peak == pytest.approx(live.peak, rel=0.2)
    assert said.paused * 8 == pytest.approx(max(held.values()), rel=0.2)


class ReadsValues(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, **options):
        return super().forward(input_ids=input_ids[:, : max(input_ids.tolist()[0])], **options)


def test_a_forward_that_reads_values_is_no_use_without_weights():
    with torch.device("meta"):
        model = ReadsValues(transformers.LlamaConfig(**LLAMA))
    with pytest.raises(PruningStateError, match="expected a forward pass that reads no values"):
        stream_memory(model, meta_batch(2, 8), find_targets(model), 4)


RESIDENT = """
import sys
from pathlib import Path
import torch
import transformers
from hf_prune.model.targets import find_targets
from hf_prune.oneshot.lockstep import Lockstep
from hf_prune.oneshot.memory import meta_batch, stream_memory

torch.set_num_threads(1)
sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
config = transformers.LlamaConfig(**sizes, vocab_size=256, intermediate_size=1024, max_position_embeddings=4096)
with torch.device("meta"):
    skeleton = transformers.LlamaForCausalLM(config)
number, length = 40, 2048
said = stream_memory(skeleton, meta_batch(1, length), find_targets(skeleton), number)
model = transformers.LlamaForCausalLM(config)
batches = [{"input_ids": torch.randint(256, (1, length))} for _ in range(number)]

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

list(Lockstep(model, batches[:1], find_targets(model)))
before, most = resident(), 0
for stop in Lockstep(model, batches, find_targets(model)):
    most = max(most, resident() - before)
print(said.peak + said.freed, most)
"""


@pytest.mark.slow
def test_the_resident_memory_grows_by_what_was_said():
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    said, grown = map(int, done.stdout.split())
    assert grown == pytest.approx(said, rel=0.1)
