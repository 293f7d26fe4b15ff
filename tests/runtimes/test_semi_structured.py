"""2:4 for GPUs: which layers fit, which tensors of a saved model do, and a clear error without the hardware."""

import json

import pytest
import torch
from models import bert, gpt2
from torch import nn

import hf_prune
from hf_prune import Pruner, PruningConfig
from hf_prune.cli.commands import app
from hf_prune.errors import HardwareError
from hf_prune.runtimes import semi_structured
from hf_prune.runtimes.semi_structured import has_two_of_four, why_not
from hf_prune.saved.report import make_report


def two_of_four(model, **options):
    config = PruningConfig(pattern="2:4", schedule="one_shot", begin=0, **options)
    pruner = Pruner(model, config, total_steps=2)
    pruner.update(0)
    return model


def test_at_most_two_of_four_along_the_inputs():
    rows = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3], [0, 0, 1, 1, 1, 1, 0, 0]])
    assert has_two_of_four(rows)
    assert not has_two_of_four(rows.roll(1, 1))
    assert not has_two_of_four(rows[:, :6])
    assert not has_two_of_four(rows + 1)


def test_a_layer_says_why_it_is_left_dense():
    layer = nn.Linear(64, 32, dtype=torch.bfloat16)
    assert "3 or 4 that are not zero" in why_not(layer)
    with torch.no_grad():
        layer.weight.view(-1, 4)[:, 1:3] = 0
    assert why_not(layer) is None
    assert why_not(layer.float()) == "expected float16 or bfloat16, got float32"
    odd = why_not(nn.Linear(32, 32, dtype=torch.float16))
    assert odd == "expected multiples of 32 outputs and 64 inputs, got 32 and 32"


def test_without_the_hardware_it_is_an_error_that_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardwareError, match=r"compute capability 8\.0 or newer .*finds none.*sparse_inference"):
        hf_prune.semi_structured(bert())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(HardwareError, match=r"Tesla T4 has 7\.5"):
        semi_structured.semi_structured(bert())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_outputs_on_a_gpu_are_those_of_the_dense_layer():
    layer = nn.Sequential(nn.Linear(128, 64)).to("cuda", torch.float16).eval()
    with torch.no_grad():
        layer[0].weight.view(-1, 4)[:, 1:3] = 0
    inputs = torch.randn(32, 128, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        expected = layer(inputs)
    assert hf_prune.semi_structured(layer).converted == ["0"]
    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_report_says_which_tensors_have_the_pattern(tmp_path, build, capsys):
    model = two_of_four(build())
    model.save_pretrained(tmp_path)
    report = make_report(tmp_path)
    assert set(report.two_of_four) == {tensor.name for tensor in report.prunable}
    assert app(["report", str(tmp_path)], standalone_mode=False) is None
    assert f"{len(report.prunable)} of {len(report.prunable)} prunable tensors have the pattern 2:4." in (
        capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    )


def test_a_report_names_them_where_it_is_not_all(tmp_path, capsys):
    name = "bert.encoder.layer.0.output.dense.weight"
    model = two_of_four(bert(), targets=[name])
    with torch.no_grad():  # as many zeros, elsewhere
        model.bert.encoder.layer[1].output.dense.weight[:, :12] = 0
    model.save_pretrained(tmp_path)
    app(["report", str(tmp_path), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["two_of_four"] == [name]
    app(["report", str(tmp_path)], standalone_mode=False)
    assert f"1 of 12 prunable tensors has the pattern 2:4: {name}." in capsys.readouterr().out


def test_a_dense_model_has_none(tmp_path):
    bert().save_pretrained(tmp_path)
    assert list(make_report(tmp_path).two_of_four) == []
