"""Models computed on a device while their weights stay elsewhere; here both are the CPU, and copies are made."""

import collections
import json
import re
import weakref
from pathlib import Path

import architectures
import models
import pytest
import torch
from safetensors.torch import load_file
from streamed import check, micro_batches, plain_outputs, tensors_in
from test_commands import invoke, refused
from test_run import write_csv
from text_models import save_text_model, texts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from hf_prune import CalibrationConfig, PruningConfig, prune
from hf_prune.errors import CalibrationConfigError, CalibrationError, PruningConfigError
from hf_prune.model.targets import find_targets
from hf_prune.oneshot.lockstep import Lockstep
from hf_prune.oneshot.offload import DiskStore
from hf_prune.oneshot.onload import Onload
from hf_prune.oneshot.perplexity import perplexity, streamed_perplexity
from hf_prune.oneshot.planning import plan_memory
from hf_prune.oneshot.quality import prune_to_quality
from hf_prune.oneshot.sensitivity import measure_sensitivity
from hf_prune.oneshot.settings import set_for_streaming
from hf_prune.recipe.one_shot import prune_saved
from hf_prune.recipe.schema import DatasetSection
from hf_prune.structure.batches import on_model

CPU = torch.device("cpu")

CLASSES = (
    *("LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "MixtralForCausalLM", "AlbertForMaskedLM"),
    *("GptOssForCausalLM", "SwitchTransformersForConditionalGeneration", "ConvNextForImageClassification"),
)

# They use weights without a call of their modules.
WITHOUT_CALLS = (
    *("MambaForCausalLM", "Qwen3NextForCausalLM", "MobileBertForMaskedLM", "BigBirdForMaskedLM"),
    *("ProphetNetForCausalLM", "ReformerModelWithLMHead", "Gemma3nForCausalLM", "NystromformerForMaskedLM"),
)


@pytest.fixture(scope="module")
def by_class():
    return {one.class_name: one for one in architectures.architectures(CLASSES + WITHOUT_CALLS)}


class Reads(TorchDispatchMode):
    """Which operations read parameters and buffers where they stay."""

    def __init__(self, model):
        super().__init__()
        self._names = weakref.WeakKeyDictionary()
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor.untyped_storage()): name for name, tensor in tensors if tensor.numel()}
        self._alive = [tensor.untyped_storage() for _, tensor in tensors]
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and not func.is_view:
                name = self._names.get(id(value.untyped_storage()))
                if name is not None and func is not torch.ops.aten._to_copy.default:
                    self.found[name, str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", [None, DiskStore])
@pytest.mark.parametrize("class_name", CLASSES)
def test_a_stream_is_the_same_bit_for_bit_with_weights_that_stay_elsewhere(class_name, store, by_class):
    trial = architectures.find_trial(by_class[class_name])
    found = check(trial.model(), micro_batches(trial.batch), device=CPU, store=store)
    assert (found["pruned"], found["dense"], found["inputs"]) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("class_name", CLASSES + WITHOUT_CALLS)
def test_no_operation_reads_a_weight_where_it_stays(class_name, by_class):
    trial = architectures.find_trial(by_class[class_name])
    model = trial.model()
    plain = plain_outputs(model, [trial.batch])[0]
    reads = Reads(model)
    with torch.no_grad(), set_for_streaming(model), reads:
        model(**on_model(trial.batch, model))
        assert reads.found
        reads.found.clear()
        with Onload(model, CPU):
            outputs = tensors_in(model(**on_model(trial.batch, model)))
    assert not reads.found
    assert all(map(torch.equal, outputs, plain))


def token_batches(number=3):
    return [{"input_ids": torch.randint(5, models.VOCABULARY, (2, 8))} for _ in range(number)]


def memory_of(model):
    return {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def is_as_before(model, before):
    return memory_of(model) == before and not any("forward" in module.__dict__ for module in model.modules())


def test_each_weight_is_copied_once_for_all_passes_of_a_kind(monkeypatch):
    model = models.llama()
    copied = collections.Counter()
    of_stream = Lockstep._apart

    def counting(self, function):
        if self._running is not None:
            copied[function.func.__self__.data_ptr()] += 1
        return of_stream(self, function)

    monkeypatch.setattr(Lockstep, "_apart", counting)
    for stop in Lockstep(model, token_batches(5), find_targets(model), dense_twin=True, device=CPU):
        stop.set(stop.weight)
    weights = {one.data_ptr() for one in model.model.layers.parameters()}
    assert weights <= set(copied) | {model.model.layers[-1].mlp.down_proj.weight.data_ptr()}
    assert max(copied[one] for one in weights) == 2  # dense twins, and the pruned model


def test_a_small_share_of_the_weights_is_there_at_once_and_planned():
    model = models.llama(num_hidden_layers=6)
    batches = token_batches()
    made = Lockstep(model, batches, find_targets(model), device=CPU)
    for stop in made:
        stop.set(stop.weight)
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert largest <= made.onloaded <= 2 * largest
    assert made.onloaded < sum(parameter.nbytes for parameter in model.parameters()) / 2
    with torch.device("meta"):
        on_meta = models.llama(num_hidden_layers=6)
    calibration = CalibrationConfig(samples=6, length=8, batch_size=2)
    there = plan_memory(on_meta, PruningConfig(method="sparsegpt", sparsity=0.5), calibration, 8)
    elsewhere = plan_memory(
        on_meta,
        PruningConfig(method="sparsegpt", sparsity=0.5),
        CalibrationConfig(**{**calibration.to_dict(), "device": "cuda"}),
        8,
    )
    assert there.onloaded == 0
    assert elsewhere.onloaded == made.onloaded
    assert there.peak <= elsewhere.peak <= there.peak + made.onloaded


def test_perplexity_is_the_same_and_needs_each_weight_once(monkeypatch):
    model, windows = models.llama(), torch.randint(5, models.VOCABULARY, (7, 12))
    expected = perplexity(model, windows, 2)
    copied = collections.Counter()
    of_stream = Lockstep._apart

    def counting(self, function):
        copied[function.func.__self__.data_ptr()] += self._running is not None
        return of_stream(self, function)

    monkeypatch.setattr(Lockstep, "_apart", counting)
    assert streamed_perplexity(model, windows, 2, CPU) == expected
    assert streamed_perplexity(model, windows, 2, CPU, DiskStore) == expected
    assert {copied[parameter.data_ptr()] for parameter in model.parameters()} == {2}  # once in each
    assert is_as_before(model, memory_of(model))


def test_a_part_of_a_model_that_is_called_by_itself_is_computed_there():
    model = models.t5().eval()
    tokens = token_batches()[0]["input_ids"]
    with torch.no_grad():
        expected = model.get_encoder()(input_ids=tokens).last_hidden_state
    reads = Reads(model)
    with torch.no_grad(), reads, Onload(model, CPU):
        found = model.get_encoder()(input_ids=tokens).last_hidden_state
    assert not reads.found
    assert torch.equal(found, expected)


def test_what_is_set_while_it_is_used_is_what_is_used_from_then_on():
    model = models.llama()
    weight = model.model.norm.weight
    with torch.no_grad(), Onload(model, CPU) as onload:
        with onload._there(weight):
            onload.set(weight, lambda: weight.data.fill_(3))
            assert weight.eq(3).all()
            onload.set(weight, lambda: setattr(weight, "data", torch.full_like(weight, 5)))
            assert weight.eq(5).all()
        assert weight.eq(5).all()


def test_a_model_is_as_before_after_a_stream_that_is_left_and_after_an_error():
    model = models.mixtral()
    before = memory_of(model)
    stream = iter(Lockstep(model, token_batches(), find_targets(model), dense_twin=True, device=CPU))
    while not next(stream).target.layout.startswith("experts"):
        assert any("forward" in module.__dict__ for module in model.modules())
    stream.close()
    assert is_as_before(model, before)

    def fail(module, arguments):
        raise RuntimeError("on the way")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"), Onload(model, CPU):
        model(**token_batches()[0])
    assert is_as_before(model, before)
    hook.remove()


class Doubling(torch.nn.Module):
    """It doubles a weight of another module, and returns that."""

    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]  # no submodule

    def forward(self, hidden):
        self.owner[0].scale.mul_(2)
        return torch.zeros_like(hidden) + self.owner[0].scale


def test_what_forward_changes_where_it_stays_is_copied_anew():
    model = models.llama()
    model.owner = torch.nn.Module()  # never called
    model.owner.scale = torch.nn.Parameter(torch.ones(model.config.hidden_size))
    model.model.norm = Doubling(model.owner)
    model.lm_head = torch.nn.Identity()
    with torch.no_grad(), Onload(model, CPU) as onload, onload.held():
        found = [float(model(**token_batches()[0]).logits.max()) for _ in range(3)]
    assert found == [2, 4, 8]


# ---- Functions that prune, with weights that stay elsewhere ----


@pytest.fixture
def elsewhere(monkeypatch):
    """`device="cpu"` means that weights are copied, as for an accelerator."""

    def device_of(model, calibration):
        return None if calibration.device is None else torch.device(calibration.device)

    for module in ("onload", "prune", "run", "planning", "sensitivity"):
        monkeypatch.setattr(f"hf_prune.oneshot.{module}.device_of", device_of)
    monkeypatch.setattr("hf_prune.recipe.one_shot.device_of", device_of)


def copies(monkeypatch):
    """How often weights are copied from now on."""
    counted = collections.Counter()
    of_onload = Onload.copy_of

    def counting(self, tensor):
        counted["copies"] += 1
        return of_onload(self, tensor)

    monkeypatch.setattr(Onload, "copy_of", counting)
    return counted


@pytest.mark.parametrize("build", [models.llama, models.mixtral, models.gpt2])
@pytest.mark.parametrize("options", [{}, {"scope": "owl"}], ids=["layer", "owl"])
def test_pruning_gives_the_same_weights(build, options, elsewhere, monkeypatch, tmp_path):
    found = []
    data = torch.randint(5, models.VOCABULARY, (12, 16))
    for device in (None, "cpu"):
        torch.manual_seed(0)
        model = build()
        before = memory_of(model)
        counted = copies(monkeypatch)
        calibration = CalibrationConfig(device=device, offload="disk")
        config = PruningConfig(method="sparsegpt", sparsity=0.5, **options)
        prune(model, config, data, calibration, directory=tmp_path / str(device))
        assert bool(counted) == (device is not None)
        found.append(model.state_dict())
        if build is models.gpt2:  # no tensor is mapped from a file
            assert is_as_before(model, before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_is_resumed_with_weights_on_the_device(elsewhere, tmp_path):
    data = torch.randint(5, models.VOCABULARY, (4, 16))
    config = PruningConfig(method="sparsegpt", sparsity=0.5)

    def stop_at_four(done, total, layer):
        if done == 4:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    model = models.llama()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        prune(model, config, data, CalibrationConfig(device="cpu"), directory=tmp_path, progress=stop_at_four)
    finished = []
    for options in ({"directory": tmp_path, "resume": True}, {}):
        model = models.llama()
        model.load_state_dict(state)
        prune(model, config, data, CalibrationConfig(), **options)
        finished.append(model.state_dict())
    assert all(torch.equal(finished[0][name], finished[1][name]) for name in state)


def test_sensitivity_and_a_search_for_a_quality_are_the_same(elsewhere, monkeypatch):
    data, held_out = torch.randint(5, models.VOCABULARY, (2, 4, 16))
    losses, tried = [], []
    for device in (None, "cpu"):
        torch.manual_seed(0)
        model = models.mixtral()
        counted = copies(monkeypatch)
        calibration = CalibrationConfig(device=device)

        def evaluate(one):
            return perplexity(one, held_out)

        config = PruningConfig(method="sparsegpt", sparsity=0.5)
        found = measure_sensitivity(model, config, data, evaluate, [0.5], calibration)
        losses.append(found.to_dict()["tensors"])
        trials = prune_to_quality(model, config, data, evaluate, 0.9, calibration, step=0.25)[1]
        tried.append(trials)
        assert bool(counted) == (device is not None)
    assert losses[0] == losses[1]
    assert tried[0] == tried[1]


def test_what_a_device_cannot_be_is_said_before_anything_is_changed(monkeypatch, tmp_path):
    data = torch.randint(5, models.VOCABULARY, (4, 16))
    config = PruningConfig(method="sparsegpt", sparsity=0.5)
    model = models.llama()
    for device, problem in (
        ("cdua", "expected a device of torch, such as cuda, got 'cdua'"),
        ("meta", "expected a device that can compute"),
    ):
        with pytest.raises(CalibrationError, match=f"device: {problem}"):
            prune(model, config, data, CalibrationConfig(device=device), directory=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    with pytest.raises(CalibrationConfigError, match="device: expected the name of a device of torch, or None, got 0"):
        CalibrationConfig(device=0)
    needs_gradients = PruningConfig(method="sparsegpt", sparsity=0.5, scope="sensitivity")
    with pytest.raises(PruningConfigError, match="scope: cannot be 'sensitivity' with weights that stay on the CPU"):
        prune(model, needs_gradients, data, CalibrationConfig(device="cuda"))
    with pytest.raises(CalibrationError, match="expected a model that is computed on an accelerator for 'cpu'"):
        prune(model, config, data, CalibrationConfig(device="cpu", offload="cpu"))
    prune(model, config, data, CalibrationConfig(device="cpu"))  # where the weights are


def test_the_command_plans_for_a_device_that_is_not_here(tmp_path):
    save_text_model(tmp_path / "model", models.llama)
    command = ("prune", tmp_path / "model", tmp_path / "out", "--data", "none", "--sparsity", 0.5, "--length", 16)
    said = refused(*command, "--offload-weights")
    assert "--offload-weights: expected an accelerator to compute on, such as --device cuda, got none" in " ".join(said)
    result = invoke(*command, "--device", "cuda", "--offload-weights", "--offload", "cpu", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["calibration"]["device"] == "cuda"
    assert 0 < plan["memory"]["onloaded"] < plan["memory"]["model"]
    shown = invoke(*command, "--device", "cuda", "--offload-weights", "--dry-run").stdout
    assert "weights on cuda at once" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--device", "gpu"), "--device: expected a device of torch, such as cuda, got 'gpu'"),
        (("--device", "meta", "--offload-weights"), "--device: expected a device that can compute"),
        (("--device", "cpu:0", "--offload-weights"), "--offload-weights: expected an accelerator to compute on"),
        (("--offload", "cpu"), "--offload: expected --device with an accelerator for cpu, got none"),
        (("--device", "cuda", "--offload-weights", "--scope", "sensitivity"), "scope: cannot be 'sensitivity'"),
        (("--target-quality", 0.9, "--resume"), "--target-quality: must not be set with --resume"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(options, problem, tmp_path):
    save_text_model(tmp_path / "model", models.llama)
    command = ("prune", tmp_path / "model", tmp_path / "out", "--data", "none", "--sparsity", 0.5, "--length", 16)
    assert problem in " ".join(refused(*command, *options, "--dry-run"))


@pytest.mark.parametrize(("target_quality", "offload"), [(None, None), (0.5, None), (None, "disk")])
def test_a_saved_model_is_pruned_and_measured_in_the_same_way(target_quality, offload, elsewhere, tmp_path):
    save_text_model(tmp_path / "model", models.llama)
    write_csv(tmp_path / "texts.csv", [{"text": text} for text in texts(60)])
    section = DatasetSection(name=str(tmp_path / "texts.csv"), text_column="text")
    config = PruningConfig(method="sparsegpt", sparsity=0.5)
    found = [
        prune_saved(
            str(tmp_path / "model"),
            tmp_path / str(device),
            config,
            section,
            CalibrationConfig(samples=4, length=12, device=device, offload=offload),
            target_quality=target_quality,
            say=lambda text: None,
        )
        for device in (None, "cpu")
    ]
    assert found[0].metrics == found[1].metrics
    assert found[0].dense_metrics == found[1].dense_metrics
    weights = [load_file(tmp_path / device / "model.safetensors") for device in ("None", "cpu")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_memory_of_a_large_model_is_what_the_docs_say():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes |= {"num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 131072, "dtype": "bfloat16"}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    calibration = CalibrationConfig(device="cuda", offload="cpu")
    memory = plan_memory(model, PruningConfig(method="sparsegpt", sparsity=0.5), calibration, 2048)
    page = Path(__file__, "../../../docs/one_shot.md").resolve().read_text(encoding="utf-8")
    on_gpu, on_cpu = re.findall(r"\| [^|]*(?:-weights --offload cpu`|then on the CPU)[^|]*\| ([^|]*) \|", page)
    assert on_gpu == f"{(memory.peak - memory.masks) / 1e9:.1f}"
    assert on_cpu == f"{memory.model / 1e9:.0f} + {memory.offloaded / 1e9:.0f} + {memory.masks / 1e9:.1f}"
