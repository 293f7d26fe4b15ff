"""What every test runs under: warnings are errors, seeds are fixed, there is no network and one thread."""

import os
import tempfile

# Read by libraries when they are imported, so set before any of them is.
_HF_HOME = tempfile.mkdtemp(prefix="hf_prune_tests_")
os.environ["HF_HOME"] = _HF_HOME
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import gc  # noqa: E402
import ipaddress  # noqa: E402
import shutil  # noqa: E402
import socket  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from browser import browser  # noqa: E402, F401
from hub_client import HubClient  # noqa: E402
from hub_server import WRITE_TOKEN, HubServer  # noqa: E402
from transformers import PreTrainedConfig, set_seed  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    # peft 0.21 (peft_model.py) asks transformers 5.23 for a property that transformers has renamed.
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning"
    )


# Files that one process of pytest runs: a client of the stand-in Hub, or a fork server, imports for ten seconds.
TOGETHER = {
    "hub": ("test_push", "test_trainer_card"),
    "forks": (
        *("test_replicated", "test_recipe_scripts", "test_crashes", "test_methods_from_outside"),
        *("test_sharded_selection", "test_placements", "test_sigterm"),
    ),
}

# What takes longest.
LONGEST = (
    *TOGETHER["hub"],
    *TOGETHER["forks"],
    *("test_launch", "test_card", "test_run", "test_commands", "test_pruner", "test_ways_of_training"),
    *("test_shipped", "test_distillation", "test_collectors", "test_architectures", "test_trainer"),
)


def pytest_collection_modifyitems(items):
    """What is long comes first: at the end no process waits for another that has just begun it."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not hasattr(PreTrainedConfig, "per_layer_config"):
        for item in items:
            if item.get_closest_marker("widths_per_layer") is not None:
                item.add_marker(pytest.mark.skip(reason="needs transformers 5.15 or later"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile`, with the files of `TOGETHER` as one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return next((name for name, stems in TOGETHER.items() if Path(file).stem in stems), file)

    return ByFile(config, log)


def pytest_collection_finish():
    """What the imports have made stays: Trainers collect garbage in each training, and need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def fixed_seed():
    set_seed(0)


# ---- The stand-in Hub and its genuine clients: once for each process of pytest, for a client imports for seconds ----


@pytest.fixture(scope="session")
def hub_server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def lfs_client(hub_server):
    with HubClient(hub_server.url, WRITE_TOKEN) as client:
        yield client


@pytest.fixture(scope="session")
def xet_client(hub_server):
    with HubClient(hub_server.url, WRITE_TOKEN, xet=True) as client:
        yield client


@pytest.fixture
def hub(hub_server):
    """The stand-in Hub without anything in it."""
    hub_server.reset()
    yield hub_server
    hub_server.check()


# ---- Terminals ----


@pytest.fixture
def eighty_columns(monkeypatch):
    """A plain terminal of 80 columns, for what commands print."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")


# ---- No network ----


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _only_loopback(getattr(socket.socket, name)))


def _only_loopback(connect):
    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise RuntimeError(f"a test tried to reach {address!r}: tests have no network")
        return connect(self, address)

    return guarded


def _is_loopback(host):
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
