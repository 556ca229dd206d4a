"""Weights are read tensor by tensor and written file by file: what that takes beside the weights, or in their place."""

import dataclasses
import filecmp
import math
import tracemalloc

import jax
import pytest

from jaxgpt import writing
from jaxgpt.commands.convert import Convert
from jaxgpt.data import tokenizers
from jaxgpt.interop import detect_format, huggingface, runs, tensors
from jaxgpt.models import family
from jaxgpt.options.config import Model
from tests.interop.weights import LLAMA, assert_same_bits, random_params

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


@pytest.mark.parametrize("name", MODELS)
def test_arrays_that_can_be_read_one_at_a_time_are(tmp_path, traced, name):
    """One array beside the file is in memory at a time, and the result is the same."""
    model = MODELS[name]
    params = random_params(model, "bfloat16")
    with writing.new_folder(tmp_path / "at once") as folder:
        huggingface.write_folder(folder, params, model, "bfloat16", None, 1 << 20)
    reads = []

    def reader(path, array):
        def read():
            reads.append(path)
            return array.copy()

        return read

    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    with writing.new_folder(tmp_path / "by turns") as folder:
        readers = jax.tree.map_with_path(reader, params)
        huggingface.write_folder(folder, readers, model, "bfloat16", None, 1 << 20)
    peak, largest = tracemalloc.get_traced_memory()[1], max(array.nbytes for array in jax.tree.leaves(params))
    assert peak - before <= largest + max(1 << 20, bytes_of(model)[1]) + SLACK
    assert len(reads) == len(set(reads)) == len(jax.tree.leaves(params))
    files = sorted(path.name for path in (tmp_path / "at once").iterdir())
    assert len(files) > 4
    assert filecmp.cmpfiles(tmp_path / "at once", tmp_path / "by turns", files, shallow=False)[0] == files


def test_the_arrays_of_a_run_can_be_read_one_at_a_time(tmp_path):
    params = random_params(LLAMA, "bfloat16")
    with writing.new_folder(tmp_path / "run") as folder:
        runs.write(folder, params, LLAMA, "bfloat16", tokenizers.Bytes(), run=tmp_path / "run", origin="a test")
    source = detect_format.open_weights(str(tmp_path / "run"))
    assert source.readers
    assert_same_bits(jax.tree.map(lambda read: read(), source.readers()), source.load())


def test_eight_billion_parameters_are_converted_in_24_gb():
    """The bounds are those that the test above holds the code to; the sizes of files are the command's own."""
    whole, largest = bytes_of(LARGE)
    assert whole / 2 == 8_030_261_248
    shard = int(Convert("a", "b").shard_gib * 2**30)
    assert whole + max(largest, shard) < 24e9
    # A checkpoint may have the largest array as one packed piece, which is no larger than the array itself.
    shapes = jax.eval_shape(lambda: family(LARGE).init(LARGE, jax.random.key(0)))
    assert max(2 * 2 * shape.size for shape in jax.tree.leaves(shapes)) + shard < 24e9
