"""``odewei run``: the text is transformers' own, as it comes; figures are on stderr; mistakes are one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from odewei import cli
from tests.models import bert, gpt2, llama, t5
from tests.pretrained.checkpoints import as_loaded, saved

transformers = pytest.importorskip("transformers")

WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 99))]
PROMPT = "w5 w6 w7"


def run(*arguments: object, text: str | None = None) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(cli.group(), ["run", *map(str, arguments)], prog_name="odewei", input=text)


def refused(*arguments: object, status: int = 1) -> str:
    """The one line on stderr of a mistake."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def with_tokenizer(folder: Path, **settings: Any) -> Path:
    """Words for tokens, beside the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>", **settings
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    place = tmp_path_factory.mktemp("llama")
    saved(llama, place)
    (place / "generation_config.json").write_text("{}")
    return with_tokenizer(place)


def expected(folder: Path, count: int, prompt: str = PROMPT) -> str:
    """What the resident model says."""
    model = as_loaded(transformers.LlamaForCausalLM, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count)[0, given.shape[1] :]
    text: str = tokenizer.decode(found, skip_special_tokens=True)
    return text


def test_text(folder: Path) -> None:
    """The text is the resident model's; tokens a second and memory are on stderr."""
    result = run(folder, "--prompt", PROMPT, "--max-new-tokens", 6, "--memory-budget", "256KiB")
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(folder, 6) + "\n"
    assert len(result.stdout.split()) == 6
    for told in ("6 tokens", "tokens/s", "first after", "256 KiB used", "weights", "read"):
        assert told in result.stderr.replace("\n", " "), result.stderr


def test_json(folder: Path) -> None:
    """One document on stdout has the text and the figures; the budget was kept."""
    options = ("--max-new-tokens", 5, "--memory-budget", "256KiB", "--prefetch-depth", 0, "--json")
    result = run(folder, "--prompt", PROMPT, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["text"] == expected(folder, 5)
    assert (found["prompt_tokens"], found["new_tokens"]) == (3, 5)
    assert 0 < found["peak_bytes"] <= found["budget_bytes"] == 256 << 10 < found["weight_bytes"] < found["bytes_read"]
    assert found["tokens_per_second"] > 0
    assert 0 < found["first_token_seconds"] <= found["seconds"]


def test_prompt_of_stdin(folder: Path) -> None:
    """A prompt "-" is read from stdin."""
    result = run(folder, "--prompt", "-", "--max-new-tokens", 3, text=PROMPT)
    assert result.stdout == expected(folder, 3) + "\n"


def test_sampling(folder: Path) -> None:
    """--sample draws tokens, the same ones for the same seed."""
    options = ("--prompt", PROMPT, "--max-new-tokens", 12, "--sample", "--seed")
    texts = [run(folder, *options, seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_chat(tmp_path: Path) -> None:
    """--chat formats the prompt by the tokenizer's template; without one it is refused."""
    saved(llama, tmp_path)
    with_tokenizer(tmp_path)
    assert "no template" in refused(tmp_path, "--prompt", PROMPT, "--chat")
    with_tokenizer(tmp_path, chat_template="w9 {{ messages[0]['content'] }} w8")
    result = run(tmp_path, "--prompt", PROMPT, "--chat", "--max-new-tokens", 4)
    assert result.stdout == expected(tmp_path, 4, f"w9 {PROMPT} w8") + "\n"


def test_encoder_and_decoder(tmp_path: Path) -> None:
    """A model with an encoder answers too."""
    saved(t5, tmp_path)
    with_tokenizer(tmp_path)
    result = run(tmp_path, "--prompt", PROMPT, "--max-new-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    assert 1 <= json.loads(result.stdout)["new_tokens"] <= 4


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    """What cannot work is one line, and the status is 1; what cannot be understood is 2."""
    assert "no checkpoint" in refused(tmp_path, "--prompt", "x")
    assert "no such folder" in refused("./none", "--prompt", "x")
    assert "smallest memory_budget" in refused(folder, "--prompt", "w5", "--memory-budget", "1KiB")
    assert "no tokens" in refused(folder, "--prompt", "")
    assert "dtype" in refused(folder, "--prompt", "x", "--dtype", "int8")
    assert "device" in refused(folder, "--prompt", "x", "--device", "moon")
    assert "--prompt" in refused(folder, status=2)
    assert "--max-new-tokens" in refused(folder, "--prompt", "x", "--max-new-tokens", 0, status=2)


def test_folders_that_cannot_generate(tmp_path: Path) -> None:
    """A folder without a tokenizer, a model without a head, and one with too few positions are told."""
    saved(llama, tmp_path / "plain")
    assert "no tokenizer" in refused(tmp_path / "plain", "--prompt", "x")
    saved(bert, tmp_path / "bert")
    with_tokenizer(tmp_path / "bert")
    assert "BertModel generates no text" in refused(tmp_path / "bert", "--prompt", "x")
    saved(gpt2, tmp_path / "gpt2")
    with_tokenizer(tmp_path / "gpt2")
    result = run(tmp_path / "gpt2", "--prompt", " ".join(["w5"] * 70))
    assert result.exit_code == 1
    assert "positions" in result.stderr
    assert "Traceback" not in result.stderr


def test_in_a_process_of_its_own(folder: Path) -> None:
    """The installed command ends by itself, with the text alone on stdout and no traceback on stderr."""
    command = [sys.executable, "-c", "from odewei import cli; cli.main()", "run", str(folder), "--prompt", PROMPT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, "--max-new-tokens", "4"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected(folder, 4) + "\n"
    assert "Traceback" not in result.stderr
    assert "tokens/s" in result.stderr.replace("\n", " ")
