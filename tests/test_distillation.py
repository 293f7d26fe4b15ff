import json

import pytest
import torch
import transformers
from models import bert, llama, t5, training_arguments
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn import functional
from transformers import Trainer, TrainerCallback

from hf_prune import (
    DistillationConfig,
    DistillationConfigError,
    PruningConfig,
    PruningTrainer,
    TeacherError,
    distillation,
)
from hf_prune.distillation import binary_divergence, divergence, hidden_difference, item_mask, layer_pairs

WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = PruningConfig(sparsity=0.5, schedule="linear", begin=1, end=4, frequency=1)


# ---- Sums over items, against plain references ----


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_and_its_gradient_are_those_of_torch(monkeypatch, chunk, temperature):
    monkeypatch.setattr(distillation, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 11, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    mask = torch.rand(3, 5, generator=generator) < 0.6
    ours, plain = (student.float().requires_grad_() for _ in range(2))
    total = divergence(ours, teacher.float(), mask, temperature)
    expected = (
        functional.kl_div(
            (plain / temperature).log_softmax(-1)[mask],
            (teacher / temperature).float().log_softmax(-1)[mask],
            log_target=True,
            reduction="sum",
        )
        * temperature**2
    )
    (3 * total).backward()
    (3 * expected).backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(ours.grad, plain.grad)
    assert not ours.grad[~mask].any()


def test_divergence_of_what_is_masked_is_zero_even_if_it_is_not_finite():
    student = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]], requires_grad=True)
    total = divergence(student, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([True, False]), 1.0)
    total.backward()
    assert total.isfinite()
    assert student.grad.isfinite().all()


def test_divergence_of_a_bfloat16_model_is_computed_in_float32():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    other = (logits + 0.5 * torch.randn(4, 50, generator=torch.Generator().manual_seed(1))).bfloat16()
    mask = torch.ones(4, dtype=torch.bool)
    total = divergence(logits.requires_grad_(), other, mask, 2.0)
    total.backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, divergence(logits.float(), other.float(), mask, 2.0))
    assert logits.grad.dtype == torch.bfloat16


def test_divergence_of_equal_answers_is_zero():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert divergence(logits, logits, torch.ones(4, dtype=torch.bool), 3.0) == 0
    assert abs(binary_divergence(logits, logits, torch.ones(4, 7, dtype=torch.bool), 3.0)) < 1e-5


def test_binary_divergence_is_that_of_two_classes():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator) for _ in range(2))
    mask = torch.rand(4, 3, generator=generator) < 0.7
    both = [torch.stack([logits, torch.zeros_like(logits)], dim=-1) for logits in (student, teacher)]
    expected = divergence(*both, mask, 2.0)
    torch.testing.assert_close(binary_divergence(student, teacher, mask, 2.0), expected)


def test_items_of_shifted_labels_are_the_tokens_before():
    labels = torch.tensor([[-100, 5, 6, -100], [1, -100, -100, 2]])
    assert item_mask(labels, shifted=False).tolist() == [[False, True, True, False], [True, False, False, True]]
    assert item_mask(labels, shifted=True).tolist() == [[True, True, False, False], [False, False, True, False]]


def test_hidden_difference_is_relative_for_each_token_and_averaged_over_layers():
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 3, 4, generator=generator) for _ in range(2)] for _ in range(2))
    weights = torch.rand(2, 3, generator=generator)
    weights[0, 0] = 0
    expected = 0.0
    for one, other in zip(student, teacher, strict=True):
        for sample in range(2):
            for token in range(3):
                difference = (one[sample, token] - other[sample, token]).norm() ** 2
                expected += float(weights[sample, token] * difference / other[sample, token].norm() ** 2) / 2
    assert float(hidden_difference(student, teacher, weights)) == pytest.approx(expected)


def test_layers_are_paired_by_number_or_as_given():
    assert layer_pairs(3, 3, None) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs(3, 5, [[1, 2], [-1, -1]]) == [(1, 2), (-1, -1)]
    with pytest.raises(DistillationConfigError, match="the model has 2 layers and the teacher 4, got None"):
        layer_pairs(3, 5, None)
    with pytest.raises(DistillationConfigError, match=r"up to 4, got \[2, 5\]"):
        layer_pairs(3, 5, [[2, 5]])


# ---- The configuration ----


def test_a_configuration_lists_all_its_problems():
    with pytest.raises(DistillationConfigError) as caught:
        DistillationConfig(temperature=0, weight=1.5, hidden_weight=float("nan"), hidden_layers=[[1]])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "temperature",
        "weight",
        "hidden_weight",
        "hidden_layers",
    ]
    with pytest.raises(DistillationConfigError, match="nothing would be distilled"):
        DistillationConfig(weight=0)
    with pytest.raises(DistillationConfigError, match="hidden_weight is 0"):
        DistillationConfig(hidden_layers=[[1, 1]])
    with pytest.raises(DistillationConfigError, match="temprature: unknown field; did you mean 'temperature'"):
        DistillationConfig.from_dict({"temprature": 2.0})


