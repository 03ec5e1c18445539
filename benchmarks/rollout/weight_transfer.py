"""Time how long full weights and adapters take to a vLLM server: a folder, HTTP, this machine's memory.

    OMP_NUM_THREADS=1 python benchmarks/rollout/weight_transfer.py [--rounds 5] [--quick]

A real server (`make test-vllm` installs it) serves SmolLM2, 135M parameters in float32, on the CPU. One
transfer is everything between the end of an update and the server's new label: packing or writing,
checksums, loading, and emptying its prefix cache. The ways alternate, each time with other weights, and
after each the server's log-probabilities must have moved.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import torch
from harness import Table, Timing, parser, reported
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

import vllm_server
from selfteach.config.engine_section import VllmServerConfig
from selfteach.rollout.vllm import packed_weights
from selfteach.rollout.vllm.server_client import VllmServer
from selfteach.rollout.vllm.vllm_engine import CompletionRequest
from selfteach.rollout.vllm.weight_channel import WeightChannel
from selfteach.rollout.vllm.weight_sync import WeightFolder

TARGETS = ("q_proj", "v_proj")
RANK, LAYERS = 4, 30
PROBE = CompletionRequest(tuple(range(100, 164)), 0, 1, 1.0, ())
WAYS = ("folder", "HTTP", "shared memory")

Named = Sequence[tuple[str, Tensor]]


class Way:
    """Sends weights to the server in one way."""

    def __init__(self, name: str, url: str, folder: Path, adapter: LoraConfig | None) -> None:
        transfer = "folder" if name == "folder" else "stream"
        config = VllmServerConfig(
            type="vllm_server", url=url, model=vllm_server.NAME, weight_transfer=transfer
        )
        channel = WeightChannel(config, WeightFolder(folder, adapter))
        self._server, self._shares = VllmServer(config, channel), name == "shared memory"
        self._run = f"selfteach-{'a' if adapter else 'f'}{name[0]}"
        self._last: Mapping[int, float] = {}

    def send(self, named: Named, number: int) -> float:
        """Send weights; return the seconds."""
        label = f"{self._run}-{number}-v{number}"
        with _sharing(self._shares):
            began = time.perf_counter()
            self._server.load_weights(named, label)
            spent = time.perf_counter() - began
        logps = self._server.top_logprobs(PROBE, label)
        assert logps != self._last, "the weights have not moved"
        self._last = logps
        return spent


class _sharing:
    """Hides the memory of this process from the server, unless it may be shared."""

    def __init__(self, shares: bool) -> None:
        self._shares, self._make = shares, packed_weights._shareable_bytes

    def __enter__(self) -> None:
        if not self._shares:
            packed_weights._shareable_bytes = lambda *args: (self._make(*args)[0], "")

    def __exit__(self, *_: object) -> None:
        packed_weights._shareable_bytes = self._make


def full_weights() -> Named:
    """Return SmolLM2's weights, its tied head under both names."""
    weights = load_file(vllm_server.MODEL / "model.safetensors")
    return [*weights.items(), ("lm_head.weight", weights["model.embed_tokens.weight"])]


def adapter_weights() -> Named:
    """Return an adapter's random weights."""
    sizes = {"q_proj": 576, "v_proj": 192}
    prefix = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.default.weight"
    return [
        (prefix.format(i, target, kind), torch.randn(shape) * 0.02)
        for i in range(LAYERS)
        for target in TARGETS
        for kind, shape in (("A", (RANK, 576)), ("B", (sizes[target], RANK)))
    ]


def measure(url: str, named: Named, adapter: LoraConfig | None, rounds: int) -> dict[str, Timing]:
    """Time all ways in alternation."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    distinct = list({id(value): value for _, value in named}.values())
    with tempfile.TemporaryDirectory() as folder:
        ways = {name: Way(name, url, Path(folder) / name, adapter) for name in WAYS}
        for number in range(rounds + 1):
            for name, way in ways.items():
                for value in distinct:
                    value.mul_(1.001)
                spent = way.send(named, number)
                if number:  # the first connects
                    seconds[name].append(spent)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def main() -> None:
    """Measure full weights and adapters."""
    args = parser(__doc__).parse_args()
    rounds = 1 if args.quick else args.rounds
    lora = LoraConfig(r=RANK, lora_alpha=8, target_modules=list(TARGETS))
    flags = vllm_server.SMALL_FLAGS
    with reported(args) as tables, vllm_server.serving(engine=True, flags=flags) as server:
        tables.append(
            Table(
                "Weights to a vLLM server on the same machine",
                notes="SmolLM2 (135M, float32), one thread on each side; seconds from the end of an "
                "update to the server's new label. Over HTTP buckets of "
                f"{packed_weights.BUCKET_BYTES >> 20} MiB travel in base64.",
            )
        )
        for kind, named, adapter in (
            ("adapter", adapter_weights(), lora), ("full", full_weights(), None),
        ):  # fmt: skip
            size = sum(value.nbytes for value in {id(v): v for _, v in named}.values()) / 2**20
            timings = measure(server.address, named, adapter, rounds)
            for name, timing in timings.items():
                tables[-1].add(
                    weights=kind, MiB=size, way=name, seconds=timing.median,
                    spread=timing.spread, **{"to the folder": timing.median / timings["folder"].median},
                )  # fmt: skip


if __name__ == "__main__":
    main()
