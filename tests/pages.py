"""The pages of the documentation, the blocks of code in them, and what those blocks are run with."""

import contextlib
import io
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from models import ARCHITECTURES, bert, bert_examples, llama, training_arguments
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins at, and why it is not run, if it is not."""

    language: str
    text: str
    line: int
    not_run: str | None = None


_FENCE = re.compile(r"(?:^<!-- not run: (?P<why>.+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks_of(text):
    """The fenced blocks of a page, in order."""
    return [
        Block(match["language"], match["text"], text[: match.start("text")].count("\n") + 1, match["why"])
        for match in _FENCE.finditer(text)
    ]


def names_for(folder):
    """What the blocks of a page may use without making it themselves."""
    examples = bert_examples(40)
    model = bert()
    batch = {name: torch.stack([example[name] for example in examples[:4]]) for name in examples[0]}
    return {
        "Path": Path,
        "torch": torch,
        "model": model,
        "dense": bert(),
        "other": bert(),
        "different": bert(),
        "teacher": bert(),
        "args": training_arguments(folder / "outputs" / "trained"),
        "train": examples,
        "test": examples[:8],
        "tokenizer": None,
        "other_tokenizer": _tokenizer(),
        "sentences": ["the film was good", "a dull film"],
        "metrics": lambda prediction: {"mean": float(np.mean(prediction.label_ids))},
        "optimizer": torch.optim.AdamW(model.parameters()),
        "batches": [batch] * 10,
        "language_model": llama(),
        "language_batches": [ARCHITECTURES["llama"].batch()] * 2,
    }


def _tokenizer():
    """A tokenizer of 64 tokens, as many as the models have: two of its words are in none of the texts."""
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    words = ["the", "film", "was", "good", "dull", "bad", "plot"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
    pieces = Tokenizer(WordPiece({token: place for place, token in enumerate(tokens)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]")


def run_page(name, folder):
    """Run the Python blocks of a page one after another: their names, and what each printed.

    A `text` block after a Python block shows what that prints.
    """
    names, printed = names_for(folder), []
    blocks = blocks_of(PAGES[name])
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python" or block.not_run:
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            # As many empty lines before it as there are in the page, so that errors name the right one.
            exec(compile("\n" * block.line + block.text, str(ROOT / name), "exec"), names)
        said = [line for line in output.getvalue().splitlines() if not _is_log(line)]
        printed.append((block, said))
        if after is not None and after.language == "text":
            assert (name, block.line, said) == (name, block.line, after.text.splitlines())
    return names, printed


def _is_log(line):
    """Whether a line is one that the Trainer prints of its logs, without a progress bar."""
    return re.match(r"\{'(loss|eval_\w+|train_\w+)': ", line) is not None
