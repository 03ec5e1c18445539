"""Weights are data: nothing that comes with a model runs unless the recipe says so."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from selfteach.config.recipe import ModelConfig
from selfteach.errors import EngineError
from selfteach.models import loading, matmul
from selfteach.models.loading import (
    autocast_of,
    choose_device,
    load_model,
    load_tokenizer,
    weights_dtype_of,
)
from selfteach.runtime.torch_setup import configure_torch

CPU = torch.device("cpu")


class Acts:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "ran")


@pytest.fixture
def folder(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, lab_tokenizer: PreTrainedTokenizerFast
) -> Path:
    path = tmp_path / "model"
    tiny_llama.save_pretrained(path)
    lab_tokenizer.save_pretrained(path)
    return path


def test_weights_come_from_safetensors_only(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Acts(ran)}))
    assert load_model(ModelConfig(path=str(folder)), CPU), "a pickle beside them is not looked at"
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineError, match=r"cannot load the model: .*safetensors") as error:
        load_model(ModelConfig(path=str(folder)), CPU)
    assert "\n" not in str(error.value) and not ran.exists()


def test_custom_model_code_runs_only_if_the_recipe_allows_it(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "custom.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).write_text('ran')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "of_their_own",
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for load in (lambda c: load_model(c, CPU), load_tokenizer):
        try:
            load(ModelConfig(path=str(folder)))
        except EngineError as error:
            assert "\n" not in str(error)
        assert not ran.exists()
    with pytest.raises(EngineError, match=r"custom code.*trust_remote_code = true"):
        load_model(ModelConfig(path=str(folder)), CPU)


def test_on_a_gpu_attention_is_not_planned_shape_by_shape() -> None:
    """A setting of the process; it is put back here."""
    from transformers.integrations import sdpa_attention

    before, gqa = torch.backends.cuda.cudnn_sdp_enabled(), sdpa_attention.use_gqa_in_sdpa
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        configure_torch(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        configure_torch(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        sdpa_attention.use_gqa_in_sdpa = gqa


FAULTS = """
import resource, torch
from selfteach.runtime.torch_setup import configure_torch
configure_torch(torch.device("cpu"))
def steps():
    for _ in range(20):
        torch.ones(2**21)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = steps()
print(steps() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.slow
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    """Twenty blocks of 8 MiB, 2,048 pages each, are reused, or not if the environment says so."""

    def faults(**environment: str) -> int:
        plain = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
        completed = subprocess.run(
            [sys.executable, "-c", FAULTS], env={**plain, **environment},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(completed.stdout)

    assert faults() < 2048
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 15 * 2048


@pytest.mark.parametrize(
    ("autocast", "fast_bf16", "got"),
    [
        (None, True, None),
        ("bfloat16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, None),
    ],
)
def test_autocast_depends_on_the_device_only_for_auto(
    monkeypatch: pytest.MonkeyPatch, autocast: str | None, fast_bf16: bool, got: torch.dtype | None
) -> None:
    kinds = list[str]()
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda kind: (kinds.append(kind), fast_bf16)[1])
    config = ModelConfig(autocast=autocast)  # pyright: ignore[reportArgumentType]
    for device, kind in (("cpu", "cpu"), ("cuda:1", "cuda"), ("auto", choose_device("auto").type)):
        assert autocast_of(config, device) == got
        assert not kinds if autocast != "auto" else kinds.pop() == kind


def test_a_gguf_file_is_read_once_and_tokenizers_are_not_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lab_tokenizer: PreTrainedTokenizerFast
) -> None:
    read = list[str]()

    def from_pretrained(path: str, **more: object) -> PreTrainedTokenizerFast:
        read.append(f"{path} {more['gguf_file']}")
        return lab_tokenizer

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", from_pretrained)
    configs = [ModelConfig(path=str(tmp_path), gguf_file=name) for name in ("a", "a", "b")]
    tokenizers = [load_tokenizer(config) for config in configs]
    assert read == [f"{tmp_path} a", f"{tmp_path} b"]
    assert len({id(one) for one in (*tokenizers, lab_tokenizer)}) == 4
    assert all(one.get_vocab() == lab_tokenizer.get_vocab() for one in tokenizers)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_weights_are_bfloat16_where_the_device_multiplies_it_fast(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: fast)
    auto = ModelConfig(weights_dtype="auto")
    dtype = "bfloat16" if fast else "float32"
    assert [weights_dtype_of(auto, device) for device in ("cpu", "auto")] == [dtype, dtype]
    weights = load_model(auto, torch.device("cpu")).get_input_embeddings().weight
    assert weights.dtype == getattr(torch, dtype)
    assert weights_dtype_of(ModelConfig(weights_dtype="bfloat16"), "cpu") == "bfloat16"
    assert weights_dtype_of(ModelConfig(), "cpu") == "float32"
