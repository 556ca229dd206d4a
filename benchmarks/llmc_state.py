"""A model and a debug state in llm.c's formats, made by transformers; `run.py verify` compares them with ours.

python -m benchmarks.llmc_state FOLDER [--config gpt2_124m] [--batch 4] [--length 64]
python run.py verify --model FOLDER/model.bin --state FOLDER/model_debug_state.bin

llm.c makes these files of GPT-2's own weights. Here the weights are random, as at initialisation, and logits, loss and
gradients are PyTorch's in float32.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from jaxgpt.commands import configuration
from jaxgpt.interop import gpt2_tables, llmc
from jaxgpt.options import settings
from jaxgpt.options.config import Model
from tests.parity import transformers_model


def make(folder: Path, model: Model, batch: int, length: int, seed: int = 0) -> None:
    """Writes both files."""
    generator = np.random.default_rng(seed)

    def initial(tensor: gpt2_tables.Tensor) -> np.ndarray:
        shape = gpt2_tables.shape(tensor, model)
        if len(tensor.axes) == 1:
            return np.full(shape, float(tensor.ours.endswith("scale")), np.float32)
        deviation = 0.02 / np.sqrt(2 * model.layers) if tensor.llmc in ("attprojw", "fcprojw") else 0.02
        return deviation * generator.standard_normal(shape, np.float32)

    arrays = {tensor.ours: initial(tensor) for tensor in gpt2_tables.TENSORS}
    arrays["embedding.token"][model.vocabulary_size :] = 0
    llmc.write_model(folder / "model.bin", gpt2_tables.from_named(arrays), model, "float32")
    theirs = transformers_model.make_model(model, arrays)
    tokens, targets = generator.integers(model.vocabulary_size, size=(2, batch, length), dtype=np.int32)
    x, y = torch.from_numpy(tokens).long(), torch.from_numpy(targets).long()
    loss = transformers_model.loss(theirs, x, y)
    loss.backward()
    with torch.no_grad():
        logits = theirs(input_ids=x).logits.numpy()
    grads = gpt2_tables.from_named(transformers_model.gradients(theirs, model))
    state = llmc.State(tokens, targets, logits, loss.item(), grads)
    llmc.write_state(folder / "model_debug_state.bin", state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    config = configuration.without_text(settings.read(settings.find_config(options.config)))
    options.folder.mkdir(parents=True, exist_ok=True)
    make(options.folder, config.model, options.batch, options.length)


if __name__ == "__main__":
    main()
