"""Fine-tune and prune a language model with TRL's SFTTrainer, with LoRA if `--lora_r` is given.

With a network: `python recipes/sft.py --output_dir outputs/sft --max_steps 500 --sparsity 0.5`. Without a network, give
folders with `--model_name` and `--dataset_name`. All flags of `trl.SFTConfig` and of `hf_prune.PruningConfig` work;
`--help` lists them.

With LoRA, `--adapters sparse_merge` trains adapters that can be merged into the sparse model without losing a zero; the
merged model is saved as a plain model.
"""

from dataclasses import dataclass

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hf_prune import PruningArguments, PruningMixin, merge


@dataclass
class DataArguments:
    model_name: str = "HuggingFaceTB/SmolLM2-135M"
    dataset_name: str = "roneneldan/TinyStories"  # with a column `text`, or `prompt` and `completion`, or `messages`
    lora_r: int = 0


class PruningSFTTrainer(PruningMixin, SFTTrainer):
    pass


def main() -> None:
    data_args, args, pruning = HfArgumentParser(
        (DataArguments, SFTConfig, PruningArguments)
    ).parse_args_into_dataclasses()

    trainer = PruningSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(data_args.model_name),
        args=args,
        train_dataset=load_dataset(data_args.dataset_name, split="train"),
        processing_class=AutoTokenizer.from_pretrained(data_args.model_name),
        peft_config=LoraConfig(r=data_args.lora_r, task_type="CAUSAL_LM") if data_args.lora_r else None,
        pruning_config=pruning.config,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if data_args.lora_r and pruning.adapters == "sparse_merge":
        merge(trainer.model).save_pretrained(args.output_dir)
        trainer.processing_class.save_pretrained(args.output_dir)
    else:
        trainer.create_model_card()  # saves the model, too; of adapters, it is TRL's card
        trainer.save_model()


if __name__ == "__main__":
    main()
