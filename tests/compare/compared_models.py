"""Small saved models with records of measurements, to be compared."""

import torch
from models import bert

from hf_prune.publish.card import write_card
from hf_prune.publish.record import Cost, Evaluation, Hardware, PassCost, RunRecord, Source, save_record
from hf_prune.saved.model import SavedModel

HARDWARE = Hardware(processor="a processor", cores=2, threads=1)
DATA = Source(name="reviews", rows="where source is a")


def evaluation(value, part="test", metric="accuracy", samples=400, dataset=DATA, dense=None):
    return Evaluation(
        metrics={metric: value},
        main_metric=metric,
        part=part,
        samples=samples,
        dataset=dataset,
        dense_metrics={metric: dense} if dense is not None else None,
    )


def cost(milliseconds, samples=1, dense=None, length=8):
    def of(value):
        return PassCost(seconds=value / 1000, quartiles=[value / 1000, 1.1 * value / 1000])

    dense = of(dense) if dense is not None else None
    return Cost(shapes={"input_ids": [samples, length]}, passes=20, model=of(milliseconds), dense=dense)


def save_compared(
    folder, sparsity, evaluations=(), costs=(), hardware=HARDWARE, layers=2, with_card=False, generation=None
):
    """A saved BERT, the first share of each of whose prunable matrices is zero, with the record of its measurements."""
    torch.manual_seed(0)
    model = bert(num_hidden_layers=layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter))
            if "encoder" in name and parameter.ndim == 2:
                parameter.view(-1)[: round(sparsity * parameter.numel())] = 0
    model.save_pretrained(folder)
    saved = SavedModel(folder)
    record = RunRecord(
        name=folder.name,
        evaluations=list(evaluations),
        costs=list(costs),
        hardware=hardware,
        weights=saved.hashes,
        generation=generation,
    )
    save_record(saved, record)
    if with_card:
        write_card(saved)
    return folder
