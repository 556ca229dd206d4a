"""This project's train step."""

from benchmarks.peers import common
from benchmarks.peers.spec import WARM_UP, Spec
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.models.blocks import Params, arrange
from jaxgpt.options.config import Config, Parallel, Training
from jaxgpt.training import step
from jaxgpt.training.state import init_state


def make(spec: Spec, params: Params) -> common.Program:
    training = Training(steps=WARM_UP + spec.steps, batch_size=spec.batch, sequence_length=spec.sequence)
    compute, attention = choose_attention(spec.model, spec.compute, spec.sequence)
    config = Config(
        model=spec.model,
        compute=compute,
        parallel=Parallel(devices=1),
        training=training,
        optimizer=spec.optimizer,
    )
    state = init_state(config)._replace(params=arrange(params, compute))
    return common.Program(step.make_train_step(config), state, f"attention {attention}")


if __name__ == "__main__":
    common.run("ours", make)
