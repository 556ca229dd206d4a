"""Device-specific versions of a layer: the layer's own `forward` and `backward`, with residuals of their own.

`choose.py` says which of them runs; nothing else asks what device there is.
"""
