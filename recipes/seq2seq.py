"""Fine-tune and prune a sequence-to-sequence model, with metrics of the generated text.

With a network: `python recipes/seq2seq.py --output_dir outputs/summaries --num_train_epochs 1 --sparsity 0.5`. Without
a network, give folders with `--model_name` and `--dataset_name`. All flags of `transformers.Seq2SeqTrainingArguments`
and of `hf_prune.PruningConfig` work; `--help` lists them.
"""

from dataclasses import dataclass

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_prune import PruningArguments, PruningMixin


@dataclass
class DataArguments:
    model_name: str = "google-t5/t5-small"
    dataset_name: str = "knkarthick/samsum"
    source_column: str = "dialogue"
    target_column: str = "summary"
    max_length: int = 512


class PruningSeq2SeqTrainer(PruningMixin, Seq2SeqTrainer):
    pass


def main() -> None:
    parser = HfArgumentParser((DataArguments, Seq2SeqTrainingArguments, PruningArguments))
    data_args, args, pruning = parser.parse_args_into_dataclasses()
    args.predict_with_generate = True

    data = load_dataset(data_args.dataset_name)
    tokenizer = AutoTokenizer.from_pretrained(data_args.model_name)
    model = AutoModelForSeq2SeqLM.from_pretrained(data_args.model_name)

    def encode(rows):
        sources, targets = rows[data_args.source_column], rows[data_args.target_column]
        return tokenizer(sources, text_target=targets, truncation=True, max_length=data_args.max_length)

    def exact_matches(prediction):
        predicted, expected = (np.where(ids < 0, 0, ids) for ids in (prediction.predictions, prediction.label_ids))
        pairs = zip(
            *(tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (predicted, expected)), strict=True
        )
        return {"exact_match": float(np.mean([one == other for one, other in pairs]))}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    trainer = PruningSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=exact_matches,
        pruning_config=pruning.config,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.create_model_card()  # saves the model, too


if __name__ == "__main__":
    main()
