"""Choice of the kernels that run: made once, before a step is compiled, and told to the user.

`compute.attention` is what the user asks for. `choose_attention` makes it "blocks" (`layers/attention.py`, which runs
anywhere), "cudnn" (`cudnn_attention.py`) or "pallas" (`pallas_attention.py`), and the model looks at nothing else. The
choice is never a silent one: the caller prints the description that comes with it. "auto" doesn't take "pallas", which
no GPU has run yet. `compute.kernels`, for the norms and the classifier's softmax, is taken as it is asked for.
"""

import dataclasses
from types import ModuleType

import jax

from jaxgpt.errors import UserError
from jaxgpt.kernels import cudnn_attention, pallas_attention, pallas_norm, pallas_softmax
from jaxgpt.layers import attention, unembedding
from jaxgpt.options.config import IN_DATA, Compute, Model


def attention_layer(compute: Compute) -> ModuleType:
    """Returns the module of attention that the model takes; "auto", where it was not decided, is "blocks"."""
    return {"cudnn": cudnn_attention, "pallas": pallas_attention}.get(compute.attention, attention)


def softmax_kernel(compute: Compute) -> unembedding.Softmax | None:
    """Returns the fused kernel of the classifier's softmax, None where XLA makes it."""
    return pallas_softmax.forward if compute.kernels == "pallas" else None


def anywhere(compute: Compute) -> Compute:
    """Returns the options with kernels that run on every device and take every length and dtype."""
    return dataclasses.replace(compute, attention="blocks", kernels="xla")


def anew(compute: Compute) -> Compute:
    """Returns the options of a run that may have been on another device, with the kernels still to be chosen here."""
    attention = "blocks" if compute.attention == "blocks" else "auto"
    return dataclasses.replace(compute, attention=attention, kernels="xla")


def choose_attention(model: Model, compute: Compute, length: int) -> tuple[Compute, str]:
    """Decides "auto" for sequences of `length` tokens on this machine's device.

    Returns:
        `compute` with its attention decided, and a description of it to print.

    Raises:
        UserError: A kernel is asked for and can't run, `compute.kernels` among them.
    """
    if compute.kernels == "pallas":
        _check_kernels(model)
    blocks = f"in blocks of {compute.attention_block} queries"
    if compute.attention == "blocks":
        return compute, blocks
    if compute.attention == "pallas":
        if needs := "; ".join(missing_to_pallas(model)):
            raise UserError(
                f"--compute.attention pallas can't run here. It needs {needs}. --compute.attention auto takes cuDNN's "
                "kernel where it can run, and blocks of queries elsewhere"
            )
        return compute, "fused kernels in Pallas"
    needs = "; ".join(missing(model, compute, length))
    if not needs:
        return dataclasses.replace(compute, attention="cudnn"), "cuDNN's fused kernel"
    if compute.attention == "cudnn":
        raise UserError(
            f"--compute.attention cudnn can't run here. It needs {needs}. --compute.attention auto takes it where it "
            "can run, and blocks of queries elsewhere"
        )
    on_gpu = jax.devices()[0].platform == "gpu"
    reason = f" (cuDNN's fused kernel needs {needs})" if on_gpu else ""
    return dataclasses.replace(compute, attention="blocks"), blocks + reason


def _check_kernels(model: Model) -> None:
    needs = _missing_card(_cuda_capability())
    if model.width > pallas_norm.WIDEST:
        needs.append(f"a width of at most {pallas_norm.WIDEST} (--model.width is {model.width})")
    if needs:
        raise UserError(
            f"--compute.kernels pallas can't run here. It needs {'; '.join(needs)}. --compute.kernels xla, the "
            "default, runs anywhere"
        )


def missing(model: Model, compute: Compute, length: int) -> list[str]:
    """Lists what cuDNN's kernel needs and hasn't got here, each with what there is instead; empty where it can run.

    The limits are those of training in NVIDIA's support matrix for cuDNN's scaled dot-product attention, which are
    stricter in places than JAX's own check (`check_is_flash_attention`).
    """
    capability = _cuda_capability()
    needs = _missing_card(capability) + _missing_in_shapes(model, compute, length, capability)
    return needs + (_missing_cudnn(capability) if capability else [])


