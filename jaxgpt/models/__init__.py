"""Layers composed into models: parameters, initialisation, forward and backward."""
