"""Memory of one device while it trains and samples, added up before anything is loaded.

Bytes, from the shape of the model and the numbers of the recipe; every line says how it came about.
What a layer keeps for its gradient is counted as PyTorch saves it for the decoders of transformers
(a test holds the count against autograd itself); the rest are the tensors that we allocate. Not
counted: the allocator's slack, the driver's own (about 0.5 GiB with CUDA), rounding, and on a processor
the copy of a model's weights that it samples with (400 million numbers at most).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfteach.models.architectures import Shape

FLOAT = 4
"""Bytes of a float32."""
CHUNK_BUFFERS = 8
"""float32 buffers of a chunk's logits that a divergence holds at a time: both sides' logits, the
products that they are cast from, log-probabilities, mixture and terms, and the gradient."""


@dataclass(frozen=True, slots=True)
class Vllm:
    """A vLLM on the trainer's own device: a copy of the weights, and a cache of keys and values."""

    weight_bytes: int
    """Of a number, in weights and cache."""
    rows: int
    """Answers decoded side by side."""
    share: float
    """Of the device, whose rest behind the weights is the cache."""
    sleeps: bool
    """Gives both back while others work."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a device is asked to hold."""

    shape: Shape
    parameters: int
    """Of the model, adapters apart."""
    trained: int
    """Numbers that train: the adapters', or all."""
    adapters: tuple[int, int] | None
    """Rank, and modules per layer that have one; None when all weights train."""
    weight_bytes: int
    compute_bytes: int
    """Of a number in the layers: the autocast type's, else the weights'."""
    recompute: bool
    copies: int
    """Further copies of the weights that train, for teacher and critic."""
    learn_tokens: int
    """Tokens whose activations are kept at a time."""
    chunk_entries: int
    sample_rows: int
    """Answers decoded side by side."""
    sample_length: int
    """Prompt and answer, in tokens."""
    sampler: Literal["trainer", "elsewhere"] | Vllm = "trainer"
    """Who samples: the model that trains, an engine on other devices, or one beside it on this."""
    shards: int = 1
    """Devices that share weights, gradients and moments evenly (FSDP); tokens are each one's own."""


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the sum."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True, slots=True)
class Memory:
    """The sum: what is always there, and what learning and sampling add in turn."""

    always: tuple[Item, ...]
    learning: tuple[Item, ...]
    sampling: tuple[Item, ...]

    @property
    def peak(self) -> int:
        """Bytes at the peak: learning and sampling never meet."""
        always, learning, sampling = (
            sum(item.bytes for item in items)
            for items in (self.always, self.learning, self.sampling)
        )
        return always + max(learning, sampling)


def memory(load: Load) -> Memory:
    """Every part of a device's memory."""
    trained_bytes = FLOAT if load.adapters else load.weight_bytes
    held = load.trained * trained_bytes
    gradients = Item("gradients", held, f"{load.trained:,} × {trained_bytes} bytes")
    always = (*_weights(load, held), _moments(load, held), *_copies(load, held))
    sampler = load.sampler
    stays = _vllm(load, sampler) if isinstance(sampler, Vllm) and not sampler.sleeps else ()
    return Memory(
        (*(_shard(item, load.shards) for item in always), *stays),
        (
            _shard(gradients, load.shards),
            *_gathered(load),
            *_activations(load),
            *_logits(load),
        ),
        _sampling(load),
    )


def layer_token_bytes(load: Load) -> int:
    """What one layer keeps of one token for its gradient, in bytes.

    Of each norm its input in float32 (and its normalised value in the weights' type, where its own
    weight trains), with a number per norm, head and query. In the compute type: the inputs of the
    linear maps (each map's own copy where they are cast), what attention and the gated unit keep,
    and the adapters' ranks.
    """
    shape = load.shape
    h, i, a, k = shape.hidden, shape.intermediate, shape.attention, shape.keys
    rank, modules = load.adapters or (0, 0)
    map_bytes = FLOAT if load.adapters else load.weight_bytes
    cast = load.compute_bytes != map_bytes
    norms = FLOAT * (2 * h + shape.heads + 2) + (0 if load.adapters else 2 * h * load.weight_bytes)
    inputs = (5 if cast else 2) * h + (a if cast and load.adapters else 0)
    inner = inputs + 4 * i + 2 * a + 2 * k + rank * modules
    if shape.family == "qwen3":
        norms += FLOAT * (a + k + shape.heads + shape.kv_heads)
        inner += 0 if load.adapters else a + k
    return norms + load.compute_bytes * inner


