"""Values of rows and other groups of weights, whole numbers times a scale, and values that become fewer in training."""

import logging

import numpy as np
import pytest
import torch
from models import bert, bert_examples, mixtral, training_arguments
from safetensors.torch import load_file
from test_pruner import FIRST, Stack
from test_sharing import Averages, train_step, trainer_of, values_of

from hf_prune import Pruner, PruningConfig, PruningConfigError, PruningTrainer
from hf_prune.model.layouts import as_matrices
from hf_prune.publish.card import make_files
from hf_prune.quantise.groups import scales_for
from hf_prune.saved.packing import pack_into, unpack_into
from hf_prune.saved.report import make_report

AT_ONCE = {"sparsity": 0.5, "schedule": "one_shot", "begin": 0}
WINDOW = {"sparsity": 0.5, "schedule": "linear", "begin": 2, "end": 4, "frequency": 2}
KINDS = {
    "row": {"shared_values": 3, "shared_values_granularity": "row"},
    "group": {"shared_values": 2, "shared_values_granularity": "group:8"},
    "int8": {"shared_values": "int8"},
    "int4": {"shared_values": "int4", "shared_values_granularity": "group:8"},
    "fewer": {"shared_values": 3, "initial_shared_values": 12},
    "fewer in rows": {"shared_values": 2, "initial_shared_values": 4, "shared_values_granularity": "row"},
}


def most_values(matrix, columns=None):
    groups = matrix if columns is None else matrix.reshape(-1, columns)
    return max(len(values_of(group)) for group in groups)


