"""Trains a base model: a small Llama, from scratch, on the writers' documents.

    python -m selfteach.tasks.lab.pretrain --world two_styles \\
        --out src/selfteach/tasks/lab/bases/two_styles

rebuilds the shipped one. Documents are about training questions only; the loss is on the answer, never
on the question or the context.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfteach.prompts.template_set import Templates
from selfteach.tasks.lab.corpus import CONTEXT_SHARES, DOCUMENTS, Document, document
from selfteach.tasks.lab.probe import measure, write_card
from selfteach.tasks.lab.tokenizer import build_tokenizer
from selfteach.tasks.lab.world import World
from selfteach.tasks.lab.worlds import WORLDS

IGNORE_INDEX = -100
STEPS = 2600
"""Optimizer steps of the shipped base models."""


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build a Llama of about 0.6 M parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=special_id(tokenizer, "pad"),
        bos_token_id=special_id(tokenizer, "bos"),
        eos_token_id=special_id(tokenizer, "eos"),
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def special_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """Return the id of a special token: ``pad``, ``bos`` or ``eos``."""
    token = tokenizer.convert_tokens_to_ids(f"<{name}>")
    assert isinstance(token, int)
    return token


def documents(
    world: World, templates: Templates, seed: int, shares: Mapping[str, float] = CONTEXT_SHARES
) -> Iterator[Document]:
    """Yield an endless stream of documents about training questions; ``shares`` is by context kind."""
    rng = np.random.default_rng([world.config.seed, 10, seed])
    kinds = list(shares)
    for question in world.questions("train", seed=10 + seed):
        yield document(
            world, templates, question, str(rng.choice(kinds, p=list(shares.values()))), rng
        )


def encode(
    tokenizer: PreTrainedTokenizerFast, templates: Templates, doc: Document
) -> tuple[list[int], int]:
    """Encode a document; return its token ids and the index of its answer's first token."""
    question = " ".join(doc.question)
    if doc.context is None:
        content = templates.render("solver", question=question)
    else:
        content = templates.render("teacher", question=question, context=doc.context)
    messages = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(prompt, str)
    answer = f" {doc.answer} {tokenizer.eos_token}"
    ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    return ids, len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def batches(
    stream: Iterator[tuple[list[int], int]], batch_size: int, pad_id: int, pool: int = 8
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of similar lengths: ids and targets, both [B, T]; only answers have targets."""
    while True:
        rows = sorted((next(stream) for _ in range(batch_size * pool)), key=lambda row: len(row[0]))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            width = max(len(ids) for ids, _ in batch)
            ids_BT = torch.full((len(batch), width), pad_id)
            target_BT = torch.full((len(batch), width), IGNORE_INDEX)
            for i, (ids, begin) in enumerate(batch):
                ids_BT[i, : len(ids)] = torch.tensor(ids)
                target_BT[i, begin - 1 : len(ids) - 1] = torch.tensor(ids[begin:])
            yield ids_BT, target_BT


def pretrain(
    world: World,
    out: Path,
    *,
    steps: int = STEPS,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    shares: Mapping[str, float] = CONTEXT_SHARES,
) -> Path:
    """Train a base model for a world and save it, with tokenizer and model card, in ``out``.

    ``shares`` is the share of each context kind among its documents.
    """
    torch.set_num_threads(1)
    templates, tokenizer = Templates("lab"), build_tokenizer()
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 40)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    pad_id = special_id(tokenizer, "pad")
    stream = (
        encode(tokenizer, templates, doc) for doc in documents(world, templates, seed, shares)
    )
    started = time.monotonic()
    for step, (ids_BT, target_BT) in enumerate(batches(stream, batch_size, pad_id)):
        if step == steps:
            break
        # Right padding needs no mask under causal attention: no answer token attends to its right.
        hidden_BTH = model.model(input_ids=ids_BT).last_hidden_state
        scored_BT = target_BT != IGNORE_INDEX
        logits_NV = model.lm_head(hidden_BTH[scored_BT])
        loss = torch.nn.functional.cross_entropy(logits_NV, target_BT[scored_BT])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            print(  # noqa: T201 - a command-line program
                f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
    training = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    save(model, tokenizer, world, out, training, shares)
    return out


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    out: Path,
    training: Mapping[str, object],
    shares: Mapping[str, float] = CONTEXT_SHARES,
) -> None:
    """Write model, tokenizer and world in Hugging Face format, and a model card with measurements."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = {"world": asdict(world.config), "training": training, "context_shares": shares}
    (out / "world.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_card(out, measure(out))


def main() -> None:
    """Command line: rebuild one shipped base, or build one for a fresh world."""
    parser = argparse.ArgumentParser(description="Train a base model of the lab.")
    parser.add_argument("--world", default="two_styles", choices=sorted(WORLDS))
    parser.add_argument("--world-seed", type=int, help="seed of the table and misconceptions")
    parser.add_argument(
        "--pull", type=float, help="pull of style, from 0 to 1; default: the world's"
    )
    parser.add_argument(
        "--documents", default="study", choices=sorted(DOCUMENTS),
        help="context kinds: `dial` adds the positions between critique and reference",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the documents")
    args = parser.parse_args()
    config = WORLDS[args.world]
    if args.world_seed is not None:
        config = replace(config, seed=args.world_seed)
    if args.pull is not None:
        config = replace(config, pull=args.pull)
    shares = DOCUMENTS[args.documents]
    pretrain(World(config), args.out, steps=args.steps, seed=args.seed, shares=shares)


if __name__ == "__main__":
    main()
