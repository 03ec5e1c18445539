"""vLLM in the trainer's process: in vLLM's environment, which has this package's dependencies too."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_server

SCRIPT = Path(__file__).with_name("in_process.py")
FLOAT32 = 1e-3
"""Nats between trainer and engine on a sampled token, both in float32."""
BFLOAT16 = 0.5
"""The same where the engine computes in bfloat16: 0.03 on average, 0.16 at the 99th percentile."""


def run(kind: str, *settings: str) -> dict[str, Any]:
    """Return the script's report."""
    imports = "import peft, jaxtyping, pyarrow, accelerate, matplotlib"
    if subprocess.run([vllm_server.PYTHON, "-c", imports], capture_output=True).returncode:
        pytest.skip(f"{vllm_server.PYTHON.parent} lacks what selfteach needs: make test-vllm")
    env = {
        **os.environ, **vllm_server.ENVIRONMENT, "PYTHONPATH": str(vllm_server.ROOT / "src"),
    }  # fmt: skip
    command = [str(vllm_server.PYTHON), str(SCRIPT), str(vllm_server.MODEL), kind, *settings]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def assert_agree(report: dict[str, Any], tolerance: float) -> None:
    assert len(report["mismatch"]) == 3 and max(report["mismatch"]) < tolerance
    assert all(report["repeats"])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_trainer_and_engine_agree_before_and_after_updates(
    no_shared_server: None, print_line: Callable[[str], None], kind: str
) -> None:
    vllm_server.save_model(print_line)
    report = run(kind, 'engine.dtype="float32"', "engine.tolerance=0.001")
    print_line(f"{kind} in process: {report}")
    assert_agree(report, FLOAT32)
    assert min(report["mismatch_before"]) > 10 * FLOAT32  # the updates changed the weights


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_the_engine_agrees_and_sleeps(
    no_shared_server: None, print_line: Callable[[str], None], kind: str, dtype: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    vllm_server.save_model(print_line)
    tolerance = FLOAT32 if dtype == "float32" else BFLOAT16
    settings = (f"engine.dtype={json.dumps(dtype)}", f"engine.tolerance={tolerance}")
    report = run(kind, *settings, 'model.device="cuda"', "engine.gpu_memory_utilization=0.4")
    assert_agree(report, tolerance)
    # Asleep between calls: nearly all of its memory is free again.
    device = torch.cuda.get_device_properties(0).total_memory
    assert min(report["free"]) > 0.7 * device
