"""Functions as operators that the compiler calls and does not look into: what fused*.py and prior.py declare their kernels with; trials of some."""

import torch
from torch.library import custom_op

from place import say

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


def trusted(pairs, note: str) -> bool:
    """Whether the `pairs()` of a kernel's result and its reference are alike; where not, or where that raises, says the note and why.

    For kernels in Gluon, an experimental part of Triton, of which another release may fail in any way.
    """
    bounds = {torch.float32: 0.001}  # of the error, relative and absolute; else, in half precision, 0.02
    try:
        right = all(torch.allclose(ours, other, rtol=(bound := bounds.get(ours.dtype, 0.02)), atol=bound) for ours, other in pairs())
        why = "its results are wrong"
    except Exception as e:
        right, why = False, f"{type(e).__name__}: {e}".splitlines()[0]
    if not right:
        import triton

        say(f"note: {note}, with Triton {triton.__version__}: {why}")
    return right
