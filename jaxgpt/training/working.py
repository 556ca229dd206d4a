"""The parameters that the model computes with on a device, from those that are trained and those that are frozen."""

from typing import Any

from jaxgpt.models import lora, with_scalar
from jaxgpt.models.blocks import Adapters, Context, Params
from jaxgpt.options.config import Config
from jaxgpt.parallel.sharding import Layout


def working(params: Params, frozen: Any, config: Config, layout: Layout) -> tuple[Params, Context]:
    """Returns a family's parameters in the compute dtype, with the objective's scalar head, and the context.

    Args:
        params: Parameters of a train state, or this device's shards of them.
        frozen: The base, whole on every device, where `params` are its adapters; else None.
        config: The run's configuration.
        layout: Where its parameters are.
    """
    model, compute = config.model, config.compute
    if not config.lora.rank:
        context = Context(
            model, compute, frozen, layout.gather(compute.dtype), layout.scatter, objective=config.objective
        )
        return layout.working(params, compute.dtype), context
    # Adapters are small: they are all-gathered together at each stage.
    adapters = layout.whole(params, compute.dtype)
    gather = lora.gather(frozen, compute.dtype)

    def scatter(grads):
        return layout.scatter(lora.gradients(grads, model, config.lora))

    attached = with_scalar.on_model(
        lambda adapters: lora.attach(adapters, frozen, model, config.lora, compute.dtype), adapters
    )
    return attached, Context(model, compute, frozen, gather, scatter, objective=config.objective)


def trained(grads: Params, config: Config) -> Params:
    """Returns the gradients of what is trained, from a family's gradients of the `working` parameters."""
    return with_scalar.on_model(lambda grads: Adapters(grads.blocks), grads) if config.lora.rank else grads
