"""Losses of a language model by token, against transformers' own loss, and how they are divided."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import VOCABULARY, gpt2, llama
from text_models import tokenizer
from transformers import DataCollatorWithPadding

from hf_prune.explain.language import AskedTokens, ask_tokens, count_tokens, groups_of_frequency, groups_of_positions
from hf_prune.explain.resampling import Bootstrap
from hf_prune.explain.samples import Reader
from hf_prune.explain.slices import compare_slices


def rows_of(lengths):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in drawn]


def reader_of(model, side="right"):
    padding = tokenizer()
    padding.padding_side = side
    return Reader(model.eval(), DataCollatorWithPadding(padding))


@pytest.mark.parametrize("build", [llama, gpt2])
def test_losses_are_those_of_each_text_alone(build):
    dense, pruned = build(), build()
    rows = rows_of([9, 2, 6, 1, 8])
    tokens = ask_tokens(reader_of(pruned), reader_of(dense), rows, batch_size=2)
    assert tokens.text.tolist() == [0] * 8 + [1] + [2] * 5 + [4] * 7
    assert tokens.position.tolist() == [*range(1, 9), 1, *range(1, 6), *range(1, 8)]
    with torch.no_grad():
        for index, row in enumerate(rows):
            ids = torch.tensor([row["input_ids"]])
            if ids.shape[1] > 1:
                for model, losses in ((pruned, tokens.pruned), (dense, tokens.dense)):
                    expected = float(model(input_ids=ids, labels=ids).loss)
                    assert losses[tokens.text == index].mean() == pytest.approx(expected, abs=1e-5)
            before, now = (model(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in (dense, pruned))
            divergence = torch.nn.functional.kl_div(now, before, log_target=True, reduction="none").sum(-1)
            np.testing.assert_allclose(tokens.divergence[tokens.text == index], divergence, atol=1e-5)
            agrees = (before.argmax(-1) == now.argmax(-1)).tolist()
            assert tokens.agrees[tokens.text == index].tolist() == agrees


def test_padding_on_the_left_is_no_position():
    rows = rows_of([4, 7])
    model = reader_of(llama(), "left")
    assert ask_tokens(model, None, rows, 2).position.tolist() == [1, 2, 3, *range(1, 7)]


def test_losses_by_position_and_by_frequency_add_up_to_the_whole_loss():
    rows = rows_of(range(5, 25))
    tokens = ask_tokens(reader_of(llama()), reader_of(llama()), rows, 8)
    asked = AskedTokens(tokens, len(rows), Bootstrap(len(rows), 100))
    loss, perplexity = asked.metrics()
    assert perplexity.pruned.value == pytest.approx(np.exp(loss.pruned.value))
    assert loss.samples == len(tokens.text)
    groups = asked.groups(count_tokens(rows))
    for name in ("position", "token frequency"):
        measured = asked.measured([], [group for group in groups if group.by == name])
        assert sum(one.of.sum() for one in measured) == len(tokens.text)
        slices, left_out = compare_slices("loss", measured, asked.bootstrap, is_share=False)
        assert len(slices) + left_out == len(measured) > 2
        whole = sum(one.pruned.sum() for one in measured) / len(tokens.text)
        assert whole == pytest.approx(loss.pruned.value)


def test_positions_are_divided_by_powers_of_two_and_tokens_by_how_often_they_occur():
    assert [one.value for one in groups_of_positions(np.array([1, 2, 3, 9]))] == ["1", "2 to 3", "4 to 7", "8 to 9"]
    tokens = np.repeat(np.arange(20), 5)
    found = groups_of_frequency(tokens, {token: token for token in range(20)})
    assert len(found) == 10
    assert found[0].value == "seen 18 to 19 times"
    assert sum(group.inside.sum() for group in found) == len(tokens)


MEMORY = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator
from hf_prune.explain.language import ask_tokens
from hf_prune.explain.samples import Reader

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
reader = Reader(LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes)), default_data_collator, None)
rows = [{"input_ids": ids} for ids in torch.randint(5, 49152, (80, 64)).tolist()]
ask_tokens(reader, reader, rows[:8], 4)
before = resident()
ask_tokens(reader, reader, rows, 4)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the memory of a process")
def test_more_texts_take_no_more_memory():
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout) < 200  # megabytes; 1,400 where small arrays take the place of large ones
