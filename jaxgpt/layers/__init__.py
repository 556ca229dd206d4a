"""The maths: one file per layer, its forward and its backward side by side.

A layer is a module with `forward` and `backward`, and `Params` and `Residuals` where it has any. `forward` returns the
layer's output and what `backward` will need of it; `backward` takes the gradient of the loss by the output and returns
the gradients by the parameters and by the input, in the types of the things they are gradients of.
"""