def test_a_configuration_is_plain_values():
    config = DistillationConfig(hidden_weight=0.1, hidden_layers=[[1, 2]])
    assert DistillationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ---- One step of training is that of a plain loop over the whole batch ----


class _Task:
    """A model, its teacher, a batch of examples that may be split, and the plain loss of the whole batch."""

    def __init__(self, model, examples, shifts=False, collator=None):
        torch.manual_seed(0)
        self.student, self.teacher = model(), model()
        for weight in (*self.student.parameters(), *self.teacher.parameters()):
            if weight.dim() > 1:
                weight.data *= 0.3 / weight.std()  # or their answers would hardly differ
        self.examples, self.shifts, self.collator = examples, shifts, collator

    def whole(self):
        collate = self.collator or transformers.default_data_collator
        return collate([dict(example) for example in self.examples])

    def reference(self, config, smoothing=0.0):
        """The terms of the plain loss, and its gradients."""
        batch = self.whole()
        labels = batch["labels"]
        outputs = self.student(**batch, output_hidden_states=True)
        with torch.no_grad():
            wanted = self.teacher.eval()(**batch, output_hidden_states=True)
        logits, answers = outputs.logits, wanted.logits
        if self.shifts:
            logits, answers, labels = logits[:, :-1], answers[:, :-1], labels[:, 1:]
        if labels.is_floating_point() and logits.shape[-1] > 1:
            task = functional.binary_cross_entropy_with_logits(logits, labels)
            divided = [(value / config.temperature).unsqueeze(-1) for value in (logits, answers)]
            pairs = [torch.cat([value, torch.zeros_like(value)], -1).log_softmax(-1) for value in divided]
            distilled = functional.kl_div(*pairs, log_target=True, reduction="none").sum(-1).mean()
            distilled = distilled * config.temperature**2
        elif labels.is_floating_point():
            task = functional.mse_loss(logits.squeeze(-1), labels)
            distilled = functional.mse_loss(logits, answers)
        else:
            chosen = labels != -100
            task = functional.cross_entropy(logits[chosen], labels[chosen], label_smoothing=smoothing)
            pairs = [(value[chosen] / config.temperature).log_softmax(-1) for value in (logits, answers)]
            distilled = functional.kl_div(*pairs, log_target=True, reduction="batchmean") * config.temperature**2
        loss = (1 - config.weight) * task + config.weight * distilled
        terms = {"task_loss": task, "distillation_loss": distilled}
        if config.hidden_weight:
            terms["hidden_loss"] = self._hidden(outputs, wanted, batch)
            loss = loss + config.hidden_weight * terms["hidden_loss"]
        self.student.zero_grad()
        loss.backward()
        terms = {name: float(value.detach()) for name, value in terms.items()}
        return terms, {name: weight.grad.clone() for name, weight in self.student.named_parameters()}

    def _hidden(self, outputs, wanted, batch):
        states = outputs.get("decoder_hidden_states") or outputs.hidden_states
        teacher = wanted.get("decoder_hidden_states") or wanted.hidden_states
        layers = []
        for one, other in zip(states, teacher, strict=True):
            relative = (one - other).norm(dim=-1) ** 2 / other.norm(dim=-1) ** 2
            if batch["labels"].dim() == 1:
                seen = batch["attention_mask"]
                layers.append(((relative * seen).sum(1) / seen.sum(1)).mean())
            else:
                chosen = batch["labels"] != -100
                relative, chosen = (relative[:, :-1], chosen[:, 1:]) if self.shifts else (relative, chosen)
                layers.append(relative[chosen].mean())
        return torch.stack(layers).mean()


def _ragged(count=8, with_mask=True):
    """Texts of different lengths, padded to 8, what is padded without a label."""
    generator = torch.Generator().manual_seed(2)
    examples = []
    for index in range(count):
        tokens = torch.randint(3, 64, (8,), generator=generator)
        length = 8 - index % 6
        labels = tokens.clone()
        labels[length:] = -100
        mask = (torch.arange(8) < length).long()
        examples.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels})
    return examples


def _classes(labels):
    return [
        {key: example[key] for key in ("input_ids", "attention_mask")} | {"labels": label}
        for example, label in zip(_ragged(), labels, strict=True)
    ]


def classification():
    return _Task(lambda: bert(**WITHOUT_DROPOUT, num_labels=3), _classes([0, 1, 2, 0, 1, 2, 2, 1]))


