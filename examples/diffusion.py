"""Stable Diffusion whose text encoder, U-Net and decoder share one memory budget.

What is needed next has the memory: the text encoder at first, then the U-Net, step after step, then the decoder.

python examples/diffusion.py path/to/stable-diffusion --memory-budget 2GiB --prompt "a lighthouse at dusk"
python examples/diffusion.py --tiny
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import odewei
from odewei.torch import init_on_demand_weights_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Make an image.")
    parser.add_argument("folder", nargs="?", type=Path, help="a Stable Diffusion pipeline, as it was downloaded")
    parser.add_argument("--tiny", action="store_true", help="a tiny pipeline with random weights instead")
    parser.add_argument("--prompt", default="a lighthouse at dusk")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--memory-budget", default="auto")
    parser.add_argument("--output", type=Path, default=Path("image.png"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.tiny:
            from tiny import write_stable_diffusion

            arguments.folder, arguments.size = write_stable_diffusion(Path(scratch, "pipeline")), 32
            arguments.output, arguments.steps = Path(scratch, "image.png"), 4
            arguments.memory_budget = "3MiB"  # less than half of the weights
        if arguments.folder is None:
            parser.error("give a folder, or --tiny")
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    folder, budget = arguments.folder, odewei.MemoryBudget(arguments.memory_budget)

    def streamed(name: str, kind: type) -> torch.nn.Module:
        def build() -> torch.nn.Module:
            if kind is CLIPTextModel:
                return CLIPTextModel(CLIPTextConfig.from_pretrained(folder / name))
            return kind.from_config(kind.load_config(folder / name))

        return init_on_demand_weights_model(build, weights(folder / name), memory_budget=budget).eval()

    parts = {
        "text_encoder": streamed("text_encoder", CLIPTextModel),
        "unet": streamed("unet", UNet2DConditionModel),
        "vae": streamed("vae", AutoencoderKL),
    }
    pipeline = StableDiffusionPipeline.from_pretrained(folder, **parts, safety_checker=None, local_files_only=True)
    image = pipeline(
        arguments.prompt,
        num_inference_steps=arguments.steps,
        height=arguments.size,
        width=arguments.size,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(arguments.output)
    print(f"{arguments.output}: {image.size[0]} × {image.size[1]} pixels\n")
    for name, part in parts.items():
        print(f"{name}\n{odewei.report(part)}\n")
        odewei.close(part)


def weights(folder: Path) -> Path:
    """A part's one file of weights, or the index of several; of several kinds the plain one."""
    names = ("diffusion_pytorch_model.safetensors", "model.safetensors")
    chosen = [folder / end for name in names for end in (f"{name}.index.json", name) if (folder / end).is_file()]
    return chosen[0] if chosen else folder


if __name__ == "__main__":
    main()
