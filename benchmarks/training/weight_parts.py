"""Time new weights on their way to a sampler, each way that one machine has (`gpu_parts`)."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "rollout"))

from harness import MIB
from step_clock import Clock, timed
from trainers_compared import OurTrainer
from weight_receiver import receiving

from selfteach.config.engine_section import VllmServerConfig
from selfteach.config.schema import merge
from selfteach.rollout.vllm import packed_weights
from selfteach.rollout.vllm.http_client import HttpClient
from selfteach.rollout.vllm.weight_channel import WeightChannel
from selfteach.rollout.vllm.weight_sync import WeightFolder

IN_MEMORY = ("mapped memory", "HTTP")
"""Ways to a process with the worker extension: it maps our memory, or gets buckets in base64."""


def weights_on_their_way(
    model: str, device: str, adapters: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Measure adapters, then all weights of a model in bfloat16: from the device to a receiver's.

    ``adapters`` are the changes of a recipe that add them.
    """
    url = None
    with receiving(device) as address, tempfile.TemporaryDirectory() as parent:
        for lora in (True, False):
            changes = {"model": {"device": device, "weights_dtype": "bfloat16"}}
            changes = merge(changes, adapters if lora else {})
            policy: Any = OurTrainer(model, "full", Clock(), changes).components.policy
            adapter = policy.model.peft_config["default"] if lora else None
            named = list(policy.trainable.items())
            moved = sum(weight.numel() * weight.element_size() for _, weight in named)
            url = url or address()  # it starts while the model is made
            config = VllmServerConfig(
                type="vllm_server", url=url, model="receiver", weight_transfer="stream"
            )
            http, folder = HttpClient(config), WeightFolder(Path(parent), adapter)
            channel = WeightChannel(config, folder)
            assert channel.kind == "stream"  # it connects here: that is not measured
            ways: dict[str, Callable[[], object]] = {
                "to the host": lambda named=named: [weight.cpu() for _, weight in named],
                **{way: partial(_sent, channel, http, named, way) for way in IN_MEMORY},
                "written to a folder": partial(folder.write, named, "selfteach-folder"),
            }  # fmt: skip
            for way, call in ways.items():
                seconds = timed(call)
                yield {
                    "weights": "adapters" if lora else "all", "way": way, "MiB": moved / MIB,
                    "s": seconds, "GB/s": moved / 1e9 / seconds,
                }  # fmt: skip
            del policy, named, ways


def _sent(channel: WeightChannel, http: HttpClient, named: list[Any], way: str) -> None:
    """Send weights as after an update: copied to the host, checked, loaded (an adapter: in a file)."""
    label = f"selfteach-{way.split()[0].lower()}-v1"
    with _unmapped() if way == "HTTP" else nullcontext(), channel.publishing(named, label):
        if channel.holds_adapters:
            shutil.rmtree(channel.adapter_path(http, label))
        else:
            channel.stage(http, label)
            channel.apply(http, label)


@contextmanager
def _unmapped() -> Iterator[None]:
    """Hide the memory of this process from a receiver."""
    make = packed_weights._shareable_bytes
    packed_weights._shareable_bytes = lambda *args: (make(*args)[0], "")
    try:
        yield
    finally:
        packed_weights._shareable_bytes = make
