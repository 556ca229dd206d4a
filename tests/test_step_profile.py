"""The profile of a step's time: names in a compiled program, and the sums of a trace."""

import contextlib
import gzip
import json
import os
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import step_profile as profile
from jaxgpt.layers import gelu, linear
from jaxgpt.options.config import Compute, Config, Model, Training

PROGRAM = """
HloModule jit_train_step

ENTRY %main (p: bf16[2,8]) -> bf16[2,8] {
  %p = bf16[2,8]{1,0} parameter(0), metadata={op_name="state"}
  %fused.1 = (bf16[2,8]{1,0}, f32[2]{0}) custom-call(%p), metadata={op_name="jit(f)/attention.forward/fwd"}
  %out = bf16[2,8]{1,0} get-tuple-element(%fused.1), index=0, metadata={op_name="jit(f)/attention.forward/fwd"}
  %c.2 = bf16[2,8]{1,0} call(%out), metadata={op_name="jit(f)/linear.forward/call"}
  ROOT %add.3 = bf16[2,8]{1,0} add(%out, %out)
}
"""


@pytest.fixture(scope="module")
def program():
    """The text of a compiled program: a product and its gradient in a loop, and a sine that belongs to no layer."""

    def one(x, _):
        params = linear.Params(x[:4], x[4])
        y, residuals = linear.forward(params, x)
        grads, dx = linear.backward(params, residuals, gelu.forward(y)[0])
        return jnp.sin(dx).at[:4].add(grads.weight), None

    return jax.jit(lambda x: jax.lax.scan(one, x, None, length=3)[0]).lower(jnp.ones((5, 4))).compile().as_text()


def test_operations_are_named_by_the_layer_they_are_of(program):
    origins = profile.operation_origins(program)
    assert set(origins.values()) == {"linear.forward", "linear.backward", "gelu.forward", "between layers"}
    dots = {name: re.search(rf"%?{re.escape(name)} = .* dot\(", program) for name in origins}
    assert {origins[name] for name, dot in dots.items() if dot} == {"linear.forward", "linear.backward"}


def test_what_takes_no_time_of_its_own_is_not_counted(program):
    """The time of a loop is that of its body."""
    (loop,) = set(re.findall(r"%?([\w.\-]+) = [^\n]* while\(", program))
    assert loop not in profile.operation_origins(program)


def test_the_innermost_scope_counts():
    text = '  %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/unembedding.forward/cross_entropy.forward/dot"}'
    assert profile.operation_origins(text) == {"dot.1": "cross_entropy.forward"}


def test_shares_add_up_over_steps(program):
    """Two steps are averaged, the largest share first; events of other programs are passed over."""
    origins = profile.operation_origins(program)
    forward, backward = (
        next(name for name, origin in origins.items() if origin == f"linear.{way}") for way in ("forward", "backward")
    )
    events = [
        {"name": forward, "dur": 1000},
        {"name": "thunk", "args": {"hlo_op": forward}, "dur": 3000},
        {"name": backward, "dur": 9000},
        {"name": "elsewhere", "dur": 1e9},
    ]
    assert profile.shares(events, program, steps=2) == [
        profile.Share("linear.backward", 4.5, 0.5),
        profile.Share("linear.forward", 2.0, 1.0),
    ]


def test_the_trace_is_the_newest_one(tmp_path, monkeypatch):
    """Events without a length are left out."""
    monkeypatch.setattr(jax.profiler, "trace", lambda *args, **kwargs: contextlib.nullcontext())
    for number, name in enumerate(("old", "new")):
        path = tmp_path / name / "perfetto_trace.json.gz"
        path.parent.mkdir()
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": [{"ph": "X", "name": name}, {"ph": "M", "name": "thread"}]}, file)
        os.utime(path, (number, number))
    ran = []
    assert profile.trace(lambda: ran.append(1), 3, tmp_path) == [{"ph": "X", "name": "new"}]
    assert len(ran) == 3


def test_the_report_of_a_small_model(tmp_path, capsys):
    """A real trace: every layer is in the table, and the shares are all there is."""
    model = Model(layers=1, heads=2, width=8, context=16, vocabulary_size=20)
    config = Config(model=model, compute=Compute(), training=Training(steps=10))
    assert profile.report(config, 2, 16, tmp_path, steps=1) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^([a-z_.]+(?: layers)?) +([\d.]+) +([\d.]+)% +(\d+)$", printed, re.MULTILINE)
    names = [name for name, *_ in rows]
    for name in ("attention.forward", "attention.backward", "linear.forward", "linear.backward", "adamw.update"):
        assert name in names
    assert sum(float(share) for *_, share, _ in rows) == pytest.approx(100, abs=0.1 * len(rows))
    assert list(tmp_path.rglob("perfetto_trace.json.gz"))


def test_a_call_of_a_library_is_an_operation_and_a_call_of_a_computation_is_not():
    assert profile.operation_origins(PROGRAM) == {"fused.1": "attention.forward", "add.3": "between layers"}