def codes_of(matrix, levels, columns=None):
    """The whole numbers and scales that the weights of a saved model are, found from the weights alone."""
    groups = matrix if columns is None else matrix.reshape(-1, columns)
    scales = scales_for(groups.float().abs().amax(1, keepdim=True), levels, matrix.dtype)
    codes = torch.where(scales > 0, groups.float() / scales, 0)
    return codes.reshape(matrix.shape), scales


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_their_values_after_every_step_and_zeros_stay(kind, dtype):
    torch.manual_seed(0)
    model, inputs = Stack().to(dtype), torch.randn(10, 3, 8).to(dtype)
    pruner = Pruner(model, PruningConfig(**WINDOW, **KINDS[kind]), total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for step in range(1, 11):
        before = {name: parameter.detach().clone() for name, parameter in pruner.parameters.items()}
        train_step(pruner, optimizer, inputs[step - 1])
        for name, parameter in pruner.parameters.items():
            assert not torch.equal(parameter, before[name])
            if step < 4:
                continue
            assert torch.equal(parameter != 0, pruner.masks[name])
            if kind == "fewer in rows":  # from step 7 on
                assert most_values(parameter) <= (4 if step < 7 else 2)
            elif kind in ("row", "group"):
                assert most_values(parameter) <= KINDS[kind]["shared_values"]
            elif kind == "fewer":
                seen.append((step, len(values_of(parameter))))
            else:
                codes, _ = codes_of(parameter.detach(), 127 if kind == "int8" else 7)
                assert torch.equal(codes, codes.round())
    assert pruner.sparsity == 0.5
    if kind == "fewer":  # halved twice between steps 4 and 7, where half of the training that is left is over
        assert {step: max(number for at, number in seen if at == step) for step in range(4, 11)} == {
            4: 12, 5: 12, 6: 6, 7: 3, 8: 3, 9: 3, 10: 3,
        }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_ends_the_same_to_the_bit(kind, tmp_path):
    config = PruningConfig(**WINDOW, **KINDS[kind])
    whole = trainer_of(tmp_path / "whole", config=config, save_strategy="steps", save_steps=5)
    whole.train()
    resumed = trainer_of(tmp_path / "whole", config=config, save_strategy="steps", save_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name


def test_experts_have_values_for_each_row_of_each_matrix():
    model = mixtral()
    pruner = Pruner(model, PruningConfig(**AT_ONCE, **KINDS["row"]), total_steps=1)
    targets = {target.name: target for target in pruner.targets}
    fused = [name for name in targets if len(targets[name].shape) == 3]
    assert fused
    for name in fused:
        matrices = as_matrices(pruner.parameters[name].detach(), targets[name].layout)
        assert max(map(most_values, matrices)) == 3
        assert len(matrices.unique()) > 3 * matrices.shape[1]


def saved(tmp_path, **fields):
    trainer = PruningTrainer(
        model=bert(),
        args=training_arguments(tmp_path, max_steps=4),
        train_dataset=bert_examples(),
        pruning_config=PruningConfig(**AT_ONCE, **fields),
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    return tmp_path / "saved", list(trainer.pruner.parameters)


def test_values_of_rows_are_counted_told_and_packed(tmp_path):
    folder, names = saved(tmp_path, **KINDS["row"])
    weights = load_file(folder / "model.safetensors")
    report = make_report(folder)
    for tensor in report.prunable:
        assert (tensor.values_in_group, tensor.group) == (most_values(weights[tensor.name]), "row") == (3, "row")
        assert tensor.distinct_values is None or tensor.distinct_values > 3
    assert [tensor.name for tensor in report.tensors if tensor.group is not None] == names
    card = make_files(folder)["README.md"].decode()
    assert "Distinct values: at most 3 other than zero in each row of each prunable tensor" in card
    assert 'shared_values=3, shared_values_granularity="row"' in card
    for name in ("packed", "again"):
        (tmp_path / name).mkdir()
    pack_into(folder, tmp_path / "packed")
    unpack_into(tmp_path / "packed", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert {tensor.values_in_group for tensor in make_report(tmp_path / "packed").prunable} == {3}


def dequantised_by_onnx_runtime(integers, scales):
    """What ONNX Runtime makes of int8 weights with a scale for each row."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    content = [
        onnx.numpy_helper.from_array(integers.numpy(), "weight"),
        onnx.numpy_helper.from_array(scales.view(-1).numpy(), "scales"),
    ]
    node = onnx.helper.make_node("DequantizeLinear", ["weight", "scales"], ["dense"], axis=0)
    out = onnx.helper.make_tensor_value_info("dense", onnx.TensorProto.FLOAT, list(integers.shape))
    graph = onnx.helper.make_graph([node], "weights", [], [out], content)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})[0]


@pytest.mark.parametrize(("values", "levels"), [("int8", 127), ("int4", 7)])
def test_saved_weights_are_whole_numbers_times_a_scale_and_give_these_to_other_runtimes(values, levels, tmp_path):
    """As int8, symmetric for each row, with these scales, every weight is what it was, to the bit."""
    folder, names = saved(tmp_path, shared_values=values)
    weights = load_file(folder / "model.safetensors")
    for name in names:
        codes, scales = codes_of(weights[name], levels)
        assert torch.equal(codes, codes.round())
        assert torch.equal(codes == 0, weights[name] == 0)
        integers = codes.to(torch.int8)
        assert torch.equal(integers.float() * scales, weights[name])
        assert np.array_equal(integers.numpy().astype(np.float32) * scales.numpy(), weights[name].numpy())
    dequantised = dequantised_by_onnx_runtime(integers, scales)
    assert np.array_equal(dequantised, weights[names[-1]].numpy())
    card = make_files(folder)["README.md"].decode()
    assert "in each row of each prunable tensor" in card
    assert f'shared_values="{values}"' in card


def test_weights_that_something_else_has_changed_have_their_values_when_they_are_saved(tmp_path, caplog):
    config = PruningConfig(**WINDOW, **KINDS["int4"])
    trainer = trainer_of(tmp_path, callbacks=[Averages()], config=config, save_strategy="steps", save_steps=5)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "its weights did not share the values of a group of 8 weights of a row" in caplog.text
    tensors = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    for name in trainer.pruner.parameters:
        codes, _ = codes_of(tensors[name], 7, 8)
        assert torch.equal(codes, codes.round()), name


def test_a_cluster_whose_mean_is_zero_keeps_its_weights():
    model = Stack()
    weight = model.layers[0].dense.weight
    with torch.no_grad():
        weight.copy_(torch.tensor([-1.0, 1.0, -5.0, 5.0]).repeat(16).view(8, 8))
    for fields in ({}, {"shared_values_granularity": "row"}):
        config = PruningConfig(sparsity=0.0, schedule="one_shot", begin=0, targets=[FIRST], shared_values=3, **fields)
        pruner = Pruner(model, config, total_steps=2)
        assert (weight != 0).all()
        assert values_of(weight) == [-5.0, torch.finfo(torch.float32).tiny, 5.0]
        assert pruner.masked[FIRST] == 0
        with torch.no_grad():
            weight.copy_(torch.tensor([-1.0, 1.0, -5.0, 5.0]).repeat(16).view(8, 8))


def test_a_plan_tells_which_values_in_which_groups():
    plan = Pruner(Stack(), PruningConfig(**WINDOW, **KINDS["int4"])).plan(10)
    assert plan.shared_as == ["whole numbers up to 7, times a scale for each group of 8 weights of a row"]
    plan = Pruner(Stack(), PruningConfig(**WINDOW, **KINDS["fewer"])).plan(10)
    assert plan.shared_as == ["at most 3 values in each tensor, 12 at first"]


def test_sparsities_count_what_is_asked_to_be_zero(tmp_path):
    """Not biases of neurons that are removed, nor embeddings that only share values; units are told by themselves."""
    configs = [
        PruningConfig(structure="neurons", sparsity=0.5, begin=1, end=2, frequency=1),
        PruningConfig(sparsity=0.25, begin=2, end=4, frequency=1, shared_values=4),
        PruningConfig(method="keep", targets=[r".*position_embeddings\.weight"], shared_values=16),
    ]
    trainer = trainer_of(tmp_path, config=configs)
    plan = trainer.pruner.plan(10)
    assert plan.sparsity_left == 0.25
    assert {tensor.name for tensor in plan.tensors if not tensor.counted} == {
        "bert.embeddings.position_embeddings.weight",
        "bert.encoder.layer.0.intermediate.dense.bias",
        "bert.encoder.layer.1.intermediate.dense.bias",
    }
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    report = make_report(tmp_path / "saved")
    assert report.prunable_sparsity == 0.25
    assert {tensor.sparsity for tensor in report.prunable} == {0.25}
    assert trainer.pruner.sparsity == trainer.pruner.target_sparsity
    card = make_files(tmp_path / "saved")["README.md"].decode()
    assert f"Distinct values: at most 16 other than zero in {len(report.prunable) + 1} tensors" in card


def test_two_kinds_of_values_for_a_tensor_are_refused():
    configs = [PruningConfig(**AT_ONCE, shared_values=4), PruningConfig(method="keep", begin=1, shared_values="int8")]
    with pytest.raises(PruningConfigError, match=r"shared_values: expected the same kind of values"):
        Pruner(Stack(), configs)
