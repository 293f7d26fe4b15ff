"""Align and prune a language model with TRL's DPOTrainer; the reference model stays dense.

With a network: `python recipes/dpo.py --output_dir outputs/dpo --max_steps 500 --sparsity 0.5`. Without a network, give
folders with `--model_name` and `--dataset_name`. All flags of `trl.DPOConfig` and of `hf_prune.PruningConfig` work;
`--help` lists them.

With `--lora_r`, TRL's reference is the model without its adapters, which is being pruned. The script therefore computes
the outputs of the dense model before training (`precompute_ref_log_probs`).
"""

from dataclasses import dataclass

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer

from hf_prune import PruningArguments, PruningMixin


@dataclass
class DataArguments:
    model_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    dataset_name: str = "trl-lib/ultrafeedback_binarized"  # with columns `chosen` and `rejected`, and perhaps `prompt`
    lora_r: int = 0


class PruningDPOTrainer(PruningMixin, DPOTrainer):
    pass


def main() -> None:
    data_args, args, pruning = HfArgumentParser(
        (DataArguments, DPOConfig, PruningArguments)
    ).parse_args_into_dataclasses()
    args.precompute_ref_log_probs = args.precompute_ref_log_probs or data_args.lora_r > 0

    trainer = PruningDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(data_args.model_name),
        args=args,
        train_dataset=load_dataset(data_args.dataset_name, split="train"),
        processing_class=AutoTokenizer.from_pretrained(data_args.model_name),
        peft_config=LoraConfig(r=data_args.lora_r, task_type="CAUSAL_LM") if data_args.lora_r else None,
        pruning_config=pruning.config,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.create_model_card()  # saves the model, too; of adapters, it is TRL's card
    trainer.save_model()


if __name__ == "__main__":
    main()
