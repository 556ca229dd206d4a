"""The gradient check: every hand-written gradient beside `jax.grad`."""
