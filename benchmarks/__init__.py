"""This project beside its peers."""
