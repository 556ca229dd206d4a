"""Calls of kernels in Pallas in the program that a function hands to XLA for a GPU."""

import re

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

TARGET = "__gpu$xla.gpu.triton"
H100 = AbstractDevice("NVIDIA H100", 132, "gpu")  # which Pallas asks for from JAX 0.11 on
# JAX says so when it compiles a kernel, from 0.11 on.
deprecated = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


def lowered(function, *shapes):
    """The program for a CUDA GPU, as StableHLO text; none need be there."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """The kernel's name and the operands of each call."""
    found = re.findall(rf'custom_call @{re.escape(TARGET)}\((.*?)\).*?name = "(\w+)"', text)
    return [(name, operands.split(", ")) for operands, name in found]
