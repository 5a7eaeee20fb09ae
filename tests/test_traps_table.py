"""The table in docs/traps.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_test_in_the_table_exists() -> None:
    """Each row names a test, and each test named is in its file, or in the suite that the file inherits."""
    root = Path(__file__).parent.parent
    found = [line for line in (root / "docs" / "traps.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(found) == 36, "40 traps, of which five are in one row"
    for row in found:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named or row.endswith("none: there are no accelerators yet |"), row
        for file, name in named:
            assert f"def {name}(" in (root / file).read_text() or not name, (file, name)
