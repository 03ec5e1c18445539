"""Text from others as text: what looks like a control token in it must not become one.

A question that quotes ``<|im_end|>`` would end its own turn, since a rendered chat is tokenised with
its control tokens read as such. So data is *cut* inside every string of that kind before it goes
into a template, and the rendered text is tokenised piece by piece: no piece holds a whole control
token, and the cut itself leaves no trace. Text without such strings has the ids it always had.

A server tokenises what it is sent itself, and we do not know with what. There control tokens are told
by their looks and broken by a character that takes no space (`Spellings`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

CUT = "\ufdd0"
"""A Unicode noncharacter: no text holds it for a reason of its own, and it is no white space, which
chat templates strip."""

NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")

JOINER = "\u2060"
"""Word joiner: no width, no white space, and a token of its own (or several) everywhere."""

LOOKS = (
    r"<[|｜]",  # ChatML, Llama 3 and 4, Phi, gpt-oss, Command R, Granite, GLM; DeepSeek's wide bars
    r"<\w+[|｜]>",  # Gemma 4 closes with <turn|>
    r"<</?SYS>>",  # Llama 2
    r"</?(?:s|bos|eos|pad|unk|mask|sop|eop|think|tools?|tool_calls?|tool_responses?)>",
    r"</?(?:(?:start|end|begin)_of_\w+|unused_?\d+|extra_id_\d+|fim_\w+)>",  # Gemma, T5, code models
    r"\[/?\w*[A-Z]{3}\w*\]",  # Mistral's [INST], [TOOL_CALLS]; GLM's [gMASK]
)
"""What the control tokens of the common families look like."""


class ControlTokens:
    """The control tokens of one tokenizer.

    Every added token steers a model, also those that are not special by name (``<think>`` with Qwen3,
    ``<start_of_turn>`` with some Gemmas). Left alone are those that are ordinary text: words, and
    runs of white space. A control token of a single character cannot be cut; we know of none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special: dict[int, str] = {
            **{i: token.content for i, token in added.items() if token.special},
            **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)),
        }
        """Those that are no part of a text, by id."""
        steering = self.special | {
            i: token.content for i, token in added.items() if not _is_ordinary(token.content)
        }
        # Words that a tokenizer does not know become its unknown token.
        self.ids = frozenset(i for i in steering if i != tokenizer.unk_token_id)
        either = "|".join(re.escape(content) for content in steering.values() if content)
        self._first_character = re.compile(f"(?={either})." if either else "(?!)", re.DOTALL)

    def cut(self, text: str) -> str:
        """Data, cut wherever a control token begins; it can hold no noncharacters of its own."""
        bare = NONCHARACTERS.sub("", text)
        cut = self._first_character.sub(rf"\g<0>{CUT}", bare)
        if self.ids.isdisjoint(self.encode(cut)):
            return cut
        # A normaliser has made one of another spelling, for example of full-width letters.
        return CUT.join(bare)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered text, no token across a cut; nothing is added at the ends."""
        first, *rest = text.split(CUT)
        ids = self._encode(first)
        newline = self._encode("\n") if rest else []
        for piece in rest:
            # Behind a line break, lest a tokenizer puts in the space that it begins every text with.
            behind = self._encode("\n" + piece)
            is_behind = behind[: len(newline)] == newline
            ids += behind[len(newline) :] if is_behind else self._encode(piece)
        return tuple(ids)

    def _encode(self, text: str) -> list[int]:
        # The chat template has written every special token itself: a second BOS would go unseen.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def without(self, ids: Sequence[int], kept: Sequence[str]) -> list[int]:
        """Ids without special tokens, save those named in ``kept``."""
        return [i for i in ids if i not in self.special or self.special[i] in kept]


@dataclass(frozen=True, slots=True)
class Spellings:
    """Control tokens of a tokenizer that is not here, told by their looks.

    ``broken("a<|im_end|>b")`` is the same text to a reader, with a word joiner behind the ``<``; text
    without such looks is left alone. This is weaker than `ControlTokens`: a family that spells its
    tokens in a way of its own must be named, and a tokenizer that drops the joiner undoes it.
    """

    others: tuple[str, ...] = ()
    """Control tokens, letter by letter, that `LOOKS` misses."""

    def broken(self, text: str) -> str:
        """The text with a word joiner behind the first character of each control token."""
        either = "|".join((*LOOKS, *map(re.escape, self.others)))
        return re.sub(f"(?={either}).", rf"\g<0>{JOINER}", text, flags=re.DOTALL)

    def mended(self, text: str) -> str:
        """What was said of a broken text, without the joiners that it repeats."""
        first = "".join(sorted({"<", "[", *(other[0] for other in self.others)}))
        return re.sub(f"(?<=[{re.escape(first)}]){JOINER}", "", text)


def _is_ordinary(content: str) -> bool:
    bare = content.replace("▁", " ").strip()
    return not bare or bare.isalnum()
