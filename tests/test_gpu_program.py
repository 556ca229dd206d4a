"""The program that XLA compiles of the train step for an H100: properties that hold in every compilation.

Two layers of GPT-2 124M, B=32, T=1024, bfloat16. The limits are of today's program: a change that makes it better
tightens them, and one that makes it worse fails here, on any machine.
"""

import dataclasses
import json
import re

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu_program import command, compile, hlo, kernels, roofline, schedule
from benchmarks.gpu_program.cards import CARDS
from jaxgpt.commands import configuration
from jaxgpt.kernels import pallas_attention, pallas_norm, pallas_softmax
from jaxgpt.layers import layernorm
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Config, Model, Parallel, Training
from jaxgpt.training.estimate import estimate

needs_plugin = pytest.mark.skipif(bool(compile.missing()), reason=compile.missing())

LAYERS, TOKENS, WIDTH, ROWS = 2, 32 * 1024, 768, 50304
WORDS = ["--config", "gpt2_124m", "--size", "32x1024", "--model.layers", str(LAYERS)]

# Limits
TEMPORARIES = 2.02e9  # bytes
OUTSIDE_OF_PRODUCTS = 24.7e9  # bytes
KERNELS = 405
LARGEST_LATE = 154.6e6  # bytes of the largest reduction between four cards that is issued after the last product
EARLY = 28.3e6  # bytes of the reductions that are issued before it: of all layers but the first


def compiled(*words, devices=1, attention="cuDNN's fused kernel"):
    """The compiled program, and its launches."""
    options, config = command.configured([*WORDS, *words])
    card = CARDS[options.card]
    with compile.devices_of(card, devices) as there:
        config, chosen = configuration.with_attention(config)
        assert chosen == attention
        program = compile.ours(config, there)
    return program, kernels.launches(hlo.parse(program.text))


@pytest.fixture(scope="module")
def program():
    return compiled()


@pytest.fixture(scope="module")
def found(program):
    return [kernel for kernel in program[1] if not kernel.is_wait]


@needs_plugin
def test_memory(program):
    assert program[0].temporaries <= TEMPORARIES


@needs_plugin
def test_bytes_outside_of_products(found):
    assert sum(kernel.times * kernel.bytes for kernel in found if not kernel.is_product) <= OUTSIDE_OF_PRODUCTS


@needs_plugin
def test_number_of_kernels(found):
    assert sum(kernel.times for kernel in found) <= KERNELS


@needs_plugin
def test_every_product_is_there_once(found):
    """The count by hand: of each weight's product three, forward, dx and ∂w, and of the classifier's too."""
    weights = LAYERS * 12 * WIDTH**2 + ROWS * WIDTH
    products = [kernel for kernel in found if kernel.kind.startswith("products")]
    assert sum(kernel.times * kernel.operations for kernel in products) == 3 * 2 * TOKENS * weights


@needs_plugin
def test_attention_is_cudnns(found):
    kinds = [kernel.kind for kernel in found]
    for side in ("forward", "backward"):
        assert kinds.count(f"cuDNN attention, {side}") == LAYERS


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_in_pallas_is_all_that_there_is_of_it(dtype):
    """Two products forward and seven backward, each of the half of the square, and nothing of that size in memory."""
    words = ("--compute.dtype", dtype, "--compute.attention", "pallas")
    program, launches = compiled(*words, attention="fused kernels in Pallas")
    ours = [kernel for kernel in launches if kernel.kind.startswith("Pallas attention")]
    assert [kernel.kind.rpartition(" ")[2] for kernel in ours] == ["forward"] * LAYERS + ["backward"] * 2 * LAYERS
    square = 32 * 12 * 1024 * (1024 + 1) / 2
    assert sum(kernel.operations for kernel in ours) == LAYERS * (2 + 7) * 2 * square * 64
    assert all("attention." not in kernel.instruction.op_name for kernel in launches if kernel not in ours)
    assert not re.search(r"\[(\d+,)*1024,1024[,\]]", program.text)


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("card", ["a100", "4090"])
@pytest.mark.parametrize(("width", "dtype"), [(256, "float32"), (100, "float32"), (256, "bfloat16"), (64, "bfloat16")])
def test_attention_in_pallas_fits_on_the_chip(card, width, dtype):
    """XLA refuses a kernel that asks for more shared memory than there is; these cards have the least."""

    def both(q, k, v, dout, starts):
        _, residuals = pallas_attention.forward(q, k, v, block=1, starts=starts, window=100)
        return pallas_attention.backward(residuals, dout, block=1, starts=starts, window=100)

    with compile.devices_of(CARDS[card]) as (device, *_):
        where = SingleDeviceSharding(device)
        arrays = [jax.ShapeDtypeStruct((2, 300, heads, width), dtype, sharding=where) for heads in (6, 2, 2, 6)]
        starts = jax.ShapeDtypeStruct((2, 300), "int32", sharding=where)
        assert str(jax.jit(both).lower(*arrays, starts).compile().as_text()).count("gpu.triton") == 3


