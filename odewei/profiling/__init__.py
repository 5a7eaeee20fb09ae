"""What a streamed model does over time: recorded, drawn, summed up, and judged.

- ``recorder``: the scheduler's observer; notes and nothing else.
- ``spans``: what was noted, as spans of time (pure).
- ``summary``: sums over spans, a row a layer (pure); ``advice``: what they mean (pure).
- ``trace_json``, ``picture``, ``table``: three ways to look at it.
- ``timeline``: all of it in one object; ``profile``: the context manager that records.

Nothing of odewei imports this package but its public face and the command line.
"""

from __future__ import annotations

from odewei.profiling.profile import profile
from odewei.profiling.summary import Layer, Summary
from odewei.profiling.timeline import Timeline

__all__ = ["Layer", "Summary", "Timeline", "profile"]
