"""Tiny models with their pages, and a page that runs in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import torch
from models import bert, llama, t5
from text_models import save_text_model, tokenizer

START_TIMEOUT = 300

# Weights that are far from zero, so that answers differ from text to text, and between the models.
SPREAD = {"initializer_range": 0.5}
NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


def classifier():
    return bert(**SPREAD, **NAMES)


def language_model():
    return llama(**SPREAD)


def summariser():
    return t5(initializer_factor=3.0)


def save_pair(folder, build):
    """Folders `dense` and `pruned`: a random model, and the same with half of its matrices zero."""
    save_text_model(folder / "dense", build)
    model = type(build()).from_pretrained(folder / "dense")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter[parameter.abs() < parameter.abs().median()] = 0
    model.save_pretrained(folder / "pruned")
    tokenizer().save_pretrained(folder / "pruned")
    if model.config.is_encoder_decoder:
        (folder / "pruned" / "README.md").write_text("---\npipeline_tag: summarization\n---\nA card.\n")


@contextlib.contextmanager
def running(folder, tmp_path):
    """The address of a page that `python app.py` serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path / "gradio"),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            address = f"http://127.0.0.1:{port}/"
            _wait_until_served(address, process, tmp_path / "log")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_served(address, process, log):
    end = time.monotonic() + START_TIMEOUT
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                response.read()
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the page did not start:\n{log.read_text()}") from None
            time.sleep(0.2)
        else:
            return