@pytest.mark.slow
@needs_plugin
def test_kernels_of_our_own_read_and_write_less(found):
    """One for each norm forward, one backward and one for each chunk's softmax; and all products are as they were."""
    _, launches = compiled("--compute.kernels", "pallas")
    ours = [kernel for kernel in launches if kernel.kind == "Pallas kernels"]
    norms, chunks = 2 * LAYERS + 1, TOKENS // 2048
    assert sum(kernel.times for kernel in ours) == 2 * norms + chunks
    activations = 2 * TOKENS * WIDTH  # bytes
    logits = 2048 * ROWS
    # Forward x and y; backward x, ∂y, ∂x and, but for the last norm, what goes past. Statistics and sums beside.
    least = norms * 2 * activations + (norms * 4 - 1) * activations + chunks * logits * (4 + 2)
    assert least <= sum(kernel.times * kernel.bytes for kernel in ours) <= 1.02 * least
    before, after = (
        sum(kernel.times * kernel.bytes for kernel in kernels if not kernel.is_product) for kernels in (found, launches)
    )
    # The logits are read once less, and each norm's input forward; what it saves backward pays for what is multiplied
    # with the classifier's factors.
    assert after <= before - chunks * logits * 4 - norms * activations
    products = [sum(kernel.times * kernel.operations for kernel in kernels) for kernels in (found, launches)]
    assert products[0] == products[1]


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("card", ["a100", "4090"])
@pytest.mark.parametrize(("width", "dtype"), [(100, "float32"), (5120, "bfloat16"), (pallas_norm.WIDEST, "float32")])
def test_norms_and_softmax_in_pallas_fit_on_the_chip(card, width, dtype):
    def all_three(params, x, dy, past, logits, targets):
        _, residuals = pallas_norm.forward(params, x, epsilon=1e-5)
        softmax = pallas_softmax.forward(logits, targets, vocabulary_size=width - 1, dtype=x.dtype)
        return pallas_norm.backward(params, residuals, dy, past), softmax

    with compile.devices_of(CARDS[card]) as (device, *_):
        where = SingleDeviceSharding(device)
        small, large = (jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape in ((width,), (300, width)))
        logits = jax.ShapeDtypeStruct((300, width), "float32", sharding=where)
        targets = jax.ShapeDtypeStruct((300,), "int32", sharding=where)
        arrays = (layernorm.Params(small, small), large, large, large, logits, targets)
        assert str(jax.jit(all_three).lower(*arrays).compile().as_text()).count("gpu.triton") == 3


@needs_plugin
def test_no_product_has_float32_factors(found):
    assert {kernel.inputs for kernel in found if kernel.is_product} == {("bf16", "bf16")}


def is_activation(shape):
    """Returns whether a product's result belongs to tokens: it is neither a weight's gradient nor the logits."""
    return ROWS not in shape.dims and not set(shape.dims) <= {WIDTH, 3 * WIDTH, 4 * WIDTH}


@needs_plugin
def test_products_write_float32_only_where_it_is_meant(found):
    assert [
        kernel.instruction.name
        for kernel in found
        if kernel.output == "f32" and is_activation(kernel.instruction.shapes[0])
    ] == []


@needs_plugin
def test_no_activation_is_transposed(found):
    assert [kernel.instruction.name for kernel in found if kernel.transposed >= 2 * TOKENS * WIDTH] == []


@pytest.fixture(scope="module")
def of_8_bits():
    return [kernel for kernel in compiled("--compute.products", "fp8")[1] if not kernel.is_wait]


@needs_plugin
def test_every_product_of_the_blocks_is_of_8_bits(of_8_bits):
    """Three of queries, keys and values, and one of each other weight; two backward of each of the four weights."""
    products = [kernel for kernel in of_8_bits if kernel.is_product and kernel.instruction.target.endswith("$f8")]
    assert len(products) == LAYERS * (6 + 8)
    forms = [kernel.inputs for kernel in products]
    assert forms.count(("f8e4m3fn", "f8e4m3fn")) == LAYERS * 6
    assert all(sorted(pair) == ["f8e4m3fn", "f8e5m2"] for pair in forms if pair != ("f8e4m3fn", "f8e4m3fn"))
    others = [kernel for kernel in of_8_bits if kernel.is_product and kernel not in products]
    assert {kernel.inputs for kernel in others} == {("bf16", "bf16")}
    assert sum(kernel.operations for kernel in products) == 3 * 2 * TOKENS * LAYERS * 12 * WIDTH**2


