"""Weights are read tensor by tensor and written file by file: what that takes beside the weights themselves."""

import dataclasses
import math
import tracemalloc

import jax
import pytest

from jaxgpt import writing
from jaxgpt.commands.convert import Convert
from jaxgpt.interop import huggingface, tensors
from jaxgpt.options.config import Model
from tests.interop.weights import random_params

BFLOAT16 = tensors.DTYPES["bfloat16"]
SLACK = 300_000  # bytes of Python's own objects: names, headers, buffers of files
SMALL = Model(6, 8, 128, 64, 5000, family="llama", kv_heads=2, feed_forward=448)  # Llama 3.1 8B's proportions
LARGE = Model(32, 32, 4096, 131072, 128256, family="llama", kv_heads=8, feed_forward=14336)
MODELS = {"llama": SMALL, "mixtral": dataclasses.replace(SMALL, family="mixtral", experts=4, feed_forward=120)}


def bytes_of(model: Model) -> tuple[int, int]:
    """Bytes of all of a model's tensors in bfloat16, and of the largest."""
    parts = huggingface.table_of(model).parts
    sizes = [2 * math.prod(part.shape) for part in parts]
    return sum(size * math.prod(part.counts) for size, part in zip(sizes, parts, strict=True)), max(sizes)


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", MODELS)
def test_reading_takes_one_tensor_more_than_the_weights_and_writing_one_file(tmp_path, traced, name):
    model, (whole, largest) = MODELS[name], bytes_of(MODELS[name])
    with writing.new_folder(tmp_path / "hf") as folder:
        huggingface.write_folder(folder, random_params(model, "bfloat16"), model, "bfloat16", None, 1 << 20)
    source = huggingface.open_folder(tmp_path / "hf")
    source.load()  # JAX keeps what it traced

    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    params = source.load()
    held, peak = tracemalloc.get_traced_memory()
    stacked = sum(array.nbytes for array in jax.tree.leaves(params))  # with the padding of the tables
    assert whole <= stacked <= held - before <= stacked + SLACK
    assert peak - before <= stacked + largest + SLACK

    shard = max(1 << 20, largest)
    tracemalloc.reset_peak()
    with writing.new_folder(tmp_path / "again") as folder:
        huggingface.write_folder(folder, params, model, "bfloat16", None, 1 << 20)
    assert tracemalloc.get_traced_memory()[1] - held <= shard + SLACK


def test_eight_billion_parameters_are_converted_in_24_gb():
    """By the bounds that the test above holds the code to, with the command's own size of files."""
    whole, largest = bytes_of(LARGE)
    assert whole / 2 == 8_030_261_248
    shard = int(Convert("a", "b").shard_gib * 2**30)
    assert whole + max(largest, shard) < 24e9
