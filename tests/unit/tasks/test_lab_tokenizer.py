"""Test the lab's tokenizer: one id per word, a chat template, and a round trip through a folder."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from selfteach.prompts.template_set import SHIPPED, Templates
from selfteach.tasks.lab.corpus import CONTEXT_SHARES, Believer, context_for, references
from selfteach.tasks.lab.tokenizer import SPECIAL, WORDS
from selfteach.tasks.lab.world import ROOT, STYLES, World, text_of

QUESTION = [{"role": "user", "content": "a b c d e f"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "# k"}]


def test_one_id_per_word(lab_tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(lab_tokenizer) == len(SPECIAL) + len(WORDS) == len({*SPECIAL, *WORDS})
    for word in WORDS:
        ids = lab_tokenizer(word, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 and lab_tokenizer.decode(ids) == word


def test_solutions_decode_to_the_same_words(lab_tokenizer: PreTrainedTokenizerFast) -> None:
    world = World()
    for question in islice(world.questions("train"), 20):
        for style in STYLES.values():
            text = text_of(world.solution(question, style), world.truth(question)[ROOT])
            ids = lab_tokenizer(text, add_special_tokens=False)["input_ids"]
            assert lab_tokenizer.unk_token_id not in ids
            assert lab_tokenizer.decode(ids).split() == text.split()
        for text in references(world, question).values():
            assert lab_tokenizer.unk_token_id not in lab_tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", [kind for kind in CONTEXT_SHARES if kind != "none"])
def test_contexts_are_words_of_the_vocabulary(
    lab_tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    world, templates = World(), Templates("lab")
    for i, question in enumerate(islice(world.questions("train"), 20)):
        rng = np.random.default_rng(i)
        shown = context_for(world, templates, question, kind, Believer(world, rng), rng)
        assert lab_tokenizer.unk_token_id not in lab_tokenizer(shown)["input_ids"]


def test_templates_hold_only_words_of_the_vocabulary() -> None:
    literal = {"ok", "wrong", "#", "<see>"}
    assert literal <= set(WORDS)
    names = {path.stem for path in (SHIPPED / "lab").glob("*.jinja")}
    assert set(CONTEXT_SHARES) - {"none", "shuffled_lines", "other_answer"} <= names


def test_chat_template_by_hand(lab_tokenizer: PreTrainedTokenizerFast) -> None:
    def chat(messages, header: bool) -> str:
        text = lab_tokenizer.apply_chat_template(
            messages, add_generation_prompt=header, tokenize=False
        )
        assert isinstance(text, str)
        return text

    assert chat(QUESTION, True) == "<bos> a b c d e f <say>"
    assert chat(ANSWERED, False) == "<bos> a b c d e f <say> # k <eos>"
    # The training text continues the prompt.
    assert chat(ANSWERED, False).startswith(chat(QUESTION, True))


def test_unknown_words_become_the_unknown_token(lab_tokenizer: PreTrainedTokenizerFast) -> None:
    (only,) = lab_tokenizer("q", add_special_tokens=False)["input_ids"]
    assert only == lab_tokenizer.unk_token_id


@pytest.mark.parametrize("text", ["a b\nc", "0 + a b = c\n# k", "<bos> a <say>"])
def test_a_saved_tokenizer_encodes_the_same(
    lab_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str
) -> None:
    lab_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == lab_tokenizer(text)["input_ids"]
    assert again.get_vocab() == lab_tokenizer.get_vocab()
    assert again.chat_template == lab_tokenizer.chat_template
    for name in ("pad", "bos", "eos", "unk"):
        token = f"{name}_token_id"
        assert getattr(again, token) == getattr(lab_tokenizer, token) is not None
