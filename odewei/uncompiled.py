"""What ``torch.compile`` must leave alone: taking leases and reading weights is nothing to be compiled.

``torch.compiler.disable`` says so too, but importing the compiler for it would take most of a second of every process
that never compiles anything. So this sets what that sets: the mark by which the compiler breaks a graph instead of
following a call, and the strategy for frames that it meets on its own (torch/_dynamo/decorators.py, eval_frame.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["uncompiled"]

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """A decorator: neither the function nor what it calls is ever compiled."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "odewei reads weights here"  # type: ignore[attr-defined]
    try:
        eval_frame = torch._C._dynamo.eval_frame
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    except AttributeError:  # another torch: the public way, at its price
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call, no-any-return]
    return function
