"""What guessing from the prompt is worth: tokens per pass and speed, by kind of critique.

    python benchmarks/prompt_lookup.py MODEL [--tokens 64] [--guess 10]

MODEL is a folder or a name for transformers. It is shown wrong answers and asked either to write them
out again with the mistake corrected (step_aligned) or to say in its own words what is wrong (holistic);
greedy, one at a time, with and without `critic.prompt_lookup`. Prints, per kind, the acceptance length
(tokens written per pass), the seconds of each way, and how many replies are the same.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ANSWERS = (
    "1. 14 + 27 = 41\n2. 41 - 9 = 32\n3. 32 * 3 = 98\n4. 98 + 6 = 104\nThe answer is 104.",
    "1. The train is late by 12 minutes.\n2. It leaves at 9:48.\n3. 9:48 plus 12 minutes is 9:58.\n"
    "4. So it leaves at 9:58.\nThe answer is 9:58.",
)
KINDS = {
    "step_aligned": "Copy this solution line by line, word for word, and correct the wrong line:",
    "holistic": "In a few sentences of your own, say what is good and what is wrong in this solution:",
}


def main() -> None:
    """Measure both kinds and print a line of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--guess", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))

    def write(kind: str, answer: str, **guessed: int) -> tuple[list[int], float, int]:
        """The tokens of one reply, its seconds, and its passes."""
        messages = [{"role": "user", "content": f"{KINDS[kind]}\n\n{answer}"}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        passes.clear()
        began = time.monotonic()
        with torch.no_grad():
            out = model.generate(**prompt, max_new_tokens=args.tokens, do_sample=False, **guessed)
        seconds = time.monotonic() - began
        return out[0, prompt["input_ids"].shape[1] :].tolist(), seconds, len(passes)

    write("holistic", ANSWERS[0])  # the first call is slower
    print("kind           tokens  passes  per pass  plain, s  guessed, s  speed-up  same")
    for kind in KINDS:
        plain = [write(kind, answer) for answer in ANSWERS]
        told = [write(kind, answer, prompt_lookup_num_tokens=args.guess) for answer in ANSWERS]
        tokens, passed = sum(len(ids) for ids, _, _ in told), sum(n for _, _, n in told)
        slow, fast = (sum(seconds for _, seconds, _ in way) for way in (plain, told))
        same = sum(a[0] == b[0] for a, b in zip(plain, told, strict=True))
        print(
            f"{kind:14s}{tokens:7d}{passed:8d}{tokens / passed:10.2f}{slow:10.1f}{fast:12.1f}"
            f"{slow / fast:10.2f}{same:4d}/{len(plain)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
