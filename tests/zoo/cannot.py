"""Architectures of transformers and diffusers that are not in the zoo, or whose test is known to fail, and why."""

from __future__ import annotations

CANNOT_RUN: dict[str, str] = {}
