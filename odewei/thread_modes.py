"""torch's modes that belong to a thread, carried over to another: gradients, inference mode, autocast.

Knows torch only.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

__all__ = ["ThreadModes"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ThreadModes:
    """What a thread has set for itself. ``autocast``: device type, dtype, whether it is on, whether it caches."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype, bool, bool], ...]
    variables: contextvars.Context

    @classmethod
    def here(cls) -> ThreadModes:
        """Those of the calling thread, now."""
        caches = torch.is_autocast_cache_enabled()
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), caches)
                for device in _device_types()
            ),
            contextvars.copy_context(),
        )

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` in the calling thread as if these modes were set there. Any thread, several at once."""
        with ExitStack() as stack:
            if self.inference:
                stack.enter_context(torch.inference_mode())
            else:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, dtype, enabled, caches in self.autocast:
                if enabled:
                    stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=caches))
            return self.variables.copy().run(function, *args, **kwargs)


def _device_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
