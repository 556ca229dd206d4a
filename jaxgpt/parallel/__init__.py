"""Data parallelism: device mesh, ZeRO sharding, multi-process setup."""
