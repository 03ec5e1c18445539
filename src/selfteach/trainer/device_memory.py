"""Estimate the memory of one device while it trains and samples, before anything is loaded.

Bytes, from the shape of the model and the numbers of the recipe; every item states its arithmetic.
What a layer saves for its backward pass is counted as PyTorch saves it for the decoders of
transformers (a test compares the count with autograd); the rest are the tensors allocated here. Not
counted: the allocator's fragmentation, the driver's memory (about 0.5 GiB with CUDA), rounding, and on
CPU the copy of a model's weights for sampling (400 million elements at most).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from selfteach.models.architectures import Shape
from selfteach.models.quantization import quantized_bytes
from selfteach.rollout import episode_states

FLOAT = 4
"""Bytes of a float32."""
CHUNK_BUFFERS = 8
"""float32 buffers of a chunk's logits that a divergence holds at a time: logits of student and teacher,
the matmul results they are cast from, log-probabilities, mixture and terms, and the gradient."""
CHUNK_ENTRIES = {"cpu": 2**20, "cuda": 2**25}
"""Logits (tokens × vocabulary) in memory at a time while a loss is computed: 4 and 128 MB each. With
much smaller chunks a GPU waits for kernel launches."""
MICRO_BATCHES = (16_384, 8_192, 4_096, 2_048)
"""Tokens of a micro-batch that `fit` tries. Larger ones make no device faster."""
FILLED = 0.85
"""Share of the free memory that `fit` fills: fragmentation and drivers take some."""
CHUNK_TOKENS = 76
"""Minimum tokens of a chunk: the head is read once per chunk, which dominates the time of smaller ones.
Two buffers of their logits and what else a loss holds are a tenth of the logits of 2,048 tokens."""


@dataclass(frozen=True, slots=True)
class VllmMemory:
    """Describes a vLLM on the trainer's device: a copy of the weights, and a KV cache."""

    weight_bytes: int
    """Bytes per element, in weights and cache."""
    rows: int
    """Rollouts decoded in one batch."""
    share: float
    """Fraction of the device's memory that vLLM takes: weights first, the rest is its cache."""
    sleeps: bool
    """Releases weights and cache while the trainer works (sleep mode)."""


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """Describes what one device has to hold: the input of `memory`."""

    shape: Shape
    parameters: int
    """Of the model, adapters excluded."""
    trained: int
    """Trainable parameters: the adapters', or all."""
    adapters: tuple[int, int] | None
    """Rank, and modules per layer that have one; None when all weights train."""
    weight_bytes: int
    compute_bytes: int
    """Bytes per element in the layers: the autocast dtype's, else the weights'."""
    recompute: bool
    """Gradient checkpointing."""
    copies: int
    """Further copies of the trainable weights, for teacher and critic."""
    micro_batch_tokens: int
    """Tokens whose activations are stored at a time: those of a micro-batch."""
    chunk_entries: int
    """Logits (tokens × vocabulary) of one chunk of the loss."""
    sample_rows: int
    """Rollouts decoded in one batch."""
    sample_length: int
    """Prompt and completion, in tokens."""
    has_turns: bool = False
    """Rollouts are episodes, whose keys and values are stored between their turns."""
    sampler: Literal["trainer", "elsewhere"] | VllmMemory = "trainer"
    """Where rollouts are sampled: with the model that trains, on other devices, or in a vLLM here."""
    chooses_micro_batch: bool = False
    """The recipe leaves the micro-batch open: `fit` chooses it."""
    chooses_recompute: bool = False
    """The recipe leaves gradient checkpointing open."""
    quantized: int = 0
    """Weights that are held in 4 bits."""
    critic_bytes: int = 0
    """Weights of a critic that runs in the trainer's process, on this device."""
    shards: int = 1
    """Ranks that shard weights, gradients and optimizer moments evenly (FSDP2); tokens are per rank."""


