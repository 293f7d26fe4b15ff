"""Paused forward passes whose tensors wait in memory of the CPU or in a file: what they compute stays the same."""

import gc
import threading
from pathlib import Path

import accelerate
import architectures
import models
import pytest
import torch
from streamed import check, micro_batches, stream
from torch import nn
from transformers import AutoModelForCausalLM

from hf_prune import CalibrationConfig, PruningConfig, prune
from hf_prune.errors import CalibrationConfigError, CalibrationError, PlacementError
from hf_prune.model.targets import find_targets
from hf_prune.oneshot.lockstep import Lockstep
from hf_prune.oneshot.offload import CpuStore, DiskStore, Offload
from hf_prune.oneshot.passes import Pass
from hf_prune.oneshot.planning import plan_memory

THREADS = []  # in which `note_thread` was computed

STORES = {"cpu": CpuStore, "disk": DiskStore}

CLASSES = (
    *("LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "MixtralForCausalLM", "AlbertForMaskedLM"),
    *("SwitchTransformersForConditionalGeneration", "MambaForCausalLM", "WhisperForConditionalGeneration"),
)


@pytest.fixture(scope="module")
def by_class():
    return {one.class_name: one for one in architectures.architectures(CLASSES)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("class_name", CLASSES)
def test_a_stream_is_the_same_bit_for_bit_with_its_tensors_elsewhere(class_name, store, by_class):
    trial = architectures.find_trial(by_class[class_name])
    found = check(trial.model(), micro_batches(trial.batch), store=STORES[store])
    assert (found["pruned"], found["dense"], found["inputs"]) == (0, 0, 0)


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.t5, models.mixtral])
def test_all_that_a_stream_gives_is_the_same(build):
    def streamed(store):
        torch.manual_seed(0)
        model = build()
        batches = [{"input_ids": torch.randint(5, models.VOCABULARY, (2, 8))} for _ in range(3)]
        if model.config.is_encoder_decoder:
            batches = [{**one, "decoder_input_ids": one["input_ids"][:, 1:]} for one in batches]
        batches[0]["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
        torch.manual_seed(1)
        _, outputs, inputs = stream(model, batches, find_targets(model), store=store)
        return outputs, inputs

    (outputs, inputs), (outputs_elsewhere, inputs_elsewhere) = streamed(None), streamed(DiskStore)
    assert outputs.keys() == outputs_elsewhere.keys()
    for key, one in outputs.items():
        assert all(map(torch.equal, one, outputs_elsewhere[key]))
    assert inputs.keys() == inputs_elsewhere.keys()
    for key, given in inputs.items():
        for one, other in zip(given, inputs_elsewhere[key], strict=True):
            assert [value is None for value in one] == [value is None for value in other]
            assert all(map(torch.equal, filter(torch.is_tensor, one), filter(torch.is_tensor, other)))


class Counting(DiskStore):
    """A file, and how many bytes are in it."""

    def __init__(self):
        super().__init__()
        self.now = self.written = 0
        Counting.latest = self

    def write(self, content):
        self.now += len(content)
        self.written += len(content)
        return super().write(content)

    def free(self, place):
        self.now -= place[1]
        super().free(place)


def test_between_two_layers_no_pass_holds_anything():
    model = models.llama()
    batches = [{"input_ids": torch.randint(5, models.VOCABULARY, (2, 8))} for _ in range(3)]
    made = Lockstep(model, batches, find_targets(model), dense_twin=True, store=Counting)
    for stop in made:
        held = [storage for one in made._offload._made.values() for storage in one]
        assert len(held) >= 12
        assert not any(storage.nbytes() for storage in held)
        assert Counting.latest.now == sum(kept.size for one in made._offload._made.values() for kept in one.values())
        list(stop.inputs())
        assert not any(storage.nbytes() for storage in held)
        del held
    assert Counting.latest.now == 0
    assert Counting.latest._end < Counting.latest.written / 2  # places are used again


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.add_(1),
        lambda tensor: tensor[2:5].mul_(3),
        lambda tensor: torch.add(tensor, 1, out=tensor),
        lambda tensor: tensor.view(2, -1)[1].__setitem__(0, 7.0),
    ],
    ids=["in place", "a view", "out", "an item"],
)
def test_what_has_not_changed_is_written_once_and_what_has_again(change):
    store = Counting()
    offload = Offload(store)
    with offload.watching("a pass"):
        tensor = torch.rand(1000)
    expected = tensor.clone()
    change(expected)
    for _ in range(3):
        offload.put_away("a pass")
        assert tensor.untyped_storage().nbytes() == 0
        offload.bring_back("a pass")
        assert store.written == 4000
    with offload.watching("a pass"):
        change(tensor)
    offload.put_away("a pass")
    assert (store.written, store.now) == (8000, 4000)
    offload.bring_back("a pass")
    assert torch.equal(tensor, expected)
    offload.end()
    assert store.now == 0


