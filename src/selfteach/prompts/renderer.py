"""Text in, token ids out: the only caller of tokenizer and chat template."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from selfteach.errors import EngineError
from selfteach.prompts.control_tokens import ControlTokens
from selfteach.prompts.template_set import Message, Templates, conversation
from selfteach.prompts.thinking import Thinking, split_thinking
from selfteach.types import Problem

TODAY = datetime(2024, 7, 26)
"""The date that chat templates write: a resumed run must repeat itself."""

PROMPTS_KEPT = 4096
"""Questions whose token ids are kept, and texts that are known to hold no control token."""

CONTEXTS_KEPT = 512
"""Contexts whose prompts' ids are kept: answers to one question may share theirs."""

_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = "probe"


class Renderer:
    """Prompts as token ids and answers as text, for one tokenizer and one template set.

    Raises `EngineError` for a tokenizer without a chat template or without an end token, and for a
    chat template that refuses a conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: Templates,
        *,
        system: str | None = None,
        thinking: Thinking | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise EngineError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "use an instruction-tuned model, or save the tokenizer with one"
            )
        if tokenizer.eos_token_id is None:
            raise EngineError(f"the tokenizer of {tokenizer.name_or_path!r} has no end token")
        self._tokenizer, self._templates = tokenizer, templates
        self._chat_template = _dated(tokenizer.get_chat_template())
        self._thinking = thinking or Thinking()
        # A run asks the same questions and reads the same tokens again and again.
        self._asked = lru_cache(PROMPTS_KEPT)(self._encode_question)
        self._told = lru_cache(CONTEXTS_KEPT)(self._encode_context)
        self._piece = lru_cache(None)(lambda token: self._decode([token]))
        self._spelled = lru_cache(None)(lambda token: str(tokenizer.decode([token])))
        self._control = ControlTokens(tokenizer)
        self._cut = lru_cache(PROMPTS_KEPT)(self._control.cut)
        self._system = system
        self._system_has_role = system is not None and self._places_system()
        self._headers = self._headers_of_both()
        asked = self._chat([_user(_PROBE)], self._thinking.student)
        self._opens_thought = asked.rstrip().endswith(self._thinking.tags[0])
        self.end_id = self._end_of_turn()
        """The token that ends an answer in this chat template."""

    def solver_prompt(self, problem: Problem) -> tuple[int, ...]:
        """What the student sees: the question, and the header of the answer."""
        return self._asked(problem.question)

    def _encode_question(self, question: str) -> tuple[int, ...]:
        messages = self._messages("solver", question=question)
        return self._control.encode(self._chat(messages, self._thinking.student))

    def teacher_prompt(self, problem: Problem, context: str) -> tuple[int, ...]:
        """What the self-teacher sees: question, context, and the student's header (`Thinking`)."""
        return self._told(problem.question, context)

    def _encode_context(self, question: str, context: str) -> tuple[int, ...]:
        messages = self._messages("teacher", question=question, context=context)
        text = self._chat(messages, self._thinking.teacher)
        if self._headers is not None:
            own, student = self._headers
            assert text.endswith(own)
            text = text.removesuffix(own) + student
        return self._control.encode(text)

    def encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation as token ids, ready for the reply; all content is data."""
        cut = [
            {**message, "content": self._control.cut(message["content"])} for message in messages
        ]
        return self._control.encode(self._chat(self._with_system(cut), self._thinking.student))

    def decode(self, token_ids: Sequence[int]) -> str:
        """An answer's text, without special tokens and without a thought before it."""
        return self._split(self._decode(token_ids))[1]

    def token_text(self, token: int) -> str:
        """One token as text, special tokens by name."""
        return self._spelled(token)

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer that was *not* sampled, end token included (for tests and analysis).

        A sampled answer is never encoded again: other ids can spell the same text.
        """
        return (*self._tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id)

    def token_ends(self, token_ids: Sequence[int]) -> list[int]:
        """Where each token of an answer ends in its text, in characters; 0 for those of a thought.

        Decoding token by token is exact for most tokenizers and is checked; where pieces do not add
        up to the text (characters split over tokens) every prefix is decoded instead.
        """
        text = self._decode(token_ids)
        thought = len(text) - len(self._split(text)[1])
        return [max(0, end - thought) for end in self._ends(token_ids, text)]

    def scored_from(self, token_ids: Sequence[int]) -> int:
        """Index of the first token that counts: past the thought where thoughts are not scored.

        A thought that never ends leaves no token to score.
        """
        if self._thinking.scored or not self._split(self._decode(token_ids))[0]:
            return 0
        return bisect_right(self.token_ends(token_ids), 0)

    def _ends(self, token_ids: Sequence[int], text: str) -> list[int]:
        pieces = [self._piece(token) for token in token_ids]
        for gap in ("", " "):
            ends = _ends(pieces, gap)
            if ends and ends[-1] == len(text) and gap.join(filter(None, pieces)) == text:
                return ends
        return [len(self._decode(token_ids[: i + 1])) for i in range(len(token_ids))]

    def _split(self, text: str) -> tuple[str, str]:
        return split_thinking(text, self._thinking.tags, opened=self._opens_thought)

    def _messages(self, template: str, **data: str) -> list[Message]:
        cut = {name: self._cut(text) for name, text in data.items()}
        return self._with_system(conversation(self._templates.render(template, **cut)))

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """The recipe's system prompt first; in the user's turn where there is no such role."""
        if self._system is None:
            return messages
        if self._system_has_role:
            return [{"role": "system", "content": self._system}, *messages]
        first, *rest = messages
        return [_user(f"{self._system}\n\n{first['content']}"), *rest]

    def _places_system(self) -> bool:
        """True if the chat template knows the role; some raise, some leave the text out."""
        try:
            probe = self._chat([{"role": "system", "content": _PROBE}, _user("?")], None)
        except EngineError:
            return False
        return _PROBE in probe

    def _headers_of_both(self) -> tuple[str, str] | None:
        """The teacher's header and the student's that replaces it; None where none is replaced."""
        asked = self._thinking
        if asked.boundary == "teacher" or asked.student == asked.teacher:
            return None
        headers = []
        for switch in (asked.teacher, asked.student):
            body = self._chat([_user(_PROBE)], switch, header=False)
            whole = self._chat([_user(_PROBE)], switch)
            if not whole.startswith(body):
                raise EngineError(
                    f"the chat template of {self._tokenizer.name_or_path!r} does not end in a header "
                    'of its own: set model.thinking.boundary = "teacher"'
                )
            headers.append(whole.removeprefix(body))
        return headers[0], headers[1]

    def _end_of_turn(self) -> int:
        """What the chat template writes behind an answer; the tokenizer's end token if nothing."""
        answered = [_user("?"), {"role": "assistant", "content": _PROBE}]
        behind = self._chat(answered, None, header=False).rpartition(_PROBE)[2]
        end = self._tokenizer.eos_token_id
        assert isinstance(end, int)
        return next((i for i in self._control.encode(behind) if i in self._control.ids), end)

    def _chat(self, messages: list[Message], thinking: bool | None, *, header: bool = True) -> str:
        # Families call the switch by different names; a template ignores what it does not know.
        switches: dict[str, Any] = (
            {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        )
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._chat_template,
                add_generation_prompt=header,
                tokenize=False,
                **switches,
            )
        except jinja2.TemplateError as error:
            name = self._tokenizer.name_or_path
            raise EngineError(f"the chat template of {name!r} fails: {error}") from error
        assert isinstance(text, str)
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        # Some families' end of a turn is not special by name, and is no text all the same.
        said = [token for token in ids if token != self.end_id]
        shown = self._control.without(said, kept=self._thinking.tags)
        text = self._tokenizer.decode(shown, skip_special_tokens=False)
        assert isinstance(text, str)
        return text


def _dated(chat_template: str) -> str:
    return _DATE_CALL.sub(lambda call: repr(TODAY.strftime(call[2])), chat_template)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _ends(pieces: Sequence[str], gap: str) -> list[int]:
    ends, at = [], 0
    for piece in pieces:
        if piece:
            at += len(piece) + (len(gap) if at else 0)
        ends.append(at)
    return ends
