"""Functions as operators that the compiler calls and does not look into: what fused*.py and prior.py declare their kernels with."""

import torch
from torch.library import custom_op

OPERATORS = []


def operator(function):
    """Decorator: `function` as the operator graph_diffusion::NAME, its arguments and results with the strides that they have without the compiler."""
    OPERATORS.append(custom_op(f"graph_diffusion::{function.__name__}", function, mutates_args=(), tags=(torch.Tag.needs_exact_strides,)))
    return OPERATORS[-1]


def make_known():
    """Tells the compiler of the operators declared so far, before it meets one.

    torch before 2.13 writes all that an operator's arguments depend on into a log message when it first meets it, which takes time exponential in
    the number of layers.
    """
    if torch.__version__ >= (2, 13):
        return
    from torch._inductor.lowering import lowerings, make_fallback

    for known in OPERATORS:
        if known._opoverload not in lowerings:
            make_fallback(known._opoverload, warn=False)
