"""The train step and its state, and what is known of them before a run: memory, FLOPs, advice."""
