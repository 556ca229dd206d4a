"""The program that XLA compiles of a train step for an NVIDIA GPU, examined on a machine without one."""