def gib(count: int) -> str:
    """Bytes in GiB, or in MiB below a tenth of one."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _shard(item: Item, shards: int) -> Item:
    if shards == 1:
        return item
    return Item(item.name, -(-item.bytes // shards), f"({item.how}) / {shards}")


def _gathered(load: Load) -> tuple[Item, ...]:
    """Whole weights at a time: those outside the layers, the layer that runs and the next one."""
    if load.shards == 1:
        return ()
    shape = load.shape
    ends = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    layer = (load.parameters - ends) // shape.layers
    how = f"({ends:,} + 2 layers × {layer:,}) × {load.compute_bytes} bytes"
    return (Item("gathered weights", (ends + 2 * layer) * load.compute_bytes, how),)


def _weights(load: Load, held: int) -> tuple[Item, ...]:
    how = f"{load.parameters:,} × {load.weight_bytes} bytes"
    model = Item("weights", load.parameters * load.weight_bytes, how)
    if not load.adapters:
        return (model,)
    return model, Item("adapters", held, f"{load.trained:,} × {FLOAT} bytes")


def _moments(load: Load, held: int) -> Item:
    return Item("AdamW's moments", 2 * held, f"2 × {gib(held)}")


def _copies(load: Load, held: int) -> tuple[Item, ...]:
    if not load.copies:
        return ()
    return (Item("teacher's own weights", load.copies * held, f"{load.copies} × {gib(held)}"),)


def _activations(load: Load) -> tuple[Item, ...]:
    shape, tokens = load.shape, load.learn_tokens
    layer = layer_token_bytes(load)
    # The embedded tokens, the last norm, and the states that meet the head, student's and teacher's.
    ends = tokens * shape.hidden * 6 * FLOAT
    if load.recompute:
        stream = shape.layers * shape.hidden * load.weight_bytes
        kept = tokens * (stream + layer)
        how = (
            f"{tokens:,} tokens × ({shape.layers} layers × {shape.hidden} × {load.weight_bytes} bytes "
            f"+ one layer at {layer:,} bytes)"
        )
    else:
        kept = tokens * shape.layers * layer
        how = f"{tokens:,} tokens × {shape.layers} layers × {layer:,} bytes"
    return Item("activations", kept, how), Item("states", ends, f"{tokens:,} × {shape.hidden} × 24")


def _logits(load: Load) -> tuple[Item, ...]:
    shape = load.shape
    entries = min(load.chunk_entries, load.learn_tokens * shape.vocabulary)
    chunk = CHUNK_BUFFERS * FLOAT * entries
    items = [Item("logits", chunk, f"{CHUNK_BUFFERS} buffers of {entries:,} × {FLOAT} bytes")]
    head = shape.vocabulary * shape.hidden
    if load.compute_bytes != load.weight_bytes:
        copy = 2 * head * load.compute_bytes  # the student's and the teacher's
        items.append(Item("head, cast", copy, f"2 × {head:,} × {load.compute_bytes} bytes"))
        inner = load.parameters - head * (1 if shape.tied else 2)
        how = f"{inner:,} × {load.compute_bytes} bytes"
        items.append(Item("layers' weights, cast", inner * load.compute_bytes, how))
    if not load.adapters:
        items.append(Item("head's gradient", 2 * head * FLOAT, f"2 × {head:,} × {FLOAT} bytes"))
    return tuple(items)


def _vllm(load: Load, vllm: Vllm) -> tuple[Item, ...]:
    size, width = load.parameters, vllm.weight_bytes
    token = 2 * load.shape.layers * load.shape.keys * width
    how = f"{vllm.rows:,} answers × {load.sample_length:,} tokens × {token:,}"
    return (
        Item("vLLM's weights", size * width, f"{size:,} × {width} bytes"),
        Item(
            "vLLM's keys and values",
            vllm.rows * load.sample_length * token,
            f"{how} at least; it takes the rest of its {vllm.share:g} of the device",
        ),
    )


def _sampling(load: Load) -> tuple[Item, ...]:
    if load.sampler == "elsewhere":
        return ()
    if isinstance(load.sampler, Vllm):
        return _vllm(load, load.sampler) if load.sampler.sleeps else ()
    shape, rows, length = load.shape, load.sample_rows, load.sample_length
    token = 2 * shape.layers * shape.keys * load.compute_bytes
    logits = rows * shape.vocabulary * (2 * FLOAT + 2 * 8)  # drawn from in float64
    return (
        Item(
            "keys and values",
            rows * length * token,
            f"{rows:,} answers × {length:,} tokens × {token:,}",
        ),
        Item("next token", logits, f"{rows:,} × {shape.vocabulary:,} × 24 bytes"),
    )
