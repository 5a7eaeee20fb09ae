"""How commands that look at a checkpoint end when the user made a mistake, and when nobody listens."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from .conftest import invoke, one_line, process

COMMANDS = [("inspect",), ("plan", "--bandwidth", "1GB")]
needs_other_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
class TestMistakes:
    @pytest.mark.parametrize("path", ["nothing/there", "", "a\nb", "x" * 5000, "nothing.safetensors", "/dev/null"])
    def test_paths_that_are_no_checkpoint(
        self, command: tuple[str, ...], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are one line with status 1, whatever the path is."""
        monkeypatch.chdir(tmp_path)
        result = invoke(*command, path)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert "Traceback" not in result.stderr

    def test_folders_and_files_without_weights(self, command: tuple[str, ...], tmp_path: Path) -> None:
        """An empty folder, an empty file of each kind, and files of nonsense are named."""
        one_line(invoke(*command, tmp_path))
        for ending in ("safetensors", "pt", "bin", "npz", "npy", "gguf", "index.json", "txt"):
            for content in (b"", b"nonsense" * 100):
                file = tmp_path / f"file.{ending}"
                file.write_bytes(content)
                assert str(file) in one_line(invoke(*command, file))

    @needs_other_user
    def test_no_permission(self, command: tuple[str, ...], checkpoint: Path) -> None:
        """A file that may not be read is named."""
        file = checkpoint / "a.safetensors"
        file.chmod(0)
        try:
            assert "a.safetensors" in one_line(invoke(*command, checkpoint))
        finally:
            file.chmod(0o644)


def test_a_pipe_that_nobody_reads(checkpoint: Path) -> None:
    """``| head`` ends the command without a word."""
    running = process("inspect", checkpoint, "--json", "--tensors")
    assert running.stdin is not None
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait() != 0
    running.stdin.close()
    running.stderr.close()


def test_ctrl_c_while_it_works(checkpoint: Path) -> None:
    """An interrupt is status 130 and no traceback, wherever it arrives."""
    script = "import os, sys; from odewei import cli, loaders\n"
    script += "loaders.open_checkpoint = lambda path: (print('now', file=sys.stderr, flush=True), sys.stdin.read())\n"
    running = process("inspect", checkpoint, script=script + "cli.main()")
    assert running.stderr is not None
    assert running.stderr.readline() == "now\n"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert (running.returncode, out, err) == (130, "", "interrupted\n")
