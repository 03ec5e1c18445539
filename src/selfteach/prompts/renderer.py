"""Renders prompts to token ids and decodes rollouts: the only user of tokenizer and chat template."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfteach.errors import EngineError
from selfteach.prompts.control_tokens import ControlTokens
from selfteach.prompts.environment_replies import ReplyEncoder, require_tools
from selfteach.prompts.template_set import Message, Templates, conversation, with_history
from selfteach.prompts.thinking import Thinking, split_thinking
from selfteach.prompts.tool_calls import Role, Tool, ToolFormat, tool_format
from selfteach.types import Problem

INCOMPLETE = "\ufffd"
"""What tokens that are a part of a character decode to."""
LONGEST_RUN = 32
"""Most tokens that are decoded together: INCOMPLETE may also be what the text says."""

TODAY = datetime(2024, 7, 26)
"""The date that chat templates write, fixed so that a resumed run has the same prompts."""

PROMPT_CACHE_SIZE = 4096
"""Entries of the cache of student prompts (by question), and of the cache of escaped texts."""

CONTEXT_CACHE_SIZE = 512
"""Entries of the cache of teacher prompts: rollouts of one group may share their context."""

History = tuple[tuple[str, str], ...]
"""Messages before a question: `Problem.history`."""

_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = "probe"


class Renderer:
    """Encodes prompts and decodes rollouts, for one tokenizer and one template set.

    Raises `EngineError` for a tokenizer without a chat template or without an end token, and for a
    chat template that fails on a conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: Templates,
        *,
        system: str | None = None,
        teacher_system: str | None = None,
        thinking: Thinking | None = None,
        tools: Sequence[Tool] = (),
        tool_calls: ToolFormat | None = None,
    ) -> None:
        """Store tokenizer and templates; ``teacher_system`` is ``system`` where it is None.

        ``tools`` are an environment's, as JSON schemas: student's and teacher's prompts offer them.
        ``tool_calls`` is how they are called; None: as the chat template's family does.
        """
        if tokenizer.chat_template is None:
            raise EngineError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "use an instruction-tuned model, or save the tokenizer with one"
            )
        if tokenizer.eos_token_id is None:
            raise EngineError(f"the tokenizer of {tokenizer.name_or_path!r} has no end token")
        self._tokenizer = tokenizer
        self._chat_template = _dated(tokenizer.get_chat_template())
        self._thinking = thinking or Thinking()
        self._tools: list[Any] = [dict(tool) for tool in tools]
        # The same questions and tokens recur throughout a run.
        self._solver_ids = lru_cache(PROMPT_CACHE_SIZE)(self._encode_question)
        self._teacher_ids = lru_cache(CONTEXT_CACHE_SIZE)(self._encode_context)
        self._piece = lru_cache(None)(lambda token: self._decode([token]))
        self._token_text = lru_cache(None)(lambda token: str(tokenizer.decode([token])))
        self._control = ControlTokens(tokenizer)
        self._escape = lru_cache(PROMPT_CACHE_SIZE)(self._control.escape)
        self._system = system
        self._teacher_system = system if teacher_system is None else teacher_system
        self._content_is_parts = False
        self._content_is_parts = self._takes_parts_only()
        self._headers = self._headers_to_swap()
        prompt = self._chat([_user(_PROBE)], self._thinking.student)
        self._opens_thought = prompt.rstrip().endswith(self._thinking.tags[0])
        self.end_id = self._end_of_turn()
        """The token that ends the assistant's turn in this chat template."""
        known = tool_calls or tool_format(self._chat_template)
        self.tool_format = known and known.offering(tools)
        """How this family writes calls of these tools; None for a family that is not known."""
        self.templates = templates.offering(tools, self.tool_format)
        """The templates, with these tools in the form of this family."""
        require_tools(tokenizer.name_or_path, self._tools, self.tool_format, prompt)
        self._replies = ReplyEncoder(
            lambda messages, header: self._chat(messages, self._thinking.student, header=header),
            self._control, self.end_id, tokenizer.name_or_path, self._thinking.tags,
        )  # fmt: skip

    def solver_prompt(self, problem: Problem) -> tuple[int, ...]:
        """Return the student's prompt: history, question and the assistant header."""
        return self._solver_ids(problem.question, problem.history)

    def _encode_question(self, question: str, history: History) -> tuple[int, ...]:
        messages = self._messages("solver", self._system, history, question=question)
        return self._control.encode(self._chat(messages, self._thinking.student))

    def teacher_prompt(self, problem: Problem, context: str | None) -> tuple[int, ...]:
        """Return the self-teacher's prompt: question, context and the student's header (`Thinking`).

        Without a context it is the student's prompt with the teacher's system prompt and thinking.
        """
        return self._teacher_ids(problem.question, problem.history, context)

    def _encode_context(
        self, question: str, history: History, context: str | None
    ) -> tuple[int, ...]:
        template, data = ("solver", {}) if context is None else ("teacher", {"context": context})
        messages = self._messages(
            template, self._teacher_system, history, question=question, **data
        )
        text = self._chat(messages, self._thinking.teacher)
        if self._headers is not None:
            teacher_header, student_header = self._headers
            assert text.endswith(teacher_header)
            text = text.removesuffix(teacher_header) + student_header
        return self._control.encode(text)

    def encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode a conversation, ready for the assistant's reply; all content is data."""
        escaped = [
            {**message, "content": self._control.escape(message["content"])} for message in messages
        ]
        messages = self._with_system(escaped, self._system)
        return self._control.encode(self._chat(messages, self._thinking.student))

    def reply(self, texts: Sequence[str], role: Role) -> tuple[int, ...]:
        """Encode what an environment replies to a turn, up to the header of the next one.

        These are the ids that follow the turn's end token; the texts are data.
        """
        return self._replies.encode([self._escape(text) for text in texts], role)

    def require_replies(self, role: Role) -> None:
        """Check that messages of a role can follow a turn as it was sampled. Raises `EngineError`."""
        can_think = self._thinking.student is not False
        thoughts = can_think and self._thinking.tags[1] in self._chat_template
        self._replies.require(role, thoughts=thoughts)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode a rollout, without special tokens and without the thinking part."""
        return self._split(self._decode(token_ids))[1]

    def completion(self, token_ids: Sequence[int]) -> str:
        """Decode a rollout as TRL does: with its thought, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def shown(self, token_ids: Sequence[int]) -> str:
        """Decode a prompt with its control tokens, for a person to read."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def token_text(self, token: int) -> str:
        """Decode one token, special tokens by name."""
        return self._token_text(token)

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Encode an answer that was *not* sampled, end token included (for tests and analysis).

        A rollout is never re-encoded from its text: other ids can spell the same text.
        """
        return (*self._tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id)

    def token_ends(self, token_ids: Sequence[int]) -> list[int]:
        """Return where each token ends in the decoded text, in characters; 0 within a thought.

        They never decrease; a token that is a part of a character ends where the character does.
        Decoding token by token is exact for most tokenizers and is checked; where the pieces do not
        add up to the text, tokens are decoded behind the one before them, or else every prefix.
        """
        text = self._decode(token_ids)
        thought = len(text) - len(self._split(text)[1])
        return [max(0, end - thought) for end in self._ends(token_ids, text)]

    def scored_from(self, token_ids: Sequence[int]) -> int:
        """Return the index of the first scored token: after the thought if thoughts are not scored.

        A thought that never ends leaves no token to score.
        """
        if self._thinking.scored or not self._split(self._decode(token_ids))[0]:
            return 0
        return bisect_right(self.token_ends(token_ids), 0)

    def _ends(self, token_ids: Sequence[int], text: str) -> list[int]:
        pieces = [self._piece(token) for token in token_ids]
        # With a gap it would be a guess whether a piece without text stands for the space.
        words = pieces[: 1 + max((i for i, piece in enumerate(pieces) if piece), default=-1)]
        for gap in ("", " ") if all(words) else ("",):
            ends = _ends(pieces, gap)
            if ends and ends[-1] == len(text) and gap.join(filter(None, pieces)) == text:
                return ends
        ends, joined = self._ends_by_runs(token_ids)
        if joined != text:
            ends = [len(self._decode(token_ids[: i + 1])) for i in range(len(token_ids))]
        # A prefix that ends inside a character may be longer than the one that completes it.
        return list(accumulate(reversed(ends), min))[::-1]

    def _ends_by_runs(self, token_ids: Sequence[int]) -> tuple[list[int], str]:
        """Decode runs of tokens that make up whole characters; return ends, and the runs' joined text.

        A run is decoded behind the token before it, since some tokenizers strip the first space.
        """
        ends: list[int] = []
        texts: list[str] = []
        anchor: tuple[int, ...] = ()
        run: list[int] = []
        at, before, text = 0, "", ""
        for token in token_ids:
            run.append(token)
            text = self._decode([*anchor, *run]).removeprefix(before)
            ends.append(at + len(text))
            if text.endswith(INCOMPLETE) and len(run) < LONGEST_RUN:
                continue
            texts.append(text)
            at, run = at + len(text), []
            if piece := self._decode([token]):
                anchor, before = (token,), piece
        return ends, "".join(texts) + (text if run else "")

    def _split(self, text: str) -> tuple[str, str]:
        return split_thinking(text, self._thinking.tags, opened=self._opens_thought)

    def _messages(
        self, template: str, system: str | None, history: History, **data: str
    ) -> list[Message]:
        escaped = {name: self._escape(text) for name, text in data.items()}
        messages = conversation(self.templates.render(template, **escaped))
        earlier = [(role, self._escape(content)) for role, content in history]
        return self._with_system(with_history(messages, earlier), system)

    def _with_system(self, messages: list[Message], system: str | None) -> list[Message]:
        """Put the system prompt, then the conversation's system messages, before the conversation.

        They are one message; without a system role they begin the first user turn.
        """
        contents = [message["content"] for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        contents = contents if system is None else [system, *contents]
        if not contents:
            return turns
        joined = "\n\n".join(contents)
        if self._system_has_role:
            return [{"role": "system", "content": joined}, *turns]
        first = next(i for i, message in enumerate(turns) if message["role"] == "user")
        turns[first] = _user(f"{joined}\n\n{turns[first]['content']}")
        return turns

    def _takes_parts_only(self) -> bool:
        """Return True for a chat template that writes content only if it is a list of parts.

        Raises `EngineError` for one that writes a user's message in neither form.
        """
        for parts in (False, True):
            self._content_is_parts = parts
            if _PROBE in self._chat([_user(_PROBE)], None):
                return parts
        raise EngineError(
            f"the chat template of {self._tokenizer.name_or_path!r} does not write what the user says: "
            "every prompt would be the same"
        )

    @cached_property
    def _system_has_role(self) -> bool:
        """Return True if the chat template writes system messages; some raise, some drop the text."""
        try:
            probe = self._chat([{"role": "system", "content": _PROBE}, _user("?")], None)
        except EngineError:
            return False
        return _PROBE in probe

    def _headers_to_swap(self) -> tuple[str, str] | None:
        """Return the teacher's header and the student's that replaces it; None to replace none."""
        thinking = self._thinking
        if thinking.boundary == "teacher" or thinking.student == thinking.teacher:
            return None
        headers = []
        for switch in (thinking.teacher, thinking.student):
            body = self._chat([_user(_PROBE)], switch, header=False)
            whole = self._chat([_user(_PROBE)], switch)
            if not whole.startswith(body):
                raise EngineError(
                    f"the chat template of {self._tokenizer.name_or_path!r} does not end in a "
                    'separate assistant header: set model.thinking.boundary = "teacher"'
                )
            headers.append(whole.removeprefix(body))
        self._require_effect(headers)
        return headers[0], headers[1]

    def _require_effect(self, headers: Sequence[str]) -> None:
        """Raise for a teacher that is told to think, or not to, by a header that is then replaced."""
        thinking = self._thinking
        switches = (thinking.student, thinking.teacher)
        bodies = {self._chat([_user(_PROBE)], switch, header=False) for switch in switches}
        if thinking.teacher is not None and len(bodies) == 1 and headers[0] != headers[1]:
            value = str(thinking.teacher).lower()
            raise EngineError(
                f"model.thinking.teacher = {value} changes nothing: the chat template of "
                f"{self._tokenizer.name_or_path!r} writes it in the assistant header alone, which "
                'boundary = "student" replaces: set model.thinking.boundary = "teacher", or remove '
                "model.thinking.teacher"
            )

    def _end_of_turn(self) -> int:
        """Return the token the chat template writes after an answer, by default the tokenizer's eos."""
        dialogue = [_user("?"), {"role": "assistant", "content": _PROBE}]
        after = self._chat(dialogue, None, header=False).rpartition(_PROBE)[2]
        end = self._tokenizer.eos_token_id
        assert isinstance(end, int)
        return next((i for i in self._control.encode(after) if i in self._control.ids), end)

    def _chat(self, messages: list[Message], thinking: bool | None, *, header: bool = True) -> str:
        # Families call the switch by different names; a template ignores unknown variables.
        switches: dict[str, Any] = (
            {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        )
        conversation: list[dict[str, Any]] = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if self._content_is_parts
            else dict(message)
            for message in messages
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation,
                chat_template=self._chat_template,
                add_generation_prompt=header,
                tokenize=False,
                tools=self._tools or None,
                **switches,
            )
        except Exception as error:  # a template may raise anything
            name, reason = self._tokenizer.name_or_path, " ".join(str(error).split())
            raise EngineError(f"the chat template of {name!r} fails: {reason}") from error
        assert isinstance(text, str)
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        # Some families do not flag the end of a turn as special; it is no text all the same.
        unended = [token for token in ids if token != self.end_id]
        visible = self._control.strip_special(unended, keep=self._thinking.tags)
        text = self._tokenizer.decode(visible, skip_special_tokens=False)
        assert isinstance(text, str)
        return text


def _dated(chat_template: str) -> str:
    return _DATE_CALL.sub(lambda call: repr(TODAY.strftime(call[2])), chat_template)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _ends(pieces: Sequence[str], gap: str) -> list[int]:
    """Compute where each piece ends in the pieces joined by ``gap``; empty pieces add no gap."""
    ends, at = [], 0
    for piece in pieces:
        if piece:
            at += len(piece) + (len(gap) if at else 0)
        ends.append(at)
    return ends
