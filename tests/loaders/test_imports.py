"""The layers: what loaders may import."""

import ast
from pathlib import Path

import pytest

import odewei.loaders

FILES = sorted(Path(odewei.loaders.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loaders_know_nothing_of_modules_and_streams(path: Path) -> None:
    """A loader imports no torch.nn, no asyncio, no threads' pools, and of odewei little but loaders."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module or "")
    for name in imported:
        assert not name.startswith(("torch.nn", "asyncio", "concurrent", "aiofiles")), name
        assert not name.startswith("odewei") or name.startswith(
            ("odewei.errors", "odewei.loaders", "odewei.on_demand")
        ), name