def yes_or_no():
    labels = torch.rand(8, 3, generator=torch.Generator().manual_seed(3)).round()
    return _Task(
        lambda: bert(**WITHOUT_DROPOUT, num_labels=3, problem_type="multi_label_classification"), _classes(labels)
    )


def regression():
    labels = torch.rand(8, generator=torch.Generator().manual_seed(3))
    return _Task(lambda: bert(**WITHOUT_DROPOUT, num_labels=1), _classes(labels))


def causal():
    return _Task(llama, _ragged(), shifts=True)


def sequence_to_sequence():
    task = _Task(lambda: t5(dropout_rate=0.0), _ragged())
    batch = task.whole()
    stock = Trainer(model=task.student, args=training_arguments("unused"))
    counted = stock.get_batch_samples(iter([batch]), 1, torch.device("cpu"))[1]
    if counted != (batch["labels"] != -100).sum():
        pytest.skip("this version of transformers leaves the first label of encoder-decoders out of its count")
    return task


def masked():
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        **WITHOUT_DROPOUT,
    )
    return _Task(lambda: transformers.BertForMaskedLM(config), _ragged())


TASKS = [classification, yes_or_no, regression, causal, masked, sequence_to_sequence]
WAYS = {"in one": (8, 1), "in two": (4, 2), "in four": (2, 4)}


class _Gradients(TrainerCallback):
    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = {name: weight.grad.clone() for name, weight in model.named_parameters()}


