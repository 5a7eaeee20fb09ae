"""What README and documentation say: their Python runs, their links lead somewhere, and the site's pages are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.demo.synthetic import LlamaShape, write_llama_checkpoint

ROOT = Path(odewei.__file__).resolve().parents[1]
PAGES = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if path.is_file())
NOT_RUN = re.compile(r"<!-- not run: .+ -->")

PRELUDE = """
import torch
from torch import nn

folder = "path/to/checkpoint"

def encoder_fn():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

unet_fn = decoder_fn = encoder_fn
"""


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The Python of a page: the number of its first line, counted from 0, and the text. Left out is what says why."""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        if line == "```python" and not (number and NOT_RUN.fullmatch(lines[number - 1])):
            end = lines.index("```", number)
            yield number + 1, "\n".join(lines[number + 1 : end])


def program(page: Path) -> str:
    """All blocks in one, each in the line that it has in the page."""
    lines: list[str] = []
    for number, text in blocks(page):
        lines += [""] * (number - len(lines)) + text.split("\n")
    return "\n".join(lines)


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a page's Python in ``folder``; a traceback names the page and the line in it."""
    (folder / "prelude.py").write_text(PRELUDE)
    (folder / "page.py").write_text(program(page))
    script = (
        "import runpy, sys\n"
        "names = runpy.run_path('prelude.py')\n"
        f"exec(compile(open('page.py').read(), {str(page)!r}, 'exec'), names | {{'__name__': '__main__'}})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=110
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the pages' files are: a checkpoint of a tiny Llama, and the parts of a pipeline."""
    shape = LlamaShape(64, 128, 3, heads=4, kv_heads=2, vocab=100)
    write_llama_checkpoint(tmp_path / "path" / "to" / "checkpoint", shape, shard_bytes=50_000)
    state = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).state_dict()
    for name in ("encoder", "unet", "decoder"):
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_pages_have_python() -> None:
    """The README and most pages of the documentation have blocks that are run."""
    assert len([page for page in PAGES if list(blocks(page))]) >= 4


@pytest.mark.skipif(find_spec("transformers") is None or find_spec("peft") is None, reason="needs the extra zoo")
@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))], ids=lambda page: page.name)
def test_python_runs(page: Path, folder: Path) -> None:
    """All blocks of a page, one after another, run without an error."""
    done = run_page(page, folder)
    assert done.returncode == 0, done.stderr


def test_a_mistake_would_be_found(folder: Path, tmp_path: Path) -> None:
    """An error in a block is one of the page, in its own line."""
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n")
    done = run_page(page, folder)
    assert done.returncode == 1
    assert f'File "{page}", line 10' in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page is a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_pages_of_the_site_are_there() -> None:
    """Each page in the navigation exists, and each page is in the navigation once."""
    listed = re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    for page in listed:
        assert (ROOT / "docs" / page).is_file(), page
    design = {f"design/{path.name}" for path in (ROOT / "docs" / "design").glob("*.md")}
    missing = ({page.name for page in (ROOT / "docs").glob("*.md")} | design) - set(listed)
    assert not missing, missing


def test_options_of_the_command_are_those_of_the_page() -> None:
    """Each command has a heading in the page of the command line."""
    pytest.importorskip("click")
    from odewei.cli import COMMANDS

    text = (ROOT / "docs" / "command-line.md").read_text()
    for command in COMMANDS:
        assert f"## odewei {command}\n" in text, command
