"""Time vLLM on prompts from a file, in a separate environment; see sampling.py.

    .venv-vllm/bin/python benchmarks/rollout/sampling_vllm.py REQUEST.json RESULT.json

REQUEST has ``model`` (a folder), ``context``, ``end_ids``, ``max_tokens``, ``rounds``, ``group_size``
(rollouts per prompt) and ``sizes``: for each number of rollouts the prompts as token ids. RESULT gets,
per size, the seconds and the rollout tokens of every round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Load, warm up, and time every size."""
    request_path, result_path = (Path(name) for name in sys.argv[1:3])
    request = json.loads(request_path.read_text())
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(
        model=request["model"], dtype="float32", max_model_len=request["context"],
        max_num_seqs=128, enforce_eager=True, skip_tokenizer_init=True,
        generation_config="vllm", enable_prefix_caching=True,
    )  # fmt: skip

    def run(prompts: list[list[int]]) -> int:
        # No seed: with one, chunked prefill crashes vLLM's CPU build (docs/vllm.md).
        params = SamplingParams(
            n=request["group_size"], temperature=1.0, top_p=1.0, top_k=0, detokenize=False,
            max_tokens=request["max_tokens"], stop_token_ids=request["end_ids"],
        )  # fmt: skip
        llm.reset_prefix_cache()  # a trainer updates weights between calls, which invalidates the cache
        outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(rollout.token_ids) for out in outs for rollout in out.outputs)

    rows = {}
    for size, prompts in request["sizes"].items():
        run(prompts[:1])
        times, tokens = [], []
        for _ in range(request["rounds"]):
            start = time.perf_counter()
            tokens.append(run(prompts))
            times.append(time.perf_counter() - start)
        rows[size] = {"seconds": times, "tokens": tokens}
    result_path.write_text(json.dumps(rows))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
