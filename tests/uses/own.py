"""odewei's own functions; with the ordinary model there is nothing to do."""

from __future__ import annotations

import torch

import odewei
from odewei.errors import ClosedError, OdeweiError

from .action import action
from .side import Side, tensors_of


@action(often=0.5, holds=True)
def materialize(side: Side) -> object:
    """An ordinary model from now on, by whatever wrapper it was asked."""
    if side.is_streamed:
        assert odewei.materialize(side.model) is side.model
        side.is_streamed = False


@action(lambda draw: {"seed": draw.seed()}, often=0.5)
def trace(side: Side, seed: int) -> object:
    if side.is_streamed:
        odewei.trace(side.model, **side.inputs(seed))


@action(lambda draw: {"seed": draw.seed()}, often=0.5)
def profile(side: Side, seed: int) -> object:
    with torch.no_grad():
        if side.is_streamed:
            with odewei.profile(side.model):
                return list(tensors_of(side.call(seed)))
        return list(tensors_of(side.call(seed)))


@action(lambda draw: {"seed": draw.seed()}, often=0.4, ends=True)
def close(side: Side, seed: int) -> object:
    """Twice; a pass afterwards is refused, where any streamed weight is left to be read."""
    side.is_over = True
    if side.is_streamed:
        odewei.close(side.model)
        odewei.close(side.model)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout before the layer that refuses
                side.call(seed)
        except ClosedError:
            return
        except OdeweiError:
            raise
        except Exception:  # as an ordinary model raises that was edited so that it cannot run
            pass
        # All that it needs may be the user's by now.
        assert side.holds_weights, "a closed model answered"


@action()
def report(side: Side) -> object:
    """By whatever wrapper it is asked."""
    if side.is_streamed:
        found = odewei.report(side.model)
        assert str(found)
        assert found.budget_bytes > 0


@action(often=0.3)
def save_trace(side: Side) -> object:
    if side.is_streamed:
        odewei.save_trace(side.model, side.folder / "trace.json")
