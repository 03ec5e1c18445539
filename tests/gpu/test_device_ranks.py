"""One torchrun rank on a device, replicated and sharded, equals a process without torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfteach.runtime.run_folder import RunFolder

pytestmark = pytest.mark.gpu

RECIPE = """
[model]
path = "lab:two_styles"
device = "{device}"
[data]
type = "lab"
train = 12
validation = 4
test = 4
[sampling]
max_tokens = 40
batch_size = 8
[train]
steps = 3
problems_per_step = 2
group_size = 4
checkpoint_every = 2
threads = 1
[evaluation]
every = 3
validation_k = 2
test_k = 2
[arms.step_aligned]
critic = {{ type = "oracle" }}
context = {{ type = "step_aligned" }}
teacher = {{ type = "ema", rate = 0.2 }}
"""


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""The test needs no network, and there may be none."""


def run(device: str, folder: Path, *settings: str, torchrun: bool = True) -> None:
    path = folder.parent / "recipe.toml"
    path.write_text(RECIPE.format(device=device))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = ["torch.distributed.run", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
             "--master-port", str(port), "-m"]  # fmt: skip
    command = [sys.executable, "-m", *(ranks if torchrun else []), "selfteach", "train", str(path),
               "--arm", "step_aligned", "--out", str(folder)]  # fmt: skip
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **ENVIRONMENT}
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def steps(folder: Path) -> list[dict[str, float]]:
    return [row for row in RunFolder(folder).metrics() if row["kind"] == "step"]


@pytest.fixture(scope="module")
def without_torchrun(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "without_torchrun"
    run(device, folder, torchrun=False)
    return folder


@pytest.mark.parametrize("variant", ["none", "full", "full, bfloat16"])
def test_one_rank_equals_a_process_without_torchrun(
    variant: str, without_torchrun: Path, device: str, tmp_path: Path
) -> None:
    settings = [f'distributed.shard="{variant.split(",")[0]}"']
    if "bfloat16" in variant:
        settings += ['distributed.param_dtype="bfloat16"', 'distributed.reduce_dtype="float32"']
    run(device, tmp_path / "ranks", *settings)
    expected, rows = steps(without_torchrun), steps(tmp_path / "ranks")
    assert [row["step"] for row in rows] == [1, 2, 3]
    tolerance = 0.1 if "bfloat16" in variant else 1e-3
    for name in ("loss", "grad_norm"):
        assert rows[0][name] == pytest.approx(expected[0][name], rel=tolerance, abs=1e-6), name
    assert rows[0]["tokens_sampled"] == expected[0]["tokens_sampled"], "the same rollouts"
    a, b = (
        load_file(folder / "model/model.safetensors")
        for folder in (without_torchrun, tmp_path / "ranks")
    )
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert torch.isfinite(value).all() and value.shape == a[name].shape
