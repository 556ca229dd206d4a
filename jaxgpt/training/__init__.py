"""The train step, and the loop, the files and the figures around it."""
