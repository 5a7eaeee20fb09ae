"""The examples run, each as a process of its own, on tiny models that do not fit their budget."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

import odewei
from odewei.scheduler.budget import parse_nbytes

ROOT = Path(odewei.__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

pytestmark = [
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs the extra hf"),
    pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="needs the repository"),
    pytest.mark.slow,
]


def run(name: str, *arguments: str | Path) -> str:
    """What an example prints."""
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def has_streamed(printed: str) -> bool:
    """Whether every model whose report was printed has read more than its weights: some left and came back."""
    weights, read = (
        [parse_nbytes(size) for size in re.findall(rf"^{what} +([\d.]+ \w+) in", printed, re.MULTILINE)]
        for what in ("weights", "read")
    )
    return bool(read) and all(more > once for more, once in zip(read, weights, strict=True))


def test_generate() -> None:
    """Both prompts are answered."""
    printed = run("generate.py", "--tiny", "--tokens", "5")
    assert printed.startswith("a b c ")
    assert "\nx y" in printed
    assert has_streamed(printed)


def test_embed(tmp_path: Path) -> None:
    """All documents have a vector of length 1; equal documents have equal vectors."""
    import numpy as np

    printed = run("embed.py", "--tiny", "--batch", "16", "--output", tmp_path / "embeddings.npy")
    found = np.load(tmp_path / "embeddings.npy")
    assert found.shape == (100, 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(found[0], found[16])
    assert has_streamed(printed)


@pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
def test_diffusion() -> None:
    """An image is written, and each part has its report."""
    printed = run("diffusion.py", "--tiny")
    assert "image.png: 32 × 32 pixels" in printed
    assert printed.count("weights  ") == 3
    assert has_streamed(printed)


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_lora(tmp_path: Path) -> None:
    """The loss falls, memory stays within the budget, and the adapter is written."""
    printed = run("lora.py", "--tiny", "--output", tmp_path / "adapter")
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]
    assert has_streamed(printed)
    assert "over budget" not in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_server() -> None:
    """It answers several requests at once, token by token, and others meanwhile; Ctrl-C ends it without a traceback."""
    command = [sys.executable, "-X", "faulthandler", ROOT / "examples" / "server.py", "--tiny", "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()

            def answer(prompt: str) -> list[str]:
                with urlopen(f"{address}/generate?prompt={prompt}&tokens=8") as response:
                    return response.read().decode().split()

            with urlopen(f"{address}/generate?prompt=a&tokens=400") as long:
                assert long.read(1)  # it has begun
                with ThreadPoolExecutor(3) as threads:
                    first, second, again = threads.map(answer, ["a%20b", "x%20y%20z", "a%20b"])
                with urlopen(f"{address}/report") as response:
                    report = json.load(response)
                assert not long.isclosed()
            assert len(first) == len(second) == 8
            assert first == again
            assert report["bytes_read"] > report["weight_bytes"]
            for path, status in (("/", 404), ("/generate", 400), ("/generate?prompt=a&tokens=x", 400)):
                with pytest.raises(HTTPError) as refused:
                    urlopen(address + path)
                assert refused.value.code == status
                refused.value.close()
        finally:
            server.send_signal(signal.SIGINT)
            try:
                errors = server.communicate(timeout=60)[1]
            except subprocess.TimeoutExpired:
                server.send_signal(signal.SIGABRT)  # the fault handler says where each thread is
                pytest.fail(f"Ctrl-C has not ended it: {server.communicate()[1]}")
        assert "Traceback" not in errors
    assert server.returncode == 0


def test_each_example_is_listed() -> None:
    """The page of the examples names each of them."""
    text = (ROOT / "examples" / "README.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f"`{path.name}" in text or path.name == "tiny.py"
