"""Advice after a run that failed: only changes that would make a difference."""

from jaxgpt.options.config import Config


def after_nonfinite(config: Config, step: int) -> str:
    """Returns options that may help where the loss or a gradient is NaN or infinite at this step, as a phrase.

    No option that is off is to be made smaller, and none is advised that is set so already. A warm-up that ended long
    ago had no part in it.
    """
    optimizer, compute = config.optimizer, config.compute
    tries = [f"a lower --optimizer.learning-rate (it is {optimizer.learning_rate:g})"]
    if not optimizer.warmup_steps:
        tries.append("--optimizer.warmup-steps, of which there are none")
    elif step <= 2 * optimizer.warmup_steps:
        tries.append(f"a longer --optimizer.warmup-steps (it is {optimizer.warmup_steps})")
    if optimizer.clip_norm:
        tries.append(f"a smaller --optimizer.clip-norm (it is {optimizer.clip_norm:g})")
    else:
        tries.append("--optimizer.clip-norm 1, since gradients are not clipped")
    if compute.dtype != "float32":
        tries.append("--compute.dtype float32")
    if compute.parameters != "float32":
        tries.append("--compute.parameters float32")
    return f"{', '.join(tries[:-1])} or {tries[-1]}"
