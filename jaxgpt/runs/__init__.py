"""A run on the disk: its folder, checkpoints, saving, resuming and loading."""
