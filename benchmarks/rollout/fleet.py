"""Measure how much faster fleets of servers are than one: critics and samplers, with timed servers.

    OMP_NUM_THREADS=1 python benchmarks/rollout/fleet.py [--rounds 3] [--quick]

Each server (`timed_server.py`, a process of its own) processes four requests at a time, each for a
given time, and longer if it has not seen the prompt, as a prefix cache makes it. So what is measured is
the dispatch alone: the client's work, how evenly requests are spread, and how often a prompt is
computed at more than one member. Clients are warm. All variants alternate in one process.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness

import torch
from harness import Table, parser, reported

from selfteach.config.critic_section import EndpointConfig
from selfteach.config.engine_section import VllmServerConfig
from selfteach.feedback.critics.chat_model import Reply, Request
from selfteach.feedback.critics.endpoint import EndpointModel
from selfteach.rollout.vllm.http_client import HttpClient
from selfteach.rollout.vllm.server_client import VllmServer
from selfteach.rollout.vllm.synced_backend import SyncedBackend
from selfteach.rollout.vllm.synced_server import SyncedServer
from selfteach.rollout.vllm.vllm_engine import CompletionRequest, SentWeights, SyncedSampler
from selfteach.rollout.vllm.vllm_fleet import VllmFleet
from selfteach.rollout.vllm.weight_channel import WeightChannel
from selfteach.rollout.vllm.weight_check import Probe, WeightCheck
from selfteach.rollout.vllm.weight_sync import WeightFolder
from selfteach.runtime.distributed import SINGLE_PROCESS

SERVER = Path(__file__).with_name("timed_server.py")
SLOTS = 4
SLOWER = 8
"""Times that the slow member takes as long as others."""
GROUP = 4
"""Requests that share a prompt."""
VOCABULARY = 32


Run = Callable[[Iterable[int]], int]
"""Processes requests by number and returns how many replies there are."""


@dataclass(frozen=True)
class Variant:
    """Describes a fleet."""

    members: int
    slow: bool = False
    killed: bool = False
    """One member ends in the middle."""

    @property
    def name(self) -> str:
        """Return its name in tables."""
        fault = ", one slow" * self.slow + ", one killed" * self.killed
        return f"{self.members}{fault}"


VARIANTS = (Variant(1), Variant(2), Variant(4), Variant(4, slow=True), Variant(4, killed=True))


@contextmanager
def served(variant: Variant, seconds: float) -> Iterator[list[tuple[str, subprocess.Popen[str]]]]:
    """Run a fleet within a block; yield addresses and processes."""
    with ExitStack() as stack:
        processes = []
        for number in range(variant.members):
            each = seconds * (SLOWER if variant.slow and number == 0 else 1)
            times = ["--slots", str(SLOTS), "--seconds", str(each), "--prefill", str(each)]
            command = [sys.executable, "-S", str(SERVER), *times]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            processes.append(process)
        ports = [int(process.stdout.readline()) for process in processes]  # type: ignore[union-attr]
        yield [
            (f"http://127.0.0.1:{port}", process)
            for port, process in zip(ports, processes, strict=True)
        ]


def critics(urls: Sequence[str]) -> Run:
    """Return a call for critiques of rollouts."""
    addresses = [f"{url}/v1" for url in urls]
    address = {"base_urls": addresses} if len(urls) > 1 else {"base_url": addresses[0]}
    values = {"type": "endpoint", "model": "m", "concurrency": 2 * SLOTS, **address}
    model = EndpointModel(EndpointConfig.model_validate(values))
    rules = "Rules that all prompts begin with. " * 40

    def request(number: int) -> Request:
        problem = f"Problem {number // GROUP}. " + "text " * 60
        return Request((("user", f"{rules}{problem}| {number}"),), 0.0, 64)

    def run(numbers: Iterable[int]) -> int:
        replies = model.complete([request(number) for number in numbers], lambda *_: None)
        return sum(isinstance(reply, Reply) for reply in replies)

    return run


def samplers(urls: Sequence[str], folder: Path) -> Run:
    """Return a call for rollouts."""
    logits_V = torch.zeros(VOCABULARY)
    probe = Probe((1, 2, 3), 1.0, lambda: logits_V)
    configs = [
        VllmServerConfig(type="vllm_server", url=url, model="m", concurrency=2 * SLOTS)
        for url in urls
    ]
    in_folder = configs[0].model_copy(update={"weight_transfer": "folder"})
    weights = WeightChannel(in_folder, WeightFolder(folder, None))
    sampler: SyncedSampler
    if len(urls) == 1:
        server = VllmServer(configs[0], weights)
        sampler = SyncedBackend(server, WeightCheck(probe, 0.5), SINGLE_PROCESS)
    else:
        servers = [
            SyncedServer(VllmServer(config, weights), WeightCheck(probe, 0.5), SINGLE_PROCESS)
            for config in configs
        ]
        sampler = VllmFleet(servers, weights, concurrency=2 * SLOTS, patience_s=60.0)
    sent = SentWeights("selfteach-benchmark-1-v0", logits_V)
    sampler.send([("weight", torch.zeros(1))], sent)
    sampler.verify(sent)

    def request(number: int) -> CompletionRequest:
        prompt = (*range(300), 999 + number // GROUP)
        return CompletionRequest(prompt, abs(number), 8, 1.0, ())

    return lambda numbers: len(list(sampler.complete([request(n) for n in numbers])))


def measure(kind: str, variant: Variant, count: int, seconds: float) -> tuple[float, float]:
    """Return replies per second, and how often each prompt was computed on average."""
    with served(variant, seconds) as servers, tempfile.TemporaryDirectory() as folder:
        urls = [url for url, _ in servers]
        run = critics(urls) if kind == "critics" else samplers(urls, Path(folder))
        run(range(-GROUP * SLOTS, 0))  # connections, and the client's first requests
        killed = threading.Timer(count * seconds / SLOTS / variant.members / 2, servers[0][1].kill)
        if variant.killed:
            killed.start()
        began = time.perf_counter()
        replies = run(range(count))
        spent = time.perf_counter() - began
        assert replies == count, f"{replies} of {count} replies"
        alive = servers[variant.killed :]
        unseen = sum(HttpClient(_address(url)).get("/stats")["unseen"] for url, _ in alive)
        return count / spent, (unseen - SLOTS) / (count // GROUP)


def _address(url: str) -> VllmServerConfig:
    return VllmServerConfig(type="vllm_server", url=url, model="m")


def main() -> None:
    """Measure all fleets."""
    args = parser(__doc__).parse_args()
    rounds, count, seconds = (1, 32, 0.05) if args.quick else (args.rounds, 160, 0.2)
    with reported(args) as tables:
        for kind in ("critics", "samplers"):
            results: dict[Variant, list[tuple[float, float]]] = {v: [] for v in VARIANTS}
            for _ in range(rounds):
                for variant in VARIANTS:
                    results[variant].append(measure(kind, variant, count, seconds))
            tables.append(
                Table(
                    f"Fleets of {kind}, {count} replies",
                    notes=f"{SLOTS} requests at a time per server, {seconds} s each and as much for a "
                    f"prompt that the server has not seen; {count // GROUP} prompts with {GROUP} "
                    f"requests each. The slow server takes {SLOWER} times as long; the killed one ends "
                    "for good in the middle, and is not in the last column.",
                )
            )
            one = statistics.median(rate for rate, _ in results[VARIANTS[0]])
            for variant, measured in results.items():
                rate = statistics.median(rate for rate, _ in measured)
                tables[-1].add(
                    members=variant.name,
                    **{
                        "replies/s": rate,
                        "to one server": rate / one,
                        "times a prompt was computed": statistics.median(n for _, n in measured),
                    },
                )


if __name__ == "__main__":
    main()
