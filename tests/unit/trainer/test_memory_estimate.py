"""The memory estimate equals sums by hand and what PyTorch really saves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selfteach.commands.check.sizes import device_load, measure_offline
from selfteach.config.recipe import Recipe
from selfteach.models.architectures import Shape, known_shapes
from selfteach.models.trainable_model import add_adapters, recompute_activations
from selfteach.trainer.device_memory import DeviceLoad, VllmMemory, layer_token_bytes, memory

TOKENS = 56
SHAPES = list(dict.fromkeys(known_shapes().values()))
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(shape: Shape) -> object:
    return AutoConfig.for_model(
        shape.family,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
    )


@pytest.mark.parametrize(
    "shape", list(dict.fromkeys(known_shapes().values())), ids=lambda shape: shape.family
)
def test_shape_parameters_equal_those_of_transformers(shape: Shape) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(shape))
    assert shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [("Qwen/Qwen3-1.7B", "1.72"), ("Qwen/QwQ-32B", "32.76"), ("meta-llama/Llama-3.1-8B", "8.03"),
     ("HuggingFaceTB/SmolLM2-135M-Instruct", "0.13"), ("Qwen/Qwen2.5-0.5B", "0.49")],
)  # fmt: skip
def test_known_models_have_their_published_size(name: str, published: str) -> None:
    assert f"{known_shapes()[name].parameters / 1e9:.2f}" == published


def tiny(family: str, layers: int = 1) -> Shape:
    """Wider heads than states, so that no two widths are alike."""
    return Shape(family, 40, 72, layers, 4, 2, 12, 64, 128, True)


def load(shape: Shape, *, lora: bool, weights: torch.dtype, autocast: bool) -> DeviceLoad:
    size = {torch.float32: 4, torch.bfloat16: 2}[weights]
    return DeviceLoad(
        shape=shape, parameters=shape.parameters, trained=1, adapters=(3, 7) if lora else None,
        weight_bytes=size, compute_bytes=2 if autocast else size, recompute=False, copies=0,
        micro_batch_tokens=TOKENS, chunk_entries=1, sample_rows=1, sample_length=1,
    )  # fmt: skip


def built(shape: Shape, *, lora: bool, weights: torch.dtype, recompute: bool = False):
    model = AutoModelForCausalLM.from_config(config(shape), dtype=weights)
    assert isinstance(model, PreTrainedModel)
    if recompute:
        recompute_activations(model)
    if lora:
        adapted = add_adapters(model, rank=3, alpha=6.0, dropout=0.0, targets=TARGETS, seed=0)
        return adapted.train().get_base_model()
    return model.train()


def saved_bytes(model: PreTrainedModel, autocast: bool) -> int:
    """Bytes of all that autograd saves in a forward pass, except weights and their cast copies."""
    widths = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    widths |= {shape[::-1] for shape in widths}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in widths:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(1, 64, (1, TOKENS))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = model.model(input_ids=ids, use_cache=False)[0]  # noqa: F841 - keeps the graph
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("weights", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
)
def test_layer_token_bytes_is_what_autograd_saves(
    family: str, lora: bool, weights: torch.dtype, autocast: bool
) -> None:
    one, two = (
        saved_bytes(built(tiny(family, layers), lora=lora, weights=weights), autocast)
        for layers in (1, 2)
    )
    expected = layer_token_bytes(load(tiny(family), lora=lora, weights=weights, autocast=autocast))
    assert (two - one) / TOKENS == expected


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_saves_one_state_a_layer(weights: torch.dtype) -> None:
    one, two = (
        saved_bytes(built(tiny("llama", n), lora=True, weights=weights, recompute=True), True)
        for n in (1, 2)
    )
    assert (two - one) / TOKENS == 40 * weights.itemsize


def by_hand(**changes: object) -> dict[str, int]:
    """A model of 2 layers, H 8, I 16, A = K = 8, V 32, learning from 10 tokens."""
    shape = Shape("llama", 8, 16, 2, 2, 2, 4, 32, 64, True)
    values = dict(  # noqa: C408
        shape=shape, parameters=shape.parameters, trained=shape.parameters, adapters=None,
        weight_bytes=4, compute_bytes=4, recompute=False, copies=1,
        micro_batch_tokens=10, chunk_entries=64, sample_rows=3, sample_length=20,
    )  # fmt: skip
    total = memory(DeviceLoad(**{**values, **changes}))
    items = (*total.always, *total.training, *total.sampling)
    return {**{item.name: item.bytes for item in items}, "peak": total.peak}


def test_the_estimate_equals_the_sum_by_hand() -> None:
    # Embeddings 256; a layer 4 · 64 + 3 · 128 + 16 = 656; the last norm 8: 1,576 numbers.
    weights = 1576 * 4
    # A layer keeps 4 (16 + 2 + 2) + 16 · 4 + 4 (16 + 64 + 16 + 16) = 592 bytes of a token.
    expected = {
        "weights": weights,
        "AdamW moments": 2 * weights,
        "copies of the trained weights": weights,
        "gradients": weights,
        "activations": 10 * 2 * 592,
        "hidden states": 10 * 8 * 24,
        "logits": 8 * 4 * 64,
        "LM head gradient": 2 * 256 * 4,
        "KV cache": 3 * 20 * (2 * 2 * 8 * 4),
        "next-token logits": 3 * 32 * 24,
    }
    training = 5 * weights + 11840 + 1920 + 2048 + 2048
    assert by_hand() == {**expected, "peak": training}
    sampling = 4 * weights + 3000 * 20 * 128 + 3000 * 32 * 24
    assert by_hand(sample_rows=3000)["peak"] == sampling, "never both"
    turns = by_hand(sample_rows=3000, has_turns=True)
    assert turns["KV between turns"] == turns["KV cache"] == 3000 * 20 * 128
    assert turns["peak"] == sampling + 3000 * 20 * 128
    assert by_hand(sample_rows=3_000_000, has_turns=True)["KV between turns"] == 4 * 2**30


def test_vllm_on_the_trainers_device_adds_weights_and_cache() -> None:
    weights, plain = 1576 * 2, by_hand()  # in bfloat16
    cache = 2000 * 20 * (2 * 2 * 8 * 2)
    here = VllmMemory(weight_bytes=2, rows=2000, share=0.4, sleeps=True)
    asleep, awake = (
        by_hand(sampler=dataclasses.replace(here, sleeps=sleeps)) for sleeps in (True, False)
    )
    for sums in (asleep, awake):
        assert sums["vLLM weights"] == weights and sums["vLLM KV cache"] == cache
        assert "next-token logits" not in sums
    assert asleep["peak"] == 4 * 1576 * 4 + weights + cache, "more than training, and never both"
    assert awake["peak"] == plain["peak"] + weights + cache
    elsewhere = by_hand(sampler="elsewhere", sample_rows=3000)
    assert elsewhere["peak"] == plain["peak"] and "KV cache" not in elsewhere


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"type": "transformers"}, "trainer"),
        ({"type": "vllm_server", "model": "m"}, "elsewhere"),
        ({"type": "vllm", "dtype": "bfloat16"}, VllmMemory(2, 8, 0.4, True)),
        ({"type": "vllm", "sleep": False, "max_num_seqs": 3}, VllmMemory(4, 3, 0.4, False)),
    ],
)
def test_the_engine_section_sets_the_sampler(engine: dict[str, object], expected: object) -> None:
    recipe = Recipe.model_validate(
        {
            "engine": engine,
            "sampling": {"batch_size": 8},
            "model": {"device": "cuda"},
            "context": {"type": "step_aligned"},
            "critic": {"type": "oracle"},
        }
    )
    run_sizes = measure_offline(recipe)
    needed = device_load(recipe, run_sizes)
    assert needed is not None and needed.sampler == expected
    if isinstance(expected, VllmMemory):
        cpu = device_load(recipe, dataclasses.replace(run_sizes, device="cpu"))
        assert cpu is not None and cpu.sampler == dataclasses.replace(expected, sleeps=False)


def test_float32_adapters_over_bfloat16_weights_by_hand() -> None:
    items = by_hand(trained=100, adapters=(2, 7), weight_bytes=2, compute_bytes=2, copies=0)
    assert items["weights"] == 1576 * 2 and items["adapters"] == 400
    assert items["AdamW moments"] == 800 and items["gradients"] == 400
    # 4 (16 + 2 + 2) + 2 (5 · 8 + 8 + 64 + 16 + 16 + 14) = 396.
    assert items["activations"] == 10 * 2 * 396
    assert "copies of the trained weights" not in items and "LM head gradient" not in items
    recomputed = by_hand(
        trained=100, adapters=(2, 7), weight_bytes=2, compute_bytes=2, copies=0, recompute=True
    )
    assert recomputed["activations"] == 10 * (2 * 8 * 2 + 396)


def test_autocast_adds_copies_of_what_it_casts() -> None:
    items = by_hand(compute_bytes=2)
    assert items["LM head, cast"] == 2 * 256 * 2
    assert items["layer weights, cast"] == (1576 - 256) * 2
    assert not {"LM head, cast", "layer weights, cast"} & by_hand().keys()


def test_adamw_allocates_the_estimated_moments() -> None:
    for lora in (False, True):
        model = built(tiny("llama"), lora=lora, weights=torch.float32)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moments = sum(
            state[name].nbytes for state in optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        )  # fmt: skip
        count = sum(p.numel() for p in trained)
        if lora:
            assert count == tiny("llama").adapters(3, TARGETS)
        device_load = load(tiny("llama"), lora=lora, weights=torch.float32, autocast=False)
        total = memory(dataclasses.replace(device_load, trained=count))
        assert {i.name: i.bytes for i in total.always}["AdamW moments"] == moments


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_a_critic_in_this_process_is_counted(dtype: str, width: int) -> None:
    critic = {"type": "local", "path": "lab:two_styles", "weights_dtype": dtype}
    values = {"critic": critic, "context": {"type": "step_aligned"}, "model": {"device": "cpu"}}
    recipe = Recipe.model_validate(values)
    sizes = measure_offline(recipe)
    load = device_load(recipe, sizes)
    assert load is not None
    without = memory(dataclasses.replace(load, critic_bytes=0))
    assert memory(load).peak - without.peak == width * sizes.parameters
    assert {i.name: i.bytes for i in memory(load).always}["critic's weights"] == load.critic_bytes
