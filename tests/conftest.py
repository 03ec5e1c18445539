"""Provides what all tests share: one thread, fixed seeds, and a tiny model with the lab's tokenizer.

torch and transformers are imported inside the fixtures: with pytest-xdist the controller imports this
module too, and the workers wait for it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command_line import Call
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not any(Path("/dev", driver).exists() for driver in ("nvidiactl", "dxg", "kfd")):
    # Without a GPU the kernels are tested in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# At Python's default threshold, collections of the imported modules take a tenth of the tests' time.
gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def _fixed_seed(_one_thread: None) -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Check what is flushed, and do not wait: a run flushes sixty times.

    It matters after a power cut alone, which `power_cut` replays from the calls. Other processes wait.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: os.fstat(handle) and None)
        yield


@pytest.fixture(scope="session")
def lab_tokenizer() -> PreTrainedTokenizerFast:
    from selfteach.tasks.lab.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture
def tiny_llama(lab_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a random Llama of 10 k parameters, the same in every test, in evaluation mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(lab_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        pad_token_id=lab_tokenizer.pad_token_id,
        bos_token_id=lab_tokenizer.bos_token_id,
        eos_token_id=lab_tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return what runs a command: ``call("check", recipe)``, its status, output and errors."""
    from command_line import caller

    return caller(monkeypatch, capsys)
