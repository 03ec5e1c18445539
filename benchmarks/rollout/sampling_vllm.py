"""Times vLLM on prompts from a file, in an environment of its own; see sampling.py.

    .venv-vllm/bin/python benchmarks/sampling_vllm.py ASKED.json SAID.json

ASKED has ``model`` (a folder), ``context``, ``end_ids``, ``max_tokens``, ``rounds``, ``each`` (answers
to a prompt) and ``sizes``: for each number of answers the prompts as token ids. SAID gets, per size,
the seconds and the answer tokens of every round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Load, warm up, and time every size."""
    asked, said = (Path(name) for name in sys.argv[1:3])
    wanted = json.loads(asked.read_text())
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(
        model=wanted["model"], dtype="float32", max_model_len=wanted["context"],
        max_num_seqs=128, enforce_eager=True, skip_tokenizer_init=True,
        generation_config="vllm", enable_prefix_caching=True,
    )  # fmt: skip

    def run(prompts: list[list[int]]) -> int:
        # No seed: with one, prompts that are read in parts end vLLM's CPU build (docs/vllm.md).
        params = SamplingParams(
            n=wanted["each"], temperature=1.0, top_p=1.0, top_k=0, detokenize=False,
            max_tokens=wanted["max_tokens"], stop_token_ids=wanted["end_ids"],
        )  # fmt: skip
        llm.reset_prefix_cache()  # other weights make other keys: a trainer may not keep them
        outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(answer.token_ids) for out in outs for answer in out.outputs)

    rows = {}
    for size, prompts in wanted["sizes"].items():
        run(prompts[:1])
        times, tokens = [], []
        for _ in range(wanted["rounds"]):
            began = time.perf_counter()
            tokens.append(run(prompts))
            times.append(time.perf_counter() - began)
        rows[size] = {"seconds": times, "tokens": tokens}
    said.write_text(json.dumps(rows))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
