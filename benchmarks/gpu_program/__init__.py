"""The program that XLA makes of a train step for an NVIDIA GPU, looked at on a machine that needs to have none."""