def missing_to_pallas(model: Model) -> list[str]:
    """Lists what the kernels in Pallas need and haven't got here, likewise. Triton has them for the same cards."""
    needs = _missing_card(_cuda_capability())
    if model.width_per_head > pallas_attention.WIDEST:
        named = _head_width_option(model)
        needs.append(f"heads of a width of at most {pallas_attention.WIDEST} ({named} is {model.width_per_head})")
    return needs + _missing_dropout(model)


def attention_of_card(model: Model, compute: Compute, length: int, capability: tuple[int, int]) -> Compute:
    """Decides "auto" for a card of this compute capability that isn't here, with a cuDNN that is new enough."""
    if compute.attention != "auto":
        return compute
    can = capability >= (8, 0) and not _missing_in_shapes(model, compute, length, capability)
    return dataclasses.replace(compute, attention="cudnn" if can else "blocks")


def _missing_card(capability: tuple[int, ...] | None) -> list[str]:
    if capability and capability >= (8, 0):
        return []
    found = jax.devices()[0].device_kind + (f", {_dotted(capability)}" if capability else "")
    return [f"an NVIDIA GPU of compute capability 8.0 (Ampere) or later (here is {found})"]


def _missing_in_shapes(model: Model, compute: Compute, length: int, capability: tuple[int, ...] | None) -> list[str]:
    """Lists what of the model and its numbers cuDNN's kernel doesn't take."""
    needs = []
    if compute.dtype != "bfloat16":
        needs.append(f"--compute.dtype bfloat16 (it is {compute.dtype})")
    head_width = model.width_per_head
    widest = 256 if capability and capability[0] == 9 else 128  # backward; only Hopper's goes further
    if head_width % 8 or head_width > widest:
        named = _head_width_option(model)
        needs.append(f"heads of a width that is a multiple of 8 and at most {widest} ({named} is {head_width})")
    if model.documents_apart:
        apart = "conversations are apart" if model.document_start == IN_DATA else "--data.document-mask"
        needs.append(f"attention across the borders of documents ({apart})")
    needs += _missing_dropout(model)
    if length < 2:
        needs.append("sequences of two tokens or more (--training.sequence-length)")
    return needs


def _missing_dropout(model: Model) -> list[str]:
    if not model.dropout:
        return []
    return [f"no dropout (--model.dropout is {model.dropout}), whose masks are drawn in blocks of queries"]


def _head_width_option(model: Model) -> str:
    return "--model.head-width" if model.head_width else "--model.width / --model.heads"


def _missing_cudnn(capability: tuple[int, ...]) -> list[str]:
    needed = 91100 if capability == (10, 3) else 90000
    found = cudnn_attention.version()
    if found is not None and found >= needed:
        return []
    here = "there is none" if found is None else f"here is {_dotted(_cudnn_parts(found))}"
    return [f"cuDNN {_dotted(_cudnn_parts(needed)[:2])} or later ({here}): pip install -U 'jax[cuda12]', or cuda13"]


def _cuda_capability() -> tuple[int, ...] | None:
    """Returns the device's compute capability, (9, 0) for an H100; None where it isn't an NVIDIA GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:  # AMD's are "gpu" too
        return None
    return tuple(int(part) for part in device.compute_capability.split("."))


def multiplies_8_bits() -> bool:
    """Returns whether the device has products of 8 bits: NVIDIA's since Ada and Hopper."""
    capability = _cuda_capability()
    return capability is not None and capability >= (8, 9)


def _cudnn_parts(version: int) -> tuple[int, int, int]:
    """Splits cuDNN's version as it counts it itself: 91002 is 9.10.2."""
    return version // 10000, version // 100 % 100, version % 100


def _dotted(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))
