"""What a model card says of the training: calibration, steps, distillation, penalties, machine, emissions."""

from collections.abc import Mapping
from typing import Any

from .markdown import inline
from .record import Calibration, Distillation, RunRecord
from .sources import described, linked


def training_lines(record: RunRecord) -> list[str]:
    """A line for each thing that is known of the training."""
    lines = []
    if record.dense_steps:
        lines.append(f"First trained dense for {record.dense_steps:,} optimizer steps{_on_data(record)}.")
    if record.calibration is not None:
        lines.append(_calibrated(record.calibration))
        lines += [inline(note) for note in record.calibration.notes]
    if record.steps:
        lines.append(_trained(record))
    if record.distillation is not None:
        lines.append(_distilled(record.distillation))
    logged = {name for entry in record.history for name, value in entry.items() if value}
    acted = [config for config in record.pruning if f"{config.get('penalty')}_penalty" in logged]
    lines += dict.fromkeys(map(_penalised, acted))
    if record.versions:
        lines.append(", ".join(f"{inline(name)} {inline(text)}" for name, text in record.versions.items()) + ".")
    machine = record.hardware
    if machine is not None:
        processes = f", {machine.processes} processes" if machine.processes > 1 else ""
        accelerator = f", {inline(machine.accelerator)}" if machine.accelerator else ""
        lines.append(f"On {inline(machine.processor)}, {machine.cores} cores{accelerator}{processes}.")
    emissions = record.emissions
    if emissions is not None:
        country = f" for the electricity of {inline(emissions.country)}" if emissions.country else ""
        lines.append(
            f"Emissions of the training, estimated by codecarbon{country}: {emissions.kilograms * 1000:.4g} g of "
            f"CO2 equivalent, {emissions.kilowatt_hours:.4g} kWh in {emissions.seconds:.0f} s."
        )
    return lines


def _calibrated(calibration: Calibration) -> str:
    """The calibration data, and what layers approximate."""
    if not calibration.samples:
        return "Pruned at once, from the weights alone."
    length = f" of {calibration.length:,} tokens" if calibration.length is not None else ""
    what = f"windows{length}" if length else "samples"
    data = f" of {described(calibration.dataset)}" if calibration.dataset is not None else ""
    seed = f"; seed {calibration.seed}" if calibration.seed is not None else ""
    text = f"Pruned at once from {calibration.samples:,} {what}{data}, {calibration.tokens:,} tokens{seed}."
    if calibration.dense_weight:
        text += (
            " Each layer approximates the outputs that it has in the dense model (weight "
            f"{_plain(calibration.dense_weight)}; weight of what the residual stream lacks "
            f"{_plain(calibration.residual_weight)})."
        )
    return text + (f" Damping {_plain(calibration.damping)}." if calibration.damping is not None else "")


def _trained(record: RunRecord) -> str:
    epochs = f", {record.epochs:.4g} {'epoch' if record.epochs == 1 else 'epochs'}" if record.epochs is not None else ""
    seed = f"; seed {record.seed}" if record.seed is not None else ""
    kept = record.kept_step if record.kept_step not in (None, record.steps) else None
    best = f" The weights are those of step {kept:,}, which had the best evaluation." if kept is not None else ""
    trained = "Then trained, with its zeros kept," if record.calibration is not None else "Trained"
    return f"{trained} for {record.steps:,} optimizer steps{epochs}{_on_data(record)}{seed}.{best}"


def _on_data(record: RunRecord) -> str:
    """The training data, after a number of steps."""
    samples = f" of {record.train_samples:,} samples" if record.train_samples is not None else ""
    return samples + (f" of {described(record.training_data)}" if record.training_data is not None else "")


def _distilled(distillation: Distillation) -> str:
    """The teacher, and the weights of the distillation losses."""
    if distillation.teacher is not None:
        teacher = linked(distillation.teacher)
    elif distillation.teacher_base is not None:
        teacher = f"a model based on {linked(distillation.teacher_base)}"
    else:
        teacher = "a teacher of unknown name"
    pairs = ", ".join(f"{one} with {other}" for one, other in distillation.hidden_layers or ())
    layers = f" (layers of the model with layers of the teacher: {pairs})" if pairs else ""
    hidden = (
        f", weight of the hidden-state loss {_plain(distillation.hidden_weight)}{layers}"
        if distillation.hidden_weight
        else ""
    )
    return (
        f"Distilled from {teacher}: weight of the distillation loss {_plain(distillation.weight)}, temperature "
        f"{_plain(distillation.temperature)}{hidden}."
    )


def _penalised(config: Mapping[str, Any]) -> str:
    """The penalty, and its weight."""
    return (
        f"A penalty on the weights to prune ({inline(config['penalty'])}) was added to the loss; its weight grew "
        f"towards {_plain(config['penalty_weight'])} with the sparsity."
    )


def _plain(value: float) -> str:
    return f"{value:g}"
