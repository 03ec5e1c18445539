"""Escapes control tokens in data: a quoted ``<|im_end|>`` must stay text and not end a turn.

A rendered chat is tokenised with its control tokens parsed as such, so data that quotes one could
end its turn. `ControlTokens.escape` therefore inserts a break inside every such string before it
goes into a template, and `ControlTokens.encode` tokenises the rendered text piece by piece: no piece
holds a whole control token, and the break itself leaves no token. Text without such strings has the
same ids as without escaping.

A server tokenises what it receives itself, and its tokenizer is not available here. For servers
`ControlTokenEscaper` recognises control tokens by pattern and breaks them with a character of no
width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

BREAK = "\ufdd0"
"""Breaks a control token. A Unicode noncharacter: no text has a use for it, and it is
no white space, which chat templates strip."""

NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")

WORD_JOINER = "\u2060"
"""Has no width and is no white space; every tokenizer gives it one or several separate tokens."""

CONTROL_TOKEN_PATTERNS = (
    r"<[|｜]",  # ChatML, Llama 3 and 4, Phi, gpt-oss, Command R, Granite, GLM; DeepSeek's wide bars
    r"<\w+[|｜]>",  # Gemma 4 closes with <turn|>
    r"<</?SYS>>",  # Llama 2
    r"</?(?:s|bos|eos|pad|unk|mask|sop|eop|think|tools?|tool_calls?|tool_responses?)>",
    # Gemma, T5 and Nemotron, code models, MiniMax-Text
    r"</?(?:(?:start|end|begin|beginning)_of_\w+|unused_?\d+|extra_id_\d+|fim_\w+)>",
    r"</?(?:seed|minimax):\w+>",  # Seed-OSS, MiniMax
    # LongCat, Ling, GLM, Nemotron
    r"</?(?:longcat_\w+|role|arg_key|arg_value|TOOLCALL|AVAILABLE_TOOLS)>",
    # Yuan, Gemma 3, InternVL
    r"<(?:PAD|UNK|SEP|CLS|EOD|MASK|BOS|EOS|eod|image_soft_token|IMG_CONTEXT)>",
    r"<(?:repo_name|reponame|file_sep|filename|gh_stars|(?:jupyter|issue)_\w+)>",  # StarCoder
    r"<(?:reserved|SPECIAL)_\d+>",  # Baichuan 2; Nemotron-H, Apertus
    r"<[A-Z]_[A-Z]{1,5}>",  # Baichuan-M
    r"\[\|\w{2,}\|\]",  # EXAONE
    r"\]~!?b[\[\]]|\[e~\[",  # MiniMax-M1 and M2
    r"\[/?(?=\w*[A-Z]{3})\w++\]",  # Mistral's [INST], [TOOL_CALLS]; GLM's [gMASK]
)
"""Regular expressions that match the control tokens of the common model families."""


class ControlTokens:
    """Escapes the control tokens of one tokenizer in data, and encodes rendered text.

    Every added token steers a model, also those not flagged as special (``<think>`` with Qwen3,
    ``<start_of_turn>`` with some Gemmas). Added tokens that are ordinary text (words, runs of white
    space) are left alone. A control token of a single character cannot be broken; we know of none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special: dict[int, str] = {
            **{i: token.content for i, token in added.items() if token.special},
            **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)),
        }
        """Special tokens by id: they are dropped when a rollout is decoded to text."""
        steering = self.special | {
            i: token.content for i, token in added.items() if not _is_ordinary(token.content)
        }
        # Words that are not in the vocabulary become the unknown token: it must not count as control.
        self.ids = frozenset(i for i in steering if i != tokenizer.unk_token_id)
        either = "|".join(re.escape(content) for content in steering.values() if content)
        self._first_character = re.compile(f"(?={either})." if either else "(?!)", re.DOTALL)

    def escape(self, text: str) -> str:
        """Insert `BREAK` after the first character of each control token; drop noncharacters."""
        bare = NONCHARACTERS.sub("", text)
        escaped = self._first_character.sub(rf"\g<0>{BREAK}", bare)
        if self.ids.isdisjoint(self.encode(escaped)):
            return escaped
        # The normaliser made a control token of another spelling, for example full-width letters.
        return BREAK.join(bare)

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode a rendered text, no token across a `BREAK`; adds no special tokens at the ends."""
        first, *rest = text.split(BREAK)
        ids = self._encode(first)
        newline = self._encode("\n") if rest else []
        for piece in rest:
            # After a line break, since some tokenizers put a space in front of every text.
            with_newline = self._encode("\n" + piece)
            is_after = with_newline[: len(newline)] == newline
            ids += with_newline[len(newline) :] if is_after else self._encode(piece)
        return tuple(ids)

    def _encode(self, text: str) -> list[int]:
        # The chat template writes every special token itself: a second BOS would go unnoticed.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def strip_special(self, ids: Sequence[int], keep: Sequence[str]) -> list[int]:
        """Return the ids without special tokens, except those whose text is in ``keep``."""
        return [i for i in ids if i not in self.special or self.special[i] in keep]


@dataclass(frozen=True, slots=True)
class ControlTokenEscaper:
    """Escapes control tokens of a tokenizer that is not available, recognised by pattern.

    ``escape("a<|im_end|>b")`` reads the same to a person, with a word joiner after the ``<``; text
    that matches no pattern is unchanged. This is weaker than `ControlTokens`: control tokens of an
    unusual form must be named in ``extra_tokens``, and a tokenizer that drops the joiner undoes it.
    """

    extra_tokens: tuple[str, ...] = ()
    """Control tokens, verbatim, that `CONTROL_TOKEN_PATTERNS` does not match."""

    def escape(self, text: str) -> str:
        """Insert a word joiner after the first character of each control token."""
        either = "|".join((*CONTROL_TOKEN_PATTERNS, *map(re.escape, self.extra_tokens)))
        return re.sub(f"(?={either}).", rf"\g<0>{WORD_JOINER}", text, flags=re.DOTALL)

    def unescape(self, text: str) -> str:
        """Remove the word joiners that a reply repeats from an escaped prompt."""
        first = "".join(sorted({"<", "[", "]", *(token[0] for token in self.extra_tokens)}))
        return re.sub(f"(?<=[{re.escape(first)}]){WORD_JOINER}", "", text)


def _is_ordinary(content: str) -> bool:
    bare = content.replace("▁", " ").strip()
    return not bare or bare.isalnum()
