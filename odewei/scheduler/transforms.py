"""The transforms of ``torch.func`` (grad, vmap, jvp) that are under way in a thread, left for a moment.

Tensors that are made under one belong to it and end with it; what is made of weights has to outlive it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["untransformed"]


def untransformed() -> AbstractContextManager[object]:
    """Outside of all transforms. Costs next to nothing where none is under way."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()
