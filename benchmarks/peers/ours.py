"""This project's train step."""

from benchmarks.peers import common
from benchmarks.peers.spec import WARM_UP, Spec
from jaxgpt.config import Config, Training
from jaxgpt.models import gpt2
from jaxgpt.training import step


def make(spec: Spec, params: gpt2.Params) -> common.Program:
    training = Training(steps=WARM_UP + spec.steps, batch_size=spec.batch, sequence_length=spec.sequence)
    config = Config(model=spec.model, compute=spec.compute, training=training, optimizer=spec.optimizer)
    if step.unrolled(config.model, config.compute):
        params = gpt2.unstacked(params)
    return common.Program(step.make_train_step(config), step.init_state(config)._replace(params=params))


if __name__ == "__main__":
    common.run("ours", make)