@needs_plugin
def test_products_of_8_bits_make_the_bound_lower(found, of_8_bits):
    card = CARDS["h100"]
    products, without = (
        sum(roofline.milliseconds(kernel, card) for kernel in program if "linear." in scope(kernel))
        for program in (of_8_bits, found)
    )
    assert products < 0.55 * without
    assert roofline.total(of_8_bits, card) < roofline.total(found, card)


def scope(kernel):
    return kernel.instruction.attributes if kernel.is_product else ""


@needs_plugin
def test_a_card_without_products_of_8_bits_has_no_rate_for_them():
    with pytest.raises(AssertionError, match="A100"):
        CARDS["a100"].peak("f8e4m3fn")


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_reductions_between_four_cards(zero):
    _, launches = compiled("--topology", "4", "--parallel.zero", str(zero), devices=4)
    total = schedule.summary(schedule.collectives(launches, CARDS["h100"]))
    assert total.bytes == pytest.approx(4 * gradients(), rel=1e-4)  # each gradient is reduced once
    assert total.early_bytes >= EARLY
    assert total.largest_late <= LARGEST_LATE


def gradients():
    """The number of numbers in the gradients of all parameters."""
    _, config = command.configured(WORDS)
    return gpt2.parameter_count(config.model, padded=True)


RELATIVE = Model(
    family="llama",
    layers=4,
    heads=8,
    kv_heads=4,
    width=1024,
    feed_forward=3072,
    context=2048,
    vocabulary_size=8192,
)


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize(
    ("devices", "zero", "recompute", "changes"),
    [
        (1, 0, "norms", {}),
        (1, 0, "norms", {"query_key_norm": True, "tied": True}),
        (4, 1, "none", {}),
        (4, 2, "block", {}),
        (4, 3, "gelu", {}),
    ],
)
def test_what_a_plan_estimates_is_near_the_program(devices, zero, recompute, changes):
    """A tenth too small at most, for which a plan leaves room, and a fifth too large; layers as a plan has them."""
    config = Config(
        model=dataclasses.replace(RELATIVE, **changes),
        compute=Compute(dtype="bfloat16", recompute=recompute, layers="scanned" if zero >= 2 else "unrolled"),
        parallel=Parallel(devices=devices, zero=zero),
        training=Training(batch_size=2 * devices, micro_batches=2, sequence_length=2048),
    )
    with compile.devices_of(CARDS["h100"], devices) as there:
        config, _ = configuration.with_attention(config)
        program = compile.ours(config, there)
    found = estimate(config, devices, gpu=True).total / (program.arguments + program.temporaries)
    assert 0.9 <= found <= 1.2


@pytest.mark.slow
@needs_plugin
def test_the_command(tmp_path, capsys):
    output, picture = tmp_path / "figures.json", tmp_path / "kinds.png"
    words = ["--config", "quickstart", "--size", "2x96", "--model.layers", "1", "--card", "a100"]
    words += ["--model.family", "gpt2", "--against", "jax.grad", "--output", str(output), "--picture", str(picture)]
    assert command.run(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A bound from counts of operations and bytes, not a measured time")
    figures = json.loads(output.read_text())
    assert list(figures["programs"]) == ["ours", "jax.grad, scanned", "jax.grad, unrolled"]
    for program in figures["programs"].values():
        kinds = [kind for kind in program["kinds"] if kind["name"] != "collectives"]
        assert sum(kind["milliseconds"] for kind in kinds) == pytest.approx(program["milliseconds"])
        assert sum(kind["kernels"] for kind in kinds) == program["kernels"]
        assert 0 < program["mfu"] < 1
    assert picture.read_bytes().startswith(b"\x89PNG")


# On any machine


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "0x8"], "--size 0x8: give at least 1 sequence"),
        (["--card", "h1000"], "invalid choice"),
        (["--topology", "0"], "--topology is 0, and must be greater than 0"),
        (["--topology", "4", "--model.family", "gpt2", "--against", "jax.grad"], "written for GPT-2 on one card"),
        (["--model.family", "llama", "--against", "jax.grad"], "written for GPT-2 on one card"),
        (["--compute.recompute", "auto"], "--compute.recompute auto: name the level to compile"),
        (["--sise", "1x8"], "did you mean --size?"),
    ],
)
def test_a_mistake_in_the_words(fails, words, message):
    assert message in fails("--config", "quickstart", "--size", "2x96", *words, command=command.run)


def test_without_the_plugin(fails, monkeypatch):
    monkeypatch.setattr(compile, "PLUGINS", ("jax_plugins.there_is_none",))
    told = fails("--config", "quickstart", "--size", "2x96", command=command.run)
    assert "needs JAX's CUDA plugin, which isn't installed here: make gpu-program" in told
