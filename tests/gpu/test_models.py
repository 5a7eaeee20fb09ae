"""The cases of the simulated accelerator on a real one. ``make gpu`` has torch's sanitizer of streams look on too."""

from __future__ import annotations

from tests.sim.test_models import *  # noqa: F403
from tests.sim.test_models import stack as stack  # the fixture
