"""What a recipe's data leaves of a classifier's vocabulary: tokens, parameters, megabytes, length of texts, accuracy.

python benchmarks/vocabulary.py [RECIPE] [--model outputs/quickstart/dense]

The model is the one that a run of the recipe has fine-tuned dense. It is not trained after the cut.
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import shrink_vocabulary
from hf_prune.recipe.data import load_data
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.tasks import TextClassification


def tested(model: Any, tokenizer: Any, rows: Any, max_length: int) -> tuple[float, int, int]:
    """The accuracy on rows, the number of their tokens, and how many of these are unknown."""
    right = tokens = unknown = 0
    for start in range(0, len(rows), 50):
        some = rows[start : start + 50]
        batch = tokenizer(some["text"], truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        tokens += int(batch["attention_mask"].sum())
        unknown += int((batch["input_ids"] == tokenizer.unk_token_id).sum())
        with torch.no_grad():
            right += int((model(**batch).logits.argmax(-1) == torch.tensor(some["labels"])).sum())
    return right / len(rows), tokens, unknown


def main() -> None:
    """Print a line for the whole model, and one for what is left of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--model", default="outputs/quickstart/dense")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    task = TextClassification(recipe)
    data = task.read(load_data(recipe.dataset, task.columns))
    column = recipe.dataset.text_column
    data = data if column == "text" else data.rename_column(column, "text")
    model = AutoModelForSequenceClassification.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for name in ("whole", "smaller"):
        if name == "smaller":
            tokenizer = shrink_vocabulary(model, tokenizer, data["train"]["text"])
        accuracy, tokens, unknown = tested(model, tokenizer, data["test"], recipe.dataset.max_length)
        parameters = list(model.parameters())
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 1e6
        print(
            f"{name}: {len(tokenizer):,} tokens, {sum(parameter.numel() for parameter in parameters):,} parameters, "
            f"{size:.1f} MB; {len(data['test']):,} test texts: {tokens:,} tokens, {unknown} unknown, "
            f"accuracy {accuracy:.2%}"
        )


if __name__ == "__main__":
    main()
