"""A pruned model beside the dense one: what both answer to the same text, and how long each takes.

`python app.py` starts the page. What it shows is in space.json, beside this file. Written by hf-prune.
"""

import html
import importlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
SETTINGS_NAME = "space.json"
EXPLAIN_NAME = "explain/index.html"

# The tasks that a page can show, and how their models are opened.
TASKS = {
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "summarization": "AutoModelForSeq2SeqLM",
}

# Answers are timed again until this many seconds are over, with both models as often.
SECONDS = 1.0
MOST_ROUNDS = 50

MOST_NEW_TOKENS = 200
MOST_CHARACTERS = 10_000
NO_LIMIT = 100_000  # tokenizers without a limit say a far larger number
TOKENS_OF_UNKNOWN_MODELS = 512


@dataclass(frozen=True)
class Settings:
    """The content of space.json: the models by name, or by folder where the page is not for the Hub.

    `pruned_name` and `dense_name` are what the page calls them, which is never a path. `dense` is None where the pruned
    model is shown alone, and `dense_is` says what the dense model is, or why there is none. `imports` are packages that
    must be imported before the pruned model is opened.
    """

    title: str
    task: str
    pruned: str
    pruned_name: str
    pruned_revision: str | None
    dense: str | None
    dense_name: str | None
    dense_revision: str | None
    dense_is: str
    examples: list[str]
    new_tokens: int
    imports: list[str]


@dataclass(frozen=True)
class Opened:
    """A model with its tokenizer, and what is written above its answers."""

    title: str
    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def limit(self) -> int:
        """How many tokens the model can read."""
        if self.tokenizer.model_max_length < NO_LIMIT:
            return self.tokenizer.model_max_length
        positions = getattr(self.model.config, "max_position_embeddings", None) or TOKENS_OF_UNKNOWN_MODELS
        return max(positions - 2, 1)  # some models have two positions that no token gets

    def encode(self, text: str, limit: int) -> dict[str, torch.Tensor]:
        """The inputs of the model, cut to `limit` tokens."""
        encoded = self.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        accepted = inspect.signature(self.model.forward).parameters
        return {name: tensor for name, tensor in encoded.items() if name in accepted}


