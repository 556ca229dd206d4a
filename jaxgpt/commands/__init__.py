"""Commands, one file each: what each does, in order. The only folder that imports from all others."""