def _train(task, directory, config, size, steps, **arguments):
    seen = _Gradients()
    trainer = PruningTrainer(
        model=task.student,
        args=training_arguments(
            directory,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=0,
            **arguments,
        ),
        train_dataset=task.examples,
        data_collator=task.collator,
        teacher_model=task.teacher,
        distillation_config=config,
        callbacks=[seen],
    )
    trainer.train()
    return trainer, seen.first


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_a_step_is_that_of_a_plain_loop_however_the_batch_is_split(tmp_path, task, way):
    config = DistillationConfig(temperature=3.0, weight=0.7)
    task = task()
    terms, expected = task.reference(config)
    trainer, gradients = _train(task, tmp_path, config, *WAYS[way])
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for name, value in terms.items():
        assert logged[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("task", [classification, causal, masked, sequence_to_sequence], ids=lambda task: task.__name__)
def test_hidden_states_are_matched_however_the_batch_is_split(tmp_path, task, way):
    config = DistillationConfig(weight=0.5, hidden_weight=0.3)
    task = task()
    terms, expected = task.reference(config)
    trainer, gradients = _train(task, tmp_path, config, *WAYS[way])
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["hidden_loss"] == pytest.approx(terms["hidden_loss"], rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("task", [classification, causal, sequence_to_sequence], ids=lambda task: task.__name__)
def test_label_smoothing_is_of_the_task_alone(tmp_path, task, way):
    config = DistillationConfig(temperature=2.0, weight=0.4)
    task = task()
    if task.student.config.is_encoder_decoder:  # the stock Trainer needs it, for the model then sees no labels
        task.collator = lambda examples: _with_decoder_inputs(task.teacher, examples)
    _, expected = task.reference(config, smoothing=0.1)
    _, gradients = _train(task, tmp_path, config, *WAYS[way], label_smoothing_factor=0.1)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def _with_decoder_inputs(model, examples):
    batch = transformers.default_data_collator(examples)
    return batch | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


def test_a_loss_of_ones_own_is_mixed_with_the_teachers(tmp_path):
    def summed(outputs, labels, num_items_in_batch=None):
        return functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    config, task = DistillationConfig(), classification()
    _, expected = task.reference(config)
    seen = _Gradients()
    trainer = PruningTrainer(
        model=task.student,
        args=training_arguments(
            tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0
        ),
        train_dataset=task.examples,
        compute_loss_func=summed,
        teacher_model=task.teacher,
        distillation_config=config,
        callbacks=[seen],
    )
    trainer.train()
    torch.testing.assert_close(seen.first, expected, rtol=1e-4, atol=1e-6)


# ---- Training with a teacher ----


def _trainer(directory, task, teacher, **arguments):
    return PruningTrainer(
        model=task.student,
        args=training_arguments(directory, **{"max_steps": 6, "per_device_train_batch_size": 4} | arguments),
        train_dataset=task.examples,
        eval_dataset=task.examples,
        pruning_config=CONFIG,
        teacher_model=teacher,
    )


def test_the_teacher_is_asked_once_a_batch_is_left_as_it_is_and_in_no_checkpoint(tmp_path):
    task = causal()
    before = {name: weight.clone() for name, weight in task.teacher.state_dict().items()}
    asked, modes = [], []
    task.teacher.register_forward_hook(lambda module, inputs, outputs: asked.append(outputs.logits.requires_grad))
    task.teacher.register_forward_hook(lambda module, inputs, outputs: modes.append(module.training))
    trainer = _trainer(tmp_path, task, task.teacher, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert asked == [False] * 12  # six steps of two micro-batches
    assert not any(modes)
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    for name, weight in task.teacher.state_dict().items():
        assert torch.equal(weight, before[name])
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert set(saved) == set(task.student.state_dict())
    assert trainer.pruner.sparsity == 0.5
    trainer.evaluate()
    assert len(asked) == 12


def test_a_teacher_is_opened_from_its_folder(tmp_path):
    task = classification()
    task.teacher.save_pretrained(tmp_path / "teacher")
    trainer = _trainer(tmp_path / "run", task, str(tmp_path / "teacher"))
    for name, weight in trainer.teacher.state_dict().items():
        assert torch.equal(weight, task.teacher.state_dict()[name])
    assert not trainer.teacher.training
    trainer.train()


def test_a_training_with_a_teacher_goes_on_exactly(tmp_path):
    def weights(directory, resume=None, **arguments):
        task = classification()
        trainer = _trainer(directory, task, task.teacher, save_strategy="steps", save_steps=3, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = weights(tmp_path / "whole")
    again = weights(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_teacher_alone_trains_without_pruning(tmp_path):
    task = classification()
    trainer = PruningTrainer(
        model=task.student,
        args=training_arguments(tmp_path, max_steps=40, learning_rate=1e-2, optim="adamw_torch", logging_steps=1),
        train_dataset=task.examples,
        teacher_model=task.teacher,
        distillation_config=DistillationConfig(weight=1.0),
    )
    trainer.train()
    distances = [entry["distillation_loss"] for entry in trainer.state.log_history if "distillation_loss" in entry]
    assert trainer.pruner is None
    assert distances[-1] < distances[0] / 10


def test_adapters_learn_from_the_model_under_them(tmp_path):
    task = causal()
    trainer = PruningTrainer(
        model=task.student,
        args=training_arguments(tmp_path, max_steps=6),
        train_dataset=task.examples,
        pruning_config=CONFIG,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
        teacher_model=task.teacher,
    )
    trainer.train()
    assert trainer.pruner.sparsity == 0.5
    assert "distillation_loss" in next(entry for entry in trainer.state.log_history if "loss" in entry)


# ---- What is refused ----


def _refusal(directory, student, teacher):
    with pytest.raises(TeacherError) as caught:
        PruningTrainer(
            model=student,
            args=training_arguments(directory),
            train_dataset=_ragged(),
            teacher_model=teacher,
        )
    return str(caught.value)


def test_a_teacher_that_does_not_fit_is_refused_before_training(tmp_path):
    model = llama()
    assert "shares weights with it" in _refusal(tmp_path, model, model)
    assert "vocabulary of 64 tokens, got 80" in _refusal(tmp_path, model, llama(vocab_size=80))
    assert "the model's 3 labels, got 2" in _refusal(tmp_path, bert(num_labels=3), bert())
    names = [{"id2label": {0: first, 1: second}} for first, second in (("good", "bad"), ("bad", "good"))]
    assert "expected the model's labels" in _refusal(tmp_path, *(bert(**labels) for labels in names))
    with pytest.raises(TeacherError, match="expected one beside a distillation_config, got None"):
        PruningTrainer(
            model=model, args=training_arguments(tmp_path), distillation_config=DistillationConfig(), train_dataset=[]
        )


def test_layers_that_cannot_be_compared_are_told(tmp_path):
    task = causal()
    for teacher, config, message in (
        (llama(num_hidden_layers=3), DistillationConfig(hidden_weight=1.0), "the model has 2 layers and the teacher 3"),
        (llama(hidden_size=32), DistillationConfig(hidden_weight=1.0), "hidden states of different shapes"),
    ):
        task.teacher = teacher
        with pytest.raises(DistillationConfigError, match=message):
            _train(task, tmp_path, config, 4, 1)


def test_a_model_without_logits_for_each_label_is_told(tmp_path):
    encoder = transformers.BertForQuestionAnswering(bert().config)
    teacher = transformers.BertForQuestionAnswering(bert().config)
    examples = [
        {"input_ids": example["input_ids"], "start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}
        for example in _ragged()
    ]
    task = _Task(bert, examples)
    task.student, task.teacher = encoder, teacher
    with pytest.raises(TeacherError, match="expected inputs with labels to distil, got input_ids, start_positions"):
        _train(task, tmp_path, None, 4, 1)
