"""Serves vLLM's HTTP API around a tiny model, and misbehaves on demand.

It loads the weights it is sent and runs them, so that its log-probabilities are those of its weights.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from scripted_server import send
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfteach.rollout.vllm.worker_extension import StreamedWeights

Body = dict[str, Any]
LOADING = threading.Lock()
"""Held while PEFT loads an adapter, which it cannot in two threads at a time."""


class HttpError(Exception):
    """An HTTP error status with its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ScriptedWorker(StreamedWeights):
    """Does what vLLM's worker class does with the worker extension."""

    def __init__(self, server: ScriptedVllm) -> None:
        self._server = server

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._server.load(dict(weights_iterator))


class ScriptedVllm:
    """Does what `vllm serve` does, as far as an engine needs it; one switch per kind of failure."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._initial, self._tokenizer = copy.deepcopy(model).eval(), tokenizer
        self.developer, self.lora, self.hot_loading = True, True, True
        self.extension, self.maps_memory = False, True
        """Whether it was started with the worker extension, and shares the trainer's machine."""
        self.before_rpc: Callable[[Body], None] = lambda _: None
        """May change a call of the worker extension, or raise."""
        self.rpcs: list[str] = []
        self.nccl: dict[str, Any] | None = None
        """Communicators by id, if it was started with vLLM's weight transfer."""
        self.updates: list[str] = []
        self.is_updating = False
        """Another trainer has begun an update that it never ends."""
        self.nccl_engine = "NCCLWeightTransferEngine"
        """Calls of vLLM's weight transfer."""
        self.processed = True
        """Log-probabilities with the temperature, as --logprobs-mode processed_logprobs."""
        self.stale = False
        """New weights are acknowledged and not loaded."""
        self.cache_stays = False
        self.dies_after: int | None = None
        """Completions left until every connection is cut."""
        self.restarts_after: int | None = None
        """Completions left until the server restarts, with its initial weights."""
        self.rejects: Callable[[Body], bool] = lambda _: False
        """Which completions get HTTP 400."""
        self.other_run_loads_after: int | None = None
        """Completions left until another run loads its weights."""
        self.delay_s = 0.0
        """Before the reply to each completion."""
        self.requests: list[Body] = []
        self.loads = 0
        self.errors: list[BaseException | None] = []
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self.port = 0
        self.restart()

    def restart(self) -> None:
        """Return to the initial weights, without a label."""
        self.model, self.label = copy.deepcopy(self._initial), "default"
        self.adapters: dict[str, PeftModel] = {}
        self.worker, self._group = ScriptedWorker(self), None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                script.answer(self, {})

            def do_POST(self) -> None:
                script.answer(
                    self, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: self.errors.append(
            sys.exception()
        )  # for a test that fails to look at
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def answer(self, handler: BaseHTTPRequestHandler, body: Body) -> None:
        address = handler.path
        with self._lock:  # one request at a time, so that n completions are counted exactly
            if self.dies_after == 0:
                handler.connection.close()
                return
            try:
                reply, status = self._route(address)(body), 200
            except ConnectionError:
                handler.connection.close()
                return
            except HttpError as error:
                reply, status = {"error": {"message": str(error)}}, error.status
        if body.get("max_tokens", 0) > 1:
            time.sleep(self.delay_s)
        # Adapters are acknowledged in a sentence, everything else in JSON.
        send(
            handler,
            status,
            reply.encode() if isinstance(reply, str) else json.dumps(reply).encode(),
        )

    def _route(self, address: str) -> Callable[[Body], Any]:
        plain: Mapping[str, Callable[[Body], Any]] = {
            "/v1/models": self._models,
            "/v1/completions": self._complete,
            "/tokenize": lambda body: {"tokens": self._tokenizer(body["prompt"])["input_ids"]},
        }
        developer: Mapping[str, Callable[[Body], Any]] = {
            "/weight_info": lambda _: {"weight_version": self.label},
            "/update_weight_version": self._set_weight_version,
            "/collective_rpc": self._call_workers,
            "/reset_prefix_cache": lambda _: {"success": not self.cache_stays},
            "/init_weight_transfer_engine": self._init_transfer,
            "/get_world_size": lambda _: {"world_size": 1},
            "/pause": self._noted("pause"),
            "/start_weight_update": self._start_update,
            "/update_weights": self._receive,
            "/finish_weight_update": self._noted("finish"),
            "/resume": self._noted("resume"),
        }
        hot_loading: Mapping[str, Callable[[Body], Any]] = {
            "/v1/load_lora_adapter": self._load_adapter,
            "/v1/unload_lora_adapter": self._unload_adapter,
        }
        handlers = {
            **plain,
            **(developer if self.developer else {}),
            **(hot_loading if self.hot_loading else {}),
        }
        if address not in handlers:
            raise HttpError(404, "Not Found")
        return handlers[address]

    def _models(self, _: Body) -> Any:
        names = ["tiny", *self.adapters]
        return {"object": "list", "data": [{"id": name, "max_model_len": 96} for name in names]}

    def _set_weight_version(self, body: Body) -> Any:
        self.label = body["new_version"]
        return {"success": True}

    def _call_workers(self, body: Body) -> Any:
        if body["method"] == "reload_weights":
            path = Path(body["kwargs"]["weights_path"]) / "model.safetensors"
            self.load(load_file(path))
            return {"results": [None]}
        if not self.extension:
            raise HttpError(500, f"'CPUWorker' object has no attribute {body['method']!r}")
        self.rpcs.append(body["method"])
        self.before_rpc(body)
        kwargs = dict(body.get("kwargs", {}))
        if "path" in kwargs and not self.maps_memory:
            kwargs["path"] = "/proc/0/fd/0"
        return {"results": [getattr(self.worker, body["method"])(**kwargs)]}

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Put weights in place of those in use."""
        self.loads += 1
        if not self.stale:
            self.model.load_state_dict(weights, strict=False)

    def _start_update(self, body: Body) -> Any:
        if self.is_updating:
            raise HttpError(500, "start_weight_update called while an update is already active.")
        return self._noted("start")(body)

    def _noted(self, call: str) -> Callable[[Body], Any]:
        def reply(_: Body) -> Any:
            self.updates.append(call)
            return {}

        return reply

    def _init_transfer(self, body: Body) -> Any:
        if self.nccl is None:
            raise HttpError(500, "Weight transfer not configured.")
        if not body["init_info"]:
            raise HttpError(500, f"Invalid init_info for {self.nccl_engine}: rank_offset")
        assert body["init_info"]["world_size"] == 2 and body["init_info"]["rank_offset"] == 1
        self._group = self.nccl[body["init_info"]["nccl_unique_id_b64"]]
        self.updates.append("init")
        return {}

    def _receive(self, body: Body) -> Any:
        """Cut the stream of bytes as vLLM's packed transfer does, into pieces of ten bytes or more."""
        self.updates.append("update")
        info, weights = body["update_info"], {}
        if self._group is None:
            raise HttpError(500, "NCCL weight transfer not initialized.")
        waiting: list[tuple[str, torch.dtype, list[int], int]] = []
        for name, kind, shape in zip(
            info["names"], info["dtype_names"], info["shapes"], strict=True
        ):
            dtype = getattr(torch, kind)
            waiting.append((name, dtype, shape, math.prod(shape) * dtype.itemsize))
            total = sum(size for *_, size in waiting)
            if total > self._group.piece_bytes or name == info["names"][-1]:
                piece = self._group.receive(total)
                for (name, dtype, shape, _), part in zip(
                    waiting, piece.split([size for *_, size in waiting]), strict=True
                ):
                    weights[name] = part.clone().view(dtype).view(shape)
                waiting = []
        self.load(weights)
        return {}

    def _load_adapter(self, body: Body) -> Any:
        name, path = body["lora_name"], Path(body["lora_path"])
        if not self.lora:
            raise HttpError(500, "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if not path.is_dir():
            raise HttpError(404, f"Loading lora {name} failed: No adapter found for {path}")
        self.loads += 1
        if self.stale and self.adapters:
            self.adapters[name] = next(iter(self.adapters.values()))
        else:
            with LOADING, warnings.catch_warnings():  # PEFT uses a deprecated name of transformers
                warnings.simplefilter("ignore")
                adapted = PeftModel.from_pretrained(copy.deepcopy(self.model), str(path))
            self.adapters[name] = adapted.eval()
        return f"Success: LoRA adapter '{name}' added successfully."

    def _unload_adapter(self, body: Body) -> Any:
        if not self.stale:  # a stale server goes on with an old adapter
            del self.adapters[body["lora_name"]]
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def _complete(self, body: Body) -> Any:
        self.requests.append(body)
        model = {"tiny": self.model, **self.adapters}.get(body["model"])
        if model is None:
            raise HttpError(404, f"The model `{body['model']}` does not exist.")
        if self.rejects(body):
            raise HttpError(400, "This request cannot be processed.")
        choice = self._choice(model, body)
        if body["max_tokens"] > 1:  # a rollout, not the probe of the weights
            self._count_completion()
        return {"model": body["model"], "choices": [choice]}

    def _count_completion(self) -> None:
        for name in ("dies_after", "restarts_after", "other_run_loads_after"):
            left = getattr(self, name)
            if left is not None and left > 0:
                setattr(self, name, left - 1)
        if self.restarts_after == 0:
            self.restarts_after = None
            self.restart()
        if self.other_run_loads_after == 0:
            self.label = "another-run-1-v0"

    @torch.no_grad()
    def _choice(self, model: PreTrainedModel | PeftModel, body: Body) -> dict[str, Any]:
        stream = torch.Generator().manual_seed(body["seed"])
        ids, logps, top = list(body["prompt"]), [], []
        sampled: list[int] = []
        while len(sampled) < body["max_tokens"] and (
            not sampled or sampled[-1] not in body["stop_token_ids"]
        ):
            logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            sampling_V = (logits_V / body["temperature"]).log_softmax(-1)
            reported_V = sampling_V if self.processed else logits_V.log_softmax(-1)
            token = int(torch.multinomial(sampling_V.exp(), 1, generator=stream))
            best = reported_V.topk(min(body["logprobs"], len(reported_V))).indices.tolist()
            top.append({f"token_id:{i}": reported_V[i].item() for i in (token, *best)})
            logps.append(reported_V[token].item())
            sampled.append(token)
            ids.append(token)
        return {
            "index": 0, "text": "", "token_ids": sampled, "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": logps, "top_logprobs": top},
        }  # fmt: skip


@contextmanager
def serving_fleet(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[list[ScriptedVllm]]:
    """Run several servers within a block."""
    servers = [ScriptedVllm(model, tokenizer) for _ in range(size)]
    for server in servers:
        server.start()
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


@contextmanager
def serving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[ScriptedVllm]:
    """Run a server within a block."""
    server = ScriptedVllm(model, tokenizer)
    server.start()
    try:
        yield server
    finally:
        server.stop()
