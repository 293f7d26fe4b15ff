"""Fine-tune and prune a classifier: a plain transformers script with one word changed.

With a network, use any model and data set on the Hub:

    python recipes/text_classification.py --model_name distilbert/distilbert-base-uncased --dataset_name imdb \
        --output_dir outputs/imdb --sparsity 0.8 --learning_rate 5e-5 --num_train_epochs 3

Without a network, give folders: `--model_name path/to/model --dataset_name path/to/folder/with/csv/files`.
All flags of `transformers.TrainingArguments` and of `hf_prune.PruningConfig` work; `--help` lists them.
"""

from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
)

from hf_prune import PruningArguments, PruningTrainer


@dataclass
class DataArguments:
    model_name: str = field(metadata={"help": "A model on the Hub, or a folder."})
    dataset_name: str = field(metadata={"help": "A data set on the Hub, or a folder, with train and test splits."})
    text_column: str = "text"
    label_column: str = "label"
    max_length: int = 128


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    outputs = prediction.predictions
    logits = outputs[0] if isinstance(outputs, tuple) else outputs  # encoder-decoders give hidden states, too
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))}


def main() -> None:
    parser = HfArgumentParser((DataArguments, TrainingArguments, PruningArguments))
    data_args, args, pruning = parser.parse_args_into_dataclasses()

    data = load_dataset(data_args.dataset_name)
    labels = sorted(set(data["train"][data_args.label_column]))
    tokenizer = AutoTokenizer.from_pretrained(data_args.model_name)
    model = AutoModelForSequenceClassification.from_pretrained(data_args.model_name, num_labels=len(labels))

    def encode(rows):
        encoded = tokenizer(rows[data_args.text_column], truncation=True, max_length=data_args.max_length)
        encoded["labels"] = [labels.index(label) for label in rows[data_args.label_column]]
        return encoded

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)

    trainer = PruningTrainer(  # was: Trainer
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        pruning_config=pruning.config,  # and this line is new
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