@dataclass(frozen=True)
class Written:
    """A text that a model wrote, and how many tokens that were."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Timed:
    """What each model answered, and how many seconds each answer took, round by round."""

    answers: list[Any]
    rounds: list[list[float]]

    @property
    def seconds(self) -> list[float]:
        """The median time of each model."""
        return [median(times) for times in zip(*self.rounds, strict=True)]

    @property
    def ratio(self) -> float:
        """How many times as long as the first model the second one took: the median of the rounds."""
        return median(second / first for first, second in self.rounds)


# ---- The models and their answers ----


def read_settings(folder: Path = HERE) -> Settings:
    """What space.json says."""
    return Settings(**json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8")))


def open_models(settings: Settings) -> list[Opened]:
    """The pruned model and, if there is one, the dense model, in float32, so that their times can be compared."""
    for package in settings.imports:
        importlib.import_module(package)
    names = [("Pruned", settings.pruned, settings.pruned_revision)]
    if settings.dense is not None:
        names.append(("Dense", settings.dense, settings.dense_revision))
    auto_class = getattr(transformers, TASKS[settings.task])
    opened = []
    for title, name, revision in names:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        model = auto_class.from_pretrained(name, revision=revision, dtype=torch.float32)
        opened.append(Opened(title, model.eval(), tokenizer))
    return opened


def classify(opened: Opened, text: str) -> dict[str, float]:
    """The probability of each label."""
    with torch.inference_mode():
        logits = opened.model(**opened.encode(text, opened.limit)).logits[0]
    labels: Any = opened.model.config.id2label
    return {labels[index]: float(value) for index, value in enumerate(logits.softmax(-1))}


def write(opened: Opened, text: str, new_tokens: int) -> Written:
    """What the model writes, without sampling: the continuation of a text, or its summary."""
    reads_apart = opened.model.config.is_encoder_decoder
    if not reads_apart:
        new_tokens = min(new_tokens, max(opened.limit // 2, 1))
    inputs = opened.encode(text, opened.limit if reads_apart else opened.limit - new_tokens)
    with torch.inference_mode():
        ids = opened.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0]
    new = ids[1:] if reads_apart else ids[inputs["input_ids"].shape[1] :]
    return Written(str(opened.tokenizer.decode(new, skip_special_tokens=True)), len(new))


def in_turns(calls: Sequence[Callable[[], Any]], seconds: float = SECONDS) -> Timed:
    """Call all in turns until the time is over, every other round in the opposite order; each at least once."""
    answers: list[Any] = [None] * len(calls)
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while not rounds or (len(rounds) < MOST_ROUNDS and time.perf_counter() < end):
        times = [0.0] * len(calls)
        for index in range(len(calls)) if len(rounds) % 2 == 0 else reversed(range(len(calls))):
            begin = time.perf_counter()
            answers[index] = calls[index]()
            times[index] = time.perf_counter() - begin
        rounds.append(times)
    return Timed(answers, rounds)


# ---- What is said about them ----


def size_of(model: PreTrainedModel) -> str:
    """How many parameters a model has, and how many of them are not zero."""
    count = sum(parameter.numel() for parameter in model.parameters())
    left = sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters())
    return f"{count:,} parameters, {left / count:.1%} of them not zero"


def said_of_classes(models: Sequence[Opened], timed: Timed) -> str:
    """Whether the models agree, and how long each took."""
    times = [f"{one.title.lower()} {1000 * time:.1f} ms" for one, time in zip(models, timed.seconds, strict=True)]
    said = f"Time for one answer: {', '.join(times)} ({_measured(timed)})."
    if len(models) == 1:
        return said
    pruned, dense = (max(answer, key=lambda label: answer[label]) for answer in timed.answers)
    return f"**{'Both models agree.' if pruned == dense else 'The models disagree.'}** {said} {_ratio(timed)}"


def said_of_texts(models: Sequence[Opened], timed: Timed) -> str:
    """Whether the texts are the same, and how many tokens a second each model wrote."""
    rates = [written.tokens / time for written, time in zip(timed.answers, timed.seconds, strict=True)]
    listed = [
        f"{one.title.lower()} {rate:.1f} ({written.tokens} tokens)"
        for one, rate, written in zip(models, rates, timed.answers, strict=True)
    ]
    said = f"Tokens a second: {', '.join(listed)}; {_measured(timed)}, without sampling."
    if len(models) == 1:
        return said
    same = timed.answers[0].text == timed.answers[1].text
    return f"**{'Both models wrote the same.' if same else 'The texts differ.'}** {said}"


def _measured(timed: Timed) -> str:
    rounds = len(timed.rounds)
    return f"median of {rounds}, measured in turns" if rounds > 1 else "one run of each"


def _ratio(timed: Timed) -> str:
    """How the times compare; a tenth more or less is what a machine with other work gives, too."""
    if 0.9 < timed.ratio < 1.1:
        return "They took about the same time."
    return f"The pruned model is {timed.ratio:.1f} times as fast."


def introduction(settings: Settings, models: Sequence[Opened]) -> str:
    """Which models these are, and what they consist of."""
    names = (settings.pruned_name, settings.dense_name)
    lines = [f"# {settings.title}", ""]
    lines += [f"- {one.title}: `{name}`, {size_of(one.model)}" for one, name in zip(models, names, strict=False)]
    return "\n".join([*lines, "", settings.dense_is])


def framed(page: str) -> str:
    """An HTML page in a frame of its own, in which no script runs: its style does not reach the page around it."""
    # Without a base, its links to its own headings would open the page around it in the frame.
    page = html.escape(page.replace("<head>", '<head><base href="about:srcdoc">', 1), quote=True)
    style = "width: 100%; height: 85vh; border: 0"
    return f'<iframe title="What pruning changed" sandbox style="{style}" srcdoc="{page}"></iframe>'


# ---- The page ----


def build(settings: Settings, models: Sequence[Opened], explanation: str | None) -> Any:
    """The page as Gradio's Blocks; with an `explanation`, an HTML page, in a second tab."""
    import gradio  # here, so that what is above can be used without it

    is_classifier = settings.task == "text-classification"

    def answer(text: str, new_tokens: int) -> list[Any]:
        if not text.strip():
            raise gradio.Error("Enter a text.", duration=10)
        if is_classifier:
            timed = in_turns([partial(classify, one, text) for one in models])
            return [*timed.answers, said_of_classes(models, timed)]
        for one in models:
            write(one, text, 1)  # after a pause, the first is slower
        timed = in_turns([partial(write, one, text, int(new_tokens)) for one in models])
        return [*(written.text for written in timed.answers), said_of_texts(models, timed)]

    def show_explanation() -> str:
        return framed(explanation or "")

    with gradio.Blocks(title=settings.title, analytics_enabled=False) as page:
        gradio.Markdown(introduction(settings, models))
        with gradio.Tab("Answers") if explanation is not None else gradio.Column():
            text = gradio.Textbox(label="Text", lines=3, max_length=MOST_CHARACTERS, elem_id="text")
            new_tokens = gradio.Slider(
                1, MOST_NEW_TOKENS, settings.new_tokens, step=1, label="Most new tokens", visible=not is_classifier
            )
            button = gradio.Button("Answer with both models" if len(models) > 1 else "Answer", variant="primary")
            with gradio.Row():
                outputs = [
                    gradio.Label(label=one.title, min_width=280, elem_id=one.title.lower())
                    if is_classifier
                    else gradio.Textbox(
                        label=one.title, lines=6, min_width=280, interactive=False, elem_id=one.title.lower()
                    )
                    for one in models
                ]
            said = gradio.Markdown(elem_id="said")
            gradio.Examples([[example] for example in settings.examples], text, label="Examples")
            gradio.on([button.click, text.submit], answer, [text, new_tokens], [*outputs, said], api_name="answer")
        if explanation is not None:
            with gradio.Tab("What pruning changed") as tab:
                frame = gradio.HTML()
            tab.select(show_explanation, None, frame, api_visibility="private")
    return page


def main() -> None:
    """Open the models, answer once so that the first visitor does not wait for it, and start the page."""
    settings = read_settings()
    models = open_models(settings)
    for one in models:
        for text in settings.examples[:1]:
            classify(one, text) if settings.task == "text-classification" else write(one, text, 2)
    explanation = HERE / EXPLAIN_NAME
    shown = explanation.read_text(encoding="utf-8") if explanation.is_file() else None
    build(settings, models, shown).launch(run_history=False)


if __name__ == "__main__":
    main()