@dataclass(frozen=True, slots=True)
class Item:
    """Holds one line of an estimate: bytes and the arithmetic behind them."""

    name: str
    bytes: int
    arithmetic: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Holds an estimate: what is always allocated, and what training and sampling add in turn."""

    always: tuple[Item, ...]
    training: tuple[Item, ...]
    sampling: tuple[Item, ...]

    @property
    def peak(self) -> int:
        """Bytes at the peak; training and sampling never happen at the same time."""
        always, training, sampling = (
            sum(item.bytes for item in items)
            for items in (self.always, self.training, self.sampling)
        )
        return always + max(training, sampling)


def memory(load: DeviceLoad) -> Memory:
    """Estimate the memory of one device, item by item."""
    trained_bytes = FLOAT if load.adapters else load.weight_bytes
    trained_total = load.trained * trained_bytes
    gradients = Item("gradients", trained_total, f"{load.trained:,} × {trained_bytes} bytes")
    always = (
        *_weights(load, trained_total),
        _moments(load, trained_total),
        *_copies(load, trained_total),
    )
    critic = (Item("critic's weights", load.critic_bytes, "of a frozen model in this process"),)
    sampler = load.sampler
    awake = _vllm(load, sampler) if isinstance(sampler, VllmMemory) and not sampler.sleeps else ()
    return Memory(
        (
            *(_shard(item, load.shards) for item in always),
            *(critic if load.critic_bytes else ()),
            *awake,
        ),
        (
            _shard(gradients, load.shards),
            *_gathered(load),
            *_dequantized(load),
            *_activations(load),
            *_logits(load),
        ),
        _sampling(load),
    )


def fit(load: DeviceLoad, available: float) -> DeviceLoad:
    """Choose what a recipe leaves open: the largest micro-batch that fits ``available`` bytes.

    Activations are recomputed only if the smallest micro-batch does not fit otherwise; if nothing
    fits, the choice is the smallest with recomputation. A micro-batch is never shorter than a sample.
    """
    least = load.sample_length
    sizes = (
        sorted({max(tokens, least) for tokens in MICRO_BATCHES}, reverse=True)
        if load.chooses_micro_batch
        else [load.micro_batch_tokens]
    )
    choices = [
        replace(load, micro_batch_tokens=tokens, recompute=recompute)
        for recompute in ((False, True) if load.chooses_recompute else (load.recompute,))
        for tokens in sizes
    ]
    budget = FILLED * available
    if isinstance(load.sampler, VllmMemory) and not load.sampler.sleeps:
        # It takes its whole share, of which the estimate counts what it needs at least.
        needed = sum(item.bytes for item in _vllm(load, load.sampler))
        budget = budget * (1 - load.sampler.share) + needed
    return next((choice for choice in choices if _training_bytes(choice) <= budget), choices[-1])


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Return the number of tokens whose logits are in memory at a time on a kind of device."""
    entries = CHUNK_ENTRIES.get(device, CHUNK_ENTRIES["cuda"])
    return max(CHUNK_TOKENS, entries // vocabulary)


def layer_token_bytes(load: DeviceLoad) -> int:
    """Return the bytes that one layer saves per token for its backward pass.

    Per norm: its input in float32 (and its normalised value in the weights' dtype where the norm's
    weight trains), with one number per norm, head and query. In the compute dtype: the inputs of the
    linear layers (one copy per layer where they are cast), what attention and the gated MLP save, and
    the adapters' low-rank activations.
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
    """Format bytes in GiB, or in MiB below a tenth of a GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _training_bytes(load: DeviceLoad) -> int:
    """Return the bytes in use while the policy trains."""
    estimate = memory(load)
    return sum(item.bytes for item in (*estimate.always, *estimate.training))


def _shard(item: Item, shards: int) -> Item:
    if shards == 1:
        return item
    return Item(item.name, -(-item.bytes // shards), f"({item.arithmetic}) / {shards}")


def _gathered(load: DeviceLoad) -> tuple[Item, ...]:
    """Count unsharded weights: those outside the layers, the running layer and the prefetched one."""
    if load.shards == 1:
        return ()
    shape = load.shape
    ends = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    layer = (load.parameters - ends) // shape.layers
    how = f"({ends:,} + 2 layers × {layer:,}) × {load.compute_bytes} bytes"
    return (Item("gathered weights", (ends + 2 * layer) * load.compute_bytes, how),)


def _dequantized(load: DeviceLoad) -> tuple[Item, ...]:
    """Count the largest layer's weights, dequantised for a matmul."""
    if not load.quantized:
        return ()
    size = load.shape.hidden * load.shape.intermediate
    how = f"{load.shape.hidden:,} × {load.shape.intermediate:,} × {load.compute_bytes} bytes"
    return (Item("a layer's weights, dequantised", size * load.compute_bytes, how),)


def _weights(load: DeviceLoad, trained_total: int) -> tuple[Item, ...]:
    rest = load.parameters - load.quantized
    size, how = rest * load.weight_bytes, f"{rest:,} × {load.weight_bytes} bytes"
    if load.quantized:
        size += quantized_bytes(load.quantized)
        how += f" + {load.quantized:,} × 4.13 bits"
    model = Item("weights", size, how)
    if not load.adapters:
        return (model,)
    return model, Item("adapters", trained_total, f"{load.trained:,} × {FLOAT} bytes")


def _moments(load: DeviceLoad, trained_total: int) -> Item:
    return Item("AdamW moments", 2 * trained_total, f"2 × {gib(trained_total)}")


def _copies(load: DeviceLoad, trained_total: int) -> tuple[Item, ...]:
    if not load.copies:
        return ()
    how = f"{load.copies} × {gib(trained_total)}"
    return (Item("copies of the trained weights", load.copies * trained_total, how),)


def _activations(load: DeviceLoad) -> tuple[Item, ...]:
    shape, tokens = load.shape, load.micro_batch_tokens
    layer = layer_token_bytes(load)
    # Embeddings, the last norm, and the hidden states before the LM head, student's and teacher's.
    ends = tokens * shape.hidden * 6 * FLOAT
    if load.recompute:
        stream = shape.layers * shape.hidden * load.weight_bytes
        saved = tokens * (stream + layer)
        how = (
            f"{tokens:,} tokens × ({shape.layers} layers × {shape.hidden} × {load.weight_bytes} bytes "
            f"+ one layer at {layer:,} bytes)"
        )
    else:
        saved = tokens * shape.layers * layer
        how = f"{tokens:,} tokens × {shape.layers} layers × {layer:,} bytes"
    hidden = Item("hidden states", ends, f"{tokens:,} × {shape.hidden} × 24")
    return Item("activations", saved, how), hidden


def _logits(load: DeviceLoad) -> tuple[Item, ...]:
    shape = load.shape
    entries = min(load.chunk_entries, load.micro_batch_tokens * shape.vocabulary)
    chunk = CHUNK_BUFFERS * FLOAT * entries
    items = [Item("logits", chunk, f"{CHUNK_BUFFERS} buffers of {entries:,} × {FLOAT} bytes")]
    head = shape.vocabulary * shape.hidden
    if load.compute_bytes != load.weight_bytes:
        copy = 2 * head * load.compute_bytes  # the student's and the teacher's
        items.append(Item("LM head, cast", copy, f"2 × {head:,} × {load.compute_bytes} bytes"))
        inner = load.parameters - load.quantized - head * (1 if shape.tied else 2)
        how = f"{inner:,} × {load.compute_bytes} bytes"
        items.append(Item("layer weights, cast", inner * load.compute_bytes, how))
    if not load.adapters:
        items.append(Item("LM head gradient", 2 * head * FLOAT, f"2 × {head:,} × {FLOAT} bytes"))
    return tuple(items)


def _vllm(load: DeviceLoad, vllm: VllmMemory) -> tuple[Item, ...]:
    size, width = load.parameters, vllm.weight_bytes
    token = 2 * load.shape.layers * load.shape.keys * width
    how = f"{vllm.rows:,} rollouts × {load.sample_length:,} tokens × {token:,}"
    return (
        Item("vLLM weights", size * width, f"{size:,} × {width} bytes"),
        Item(
            "vLLM KV cache",
            vllm.rows * load.sample_length * token,
            f"{how} at least; it takes the rest of its {vllm.share:g} of the device",
        ),
    )


def _sampling(load: DeviceLoad) -> tuple[Item, ...]:
    if load.sampler == "elsewhere":
        return ()
    if isinstance(load.sampler, VllmMemory):
        return _vllm(load, load.sampler) if load.sampler.sleeps else ()
    shape, rows, length = load.shape, load.sample_rows, load.sample_length
    token = 2 * shape.layers * shape.keys * load.compute_bytes
    logits = rows * shape.vocabulary * (2 * FLOAT + 2 * 8)  # sampled from in float64
    cache = rows * length * token
    stored = min(cache, episode_states.MAX_BYTES)
    between = Item(
        "KV between turns", stored, f"as the cache, at most {gib(episode_states.MAX_BYTES)}"
    )
    return (
        Item("KV cache", cache, f"{rows:,} rollouts × {length:,} tokens × {token:,}"),
        *((between,) if load.has_turns else ()),
        Item("next-token logits", logits, f"{rows:,} × {shape.vocabulary:,} × 24 bytes"),
    )
