import json, sys, traceback, os, time
from pathlib import Path
import torch
import torch.distributed as dist
from models import ARCHITECTURES, bert, bert_examples, llama
from train import make_arguments, whole_weights
from transformers import set_seed, Trainer, AutoModelForSequenceClassification
from hf_prune import PruningConfig, PruningTrainer, PruningCallback

W = {"begin": 1, "end": 2, "frequency": 1}

def build(case):
    set_seed(0)
    if case.get("model", "bert") == "llama":
        return llama(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    return bert(num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

def run(directory, case):
    case = {"model": "bert"} | case
    args = make_arguments(directory, case | {"arguments": {"max_steps": 4} | case.get("arguments", {})})
    if case.get("loaded"):
        model = AutoModelForSequenceClassification.from_pretrained(case["loaded"])
    else:
        model = build(case)
    configs = [PruningConfig(**W | one) for one in case["configs"]]
    kw = dict(model=model, args=args, train_dataset=ARCHITECTURES[case["model"]].examples(48), eval_dataset=ARCHITECTURES[case["model"]].examples(8))
    if case.get("callback"):
        callback = PruningCallback(configs)
        trainer = Trainer(**kw, callbacks=[callback])
    else:
        trainer = PruningTrainer(**kw, pruning_config=configs)
    trainer.train(resume_from_checkpoint=case.get("resume"))
    pruner = callback.pruner if case.get("callback") else trainer.pruner
    if case.get("evaluate"):
        print("evaluated", trainer.evaluate())
    trainer.save_model(str(directory / "saved"))
    if case.get("card"):
        trainer.create_model_card()
    files = sorted(p.name for p in (directory/"saved").iterdir())
    config = json.loads((directory/"saved"/"config.json").read_text())
    out = dict(files=files, config={k: config.get(k) for k in ("hidden_size","intermediate_size","num_hidden_layers","num_attention_heads","per_layer_config")}, sparsity=pruner.sparsity, removed=pruner.removed is not None, chosen=pruner.chosen and pruner.chosen.told(), losses=[round(e["loss"],4) for e in trainer.state.log_history if "loss" in e])
    return out

def main(directory):
    import faulthandler
    log = open(directory / f"log{dist.get_rank() if dist.is_initialized() else os.environ['RANK']}.txt", "w")
    os.dup2(log.fileno(), 1); os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(float(os.environ.get("DUMP", 60)), exit=True, file=log)
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        t=time.time(); print("begin", name, flush=True)
        faulthandler.cancel_dump_traceback_later(); faulthandler.dump_traceback_later(100, exit=True, file=log)
        (directory/name).mkdir(exist_ok=True, parents=True)
        try:
            out = run(directory / name, case)
        except Exception as e:
            out = "".join(traceback.format_exception(e)[-12:])
            print(f"=== {name} raised", out, flush=True)
        if isinstance(out, str): os._exit(3)
        dist.barrier()
        print(f"=== {name} {time.time()-t:.1f}s", out if isinstance(out, str) else json.dumps(out), flush=True)
