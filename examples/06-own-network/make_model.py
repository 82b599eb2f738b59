"""A network with three exits in plain PyTorch: trained on images and labels, exported to ONNX."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

CLASSES = 8
CHANNELS = (24, 48, 96)
MEAN, STD = 0.5, 0.25


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class ThreeExits(nn.Module):
    """A backbone in three parts, each followed by a head: image -> three maps, and three logits."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = CHANNELS
        self.parts = nn.ModuleList(
            (
                nn.Sequential(block(3, first, 2), block(first, first, 2)),
                nn.Sequential(block(first, second, 2), block(second, second, 1)),
                nn.Sequential(block(second, third, 1), block(third, third, 1), block(third, third, 1)),
            )
        )
        self.heads = nn.ModuleList(
            nn.Sequential(block(channels, 32, 1), nn.Conv2d(32, CLASSES, 1)) for channels in CHANNELS
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps, value = [], image
        for part in self.parts:
            value = part(value)
            maps.append(value)
        return *maps, *(head(value) for head, value in zip(self.heads, maps, strict=True))


def read_split(folder: Path) -> tuple[Tensor, Tensor]:
    """All images as the network takes them, (n, 3, H, W), and their labels, (n, H, W)."""
    names = sorted(path.name for path in (folder / "images").iterdir())
    images = np.stack([np.asarray(Image.open(folder / "images" / name).convert("RGB")) for name in names])
    labels = np.stack([np.asarray(Image.open(folder / "labels" / name)) for name in names])
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - MEAN) / STD, torch.from_numpy(labels).long()


def train(network: ThreeExits, images: Tensor, labels: Tensor, steps: int) -> None:
    """All exits at once, on random batches."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (8,))
        outputs = network(images[chosen])[len(CHANNELS) :]
        upsampled = [nn.functional.interpolate(each, labels.shape[1:], mode="bilinear") for each in outputs]
        loss = sum(nn.functional.cross_entropy(each, labels[chosen], ignore_index=255) for each in upsampled)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a folder with train/images and train/labels")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    images, labels = read_split(chosen.data / "train")
    network = ThreeExits()
    train(network, images, labels, chosen.steps)
    names = [f"{what}{number}" for what in ("map", "logits") for number in (1, 2, 3)]
    warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export")  # all that it needs
    torch.onnx.export(
        network.eval(),
        (images[:1],),
        chosen.output,
        input_names=["image"],
        output_names=names,
        opset_version=17,
        dynamo=False,
    )
    print(f"{chosen.output}: outputs {', '.join(names)}")


if __name__ == "__main__":
    main()