class Remembering(nn.Module):
    """Computes something in the first call of a forward pass that came after others, and keeps it for later ones."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.calls = 0
        self.scale = None

    def forward(self, *arguments, **options):
        self.calls += 1
        if self.calls == 2:  # the first is seen before the stream
            self.scale = torch.full((2, 1), 1.5) + 0
        return self.layer(*arguments, **options) * (1 if self.scale is None else self.scale[:1].reshape(()))


@pytest.mark.parametrize("whole", [True, False], ids=["to the end", "left early"])
def test_what_passes_share_through_the_model_stays(whole):
    model = models.bert()
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = kept = Remembering(nn.GELU())
    batches = [{"input_ids": torch.randint(5, models.VOCABULARY, (2, 8))} for _ in range(3)]
    outputs = {}
    made = Lockstep(
        model,
        batches,
        find_targets(model),
        on_output=lambda index, dense, output: outputs.update({index: output.logits}),
        store=DiskStore,
    )
    for stop in made:
        if not whole and "output.dense" in stop.target.name and "attention" not in stop.target.name:
            break
    gc.collect()
    assert kept.scale.tolist() == [[1.5], [1.5]]
    if whole:
        with torch.no_grad():
            for index, batch in enumerate(batches):
                assert torch.equal(outputs[index], model.eval()(**batch).logits)


def test_views_and_memory_that_numpy_has_are_as_they_were():
    store = DiskStore()
    offload, owner = Offload(store), object()
    with offload.watching(owner):
        values = torch.arange(24.0).reshape(4, 6) + 1
        view = values[1:3, ::2]
        shown = torch.ones(5) * 2
    array = shown.numpy()
    before = view.clone()
    offload.put_away(owner)
    assert values.untyped_storage().nbytes() == 0
    assert torch.equal(offload.copy_of(view), before)
    assert values.untyped_storage().nbytes() == 0
    assert array.tolist() == [2.0] * 5  # stayed
    offload.bring_back(owner)
    assert torch.equal(view, before)
    assert values[1, 0] == 7
    with offload.watching(owner):
        values += 1
    offload.put_away(owner)
    offload.end()
    assert torch.equal(view, before + 1)


def test_a_disk_that_is_full_is_an_error():
    store = DiskStore()
    store._file.close()
    store._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed below
    with pytest.raises(CalibrationError, match=r"offload: expected a disk at .* No space left"):
        store.write(torch.zeros(10, dtype=torch.uint8))
    store.close()


def pruned_to(directory, **calibration):
    torch.manual_seed(0)
    model = models.llama()
    data = torch.randint(3, 60, (4, 8))
    config = PruningConfig(method="alps", sparsity=0.5)
    prune(model, config, data, CalibrationConfig(**calibration), directory=directory, resume=directory.exists())
    return model.state_dict()


def test_a_model_is_pruned_the_same_from_disk_and_the_folder_is_left_as_without(tmp_path):
    plain = pruned_to(tmp_path / "plain")
    from_disk = pruned_to(tmp_path / "disk", offload="disk")
    assert all(torch.equal(plain[name], from_disk[name]) for name in plain)
    folders = [sorted(path.name for path in (tmp_path / name / "one_shot").iterdir()) for name in ("plain", "disk")]
    assert folders[0] == folders[1]
    # A run that was stopped may go on with or without it.
    last = sorted((tmp_path / "plain" / "one_shot").glob("*.safetensors"))[-1]
    last.unlink()
    resumed = pruned_to(tmp_path / "plain", offload="disk")
    assert all(torch.equal(plain[name], resumed[name]) for name in plain)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.mixtral])
def test_pruned_weights_and_masks_are_mapped_from_the_folder(tmp_path, build):
    def pruned(name, **calibration):
        torch.manual_seed(0)
        build().save_pretrained(tmp_path / f"{name}-dense")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-dense")
        data = torch.arange(3, 35).view(4, 8)
        config = PruningConfig(method="sparsegpt", sparsity=0.5)
        done = prune(model, config, data, CalibrationConfig(**calibration), directory=tmp_path / name)
        return model, done

    plain, done_plain = pruned("plain")
    mapped, done_mapped = pruned("mapped", offload="disk")
    folder = f"{tmp_path}/mapped/one_shot/"
    files = {line for line in Path("/proc/self/maps").read_text().splitlines() if folder in line}
    targets = find_targets(mapped)
    matrices = sum(target.layout == "matrix" for target in targets)  # neither Conv1D of GPT-2 nor fused experts
    assert len({line.split()[-1] for line in files}) == matrices
    assert (matrices > 0) == (build is not models.gpt2)
    assert list(done_plain.masks) == list(done_mapped.masks)
    assert all(torch.equal(mask, done_mapped.masks[name]) for name, mask in done_plain.masks.items())
    # What is in files goes on as any other model: it trains, and is saved with its masks after the files are gone.
    mapped(input_ids=torch.arange(3, 11)[None], labels=torch.arange(3, 11)[None]).loss.backward()
    mapped.save_pretrained(tmp_path / "mapped")
    done_mapped.save(tmp_path / "mapped")
    assert not (tmp_path / "mapped" / "one_shot").exists()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "mapped").state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, opened[name])
        assert torch.equal(weight, mapped.state_dict()[name])
    torch.optim.SGD(mapped.parameters(), lr=1.0).step()
    assert not torch.equal(plain.state_dict()[targets[0].name], mapped.state_dict()[targets[0].name])


def test_places_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(CalibrationConfigError, match="offload: expected cpu, disk or None, got 'gpu'"):
        CalibrationConfig(offload="gpu")
    with pytest.raises(
        CalibrationError, match="offload: expected a model that is computed on an accelerator for 'cpu'"
    ):
        pruned_to(tmp_path, offload="cpu")


def test_the_plan_knows_what_is_elsewhere():
    with torch.device("meta"):
        model = models.llama()
    config = PruningConfig(method="alps", sparsity=0.5)
    plain, few, many = (
        plan_memory(model, config, CalibrationConfig(samples=samples, length=8, offload=offload), 8)
        for samples, offload in ((64, None), (16, "cpu"), (64, "disk"))
    )
    assert few.peak == many.peak < plain.peak
    assert few.offloaded * 4 == many.offloaded
    assert 0.8 * plain.passes < many.offloaded <= plain.passes + 1
    assert plain.offloaded == 0


def test_the_plan_counts_no_masks_that_are_mapped():
    config, calibration = PruningConfig(method="alps", sparsity=0.5), CalibrationConfig(4, 8, offload="disk")
    for build, shares in ((models.llama, 0), (models.gpt2, 1)):
        with torch.device("meta"):
            model = build()
        weights = sum(target.weights for target in find_targets(model))
        alone = plan_memory(model, config, calibration, 8)
        assert alone.masks == weights / 8
        mapped = plan_memory(model, config, calibration, 8, has_directory=True)
        assert mapped.masks == shares * alone.masks
        assert alone.peak - mapped.peak == alone.masks - mapped.masks


def test_weights_that_accelerate_has_offloaded_are_refused(tmp_path):
    model = models.llama()
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    data, config = torch.randint(3, 60, (4, 8)), PruningConfig(method="alps", sparsity=0.5)
    with pytest.raises(
        PlacementError, match=r"got \d+ tensors without them.*load the model on the CPU, without a device_map"
    ):
        prune(model, config, data)


@torch.library.custom_op("hf_prune_tests::note_thread", mutates_args=())
def note_thread(value: torch.Tensor) -> torch.Tensor:
    THREADS.append(threading.current_thread().name)
    return value + 1


def test_a_pass_computes_in_the_thread_that_lets_it_run():
    def work():
        value = note_thread(torch.ones(3))
        value += 1
        mine.pause()
        try:
            torch.ones(2) @ value
        except RuntimeError as error:
            errors.append(str(error))
        return value

    errors = []
    THREADS.clear()
    mine = Pass(work)
    mine.go()
    mine.go()
    assert [threading.current_thread().name] == THREADS
    assert mine.result.tolist() == [3, 3, 3]
    assert mine.result._version == 1  # as without threads
    assert "size" in errors[0]
