"""Builds the lab's word-level tokenizer, in Hugging Face format with a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from selfteach.tasks.lab.world import ANSWER_MARK, CHILDREN, FLAG, STYLES, SYMBOLS

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = (
    *SYMBOLS,
    *(str(node) for node in range(len(CHILDREN))),
    *(mark for style in STYLES.values() for mark in style.marks),
    FLAG,
    ANSWER_MARK,
    "ok",
    "wrong",
    "<see>",
    "<say>",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} <say> {{ message['content'] }} {{ eos_token }}"
    "{% else %} {{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <say>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one id per word; line breaks are white space to it."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
