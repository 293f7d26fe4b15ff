"""A teacher that remembers its answers: trainings that share one spend no forward pass on samples seen before."""

import functools
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


def remember_answers(teacher: PreTrainedModel) -> PreTrainedModel:
    """Let a classifier of padded texts keep its logits and hidden states of each text, in memory; the same model.

    A text is known by its tokens. Its hidden states are those of the first batch that it was in, and zero at padding.
    Texts are padded on the right.
    """
    compute = teacher.forward
    known: dict[bytes, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    @functools.wraps(compute)
    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> SequenceClassifierOutput:
        lengths = attention_mask.sum(1).tolist()
        keys = [ids[:length].numpy().tobytes() for ids, length in zip(input_ids, lengths, strict=True)]
        if not all(key in known for key in keys):
            answers = compute(input_ids, attention_mask, **others | {"output_hidden_states": True})
            for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
                states = [state[row, :length].clone() for state in answers.hidden_states]
                known[key] = answers.logits[row].clone(), states
            return answers
        logits, states = zip(*(known[key] for key in keys), strict=True)
        hidden_states = []
        for of_texts in zip(*states, strict=True):
            hidden = of_texts[0].new_zeros(*input_ids.shape, of_texts[0].shape[-1])
            for row, state in enumerate(of_texts):
                hidden[row, : len(state)] = state
            hidden_states.append(hidden)
        return SequenceClassifierOutput(logits=torch.stack(logits), hidden_states=tuple(hidden_states))

    teacher.forward = forward
    return teacher
