"""Train sentence embeddings with sentence-transformers and prune the encoder.

With a network: `python recipes/sentence_embeddings.py --output_dir outputs/embeddings --sparsity 0.5 \\
--per_device_train_batch_size 64`. Without a network, give folders with `--model_name` and `--dataset_name`. All
flags of `SentenceTransformerTrainingArguments` and of `hf_prune.PruningConfig` work; `--help` lists them.
"""

from dataclasses import dataclass

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import HfArgumentParser

from hf_prune import PruningArguments, PruningMixin


@dataclass
class DataArguments:
    model_name: str = "sentence-transformers/all-MiniLM-L6-v2"
    dataset_name: str = "sentence-transformers/natural-questions"  # pairs: two columns of texts that belong together
    test_size: int = 1000


class PruningSentenceTransformerTrainer(PruningMixin, SentenceTransformerTrainer):
    pass


def main() -> None:
    parser = HfArgumentParser((DataArguments, SentenceTransformerTrainingArguments, PruningArguments))
    data_args, args, pruning = parser.parse_args_into_dataclasses()

    data = load_dataset(data_args.dataset_name, split="train").train_test_split(data_args.test_size, seed=args.seed)
    model = SentenceTransformer(data_args.model_name, device=str(args.device))
    trainer = PruningSentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        loss=MultipleNegativesRankingLoss(model),
        pruning_config=pruning.config,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.create_model_card()  # saves the model, too


if __name__ == "__main__":
    main()
