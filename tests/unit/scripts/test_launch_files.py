"""Launch files start the policy's servers so that weights travel in memory.

This is what ``engine.weight_transfer = "auto"`` looks for (`rollout.vllm.weight_channel`): vLLM's
transfer over NCCL for full weights, the worker extension for adapters, and the variables of both.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfteach.rollout.vllm import nccl_transfer, weight_stream

ROOT = Path(__file__).parents[3]
SCRIPTS = ("scripts/one_node.sh", "scripts/slurm/serve_policy.sbatch")
KUBERNETES = "scripts/kubernetes/train.yaml"
NEEDED = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
POLICY = "solver"


def shell_server(name: str) -> tuple[list[str], dict[str, str]]:
    """The words that start the policy's server in a shell script, and the variables that it sets."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if f"--served-model-name {POLICY}" in line)
    words = [word for word in shlex.split(line) if word != "&"]
    variables = dict(re.findall(r"(\w+)=(\d+)", text))
    return words[words.index("python") :], variables


def pods() -> dict[str, dict[str, Any]]:
    """The pod of each deployment and job, by name."""
    documents = yaml.safe_load_all((ROOT / KUBERNETES).read_text())
    return {
        one["metadata"]["name"]: one["spec"]["template"]["spec"]
        for one in documents
        if one["kind"] in ("Deployment", "Job")
    }


def server(name: str) -> tuple[list[str], dict[str, str]]:
    if name != KUBERNETES:
        return shell_server(name)
    (container,) = pods()["policy"]["containers"]
    return container["command"], {one["name"]: one["value"] for one in container["env"]}


@pytest.mark.parametrize("name", [*SCRIPTS, KUBERNETES])
def test_a_policys_server_takes_weights_in_memory(name: str) -> None:
    words, variables = server(name)
    options = dict(itertools.pairwise(words))
    extension = options["--worker-extension-cls"]
    assert extension == weight_stream.EXTENSION
    module, _, cls = extension.rpartition(".")
    assert hasattr(importlib.import_module(module), cls)
    assert json.loads(options["--weight-transfer-config"]) == {"backend": "nccl"}
    backend = f"--weight-transfer-config '{options['--weight-transfer-config']}'"
    assert backend in nccl_transfer.START_WITH
    assert NEEDED.items() <= variables.items()
    assert "--enable-lora" in words and options["--logprobs-mode"] == "processed_logprobs"
    assert options["--served-model-name"] == POLICY


def test_every_policys_server_is_among_these() -> None:
    files = [path for path in ROOT.glob("scripts/**/*") if path.is_file()]
    serving = [path for path in files if "processed_logprobs" in path.read_text(errors="ignore")]
    assert {str(path.relative_to(ROOT)) for path in serving} == {*SCRIPTS, KUBERNETES}


def test_a_pod_has_shared_memory_for_adapters() -> None:
    """The worker extension puts them into /dev/shm, of which a pod has 64 MB by default."""
    policy = pods()["policy"]
    (container,) = policy["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in policy["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
