"""The implementations that are measured, each a program run in a process of its own."""
