"""Data parallelism: the mesh of devices, and who of them has what."""
