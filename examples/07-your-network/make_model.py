"""A U-Net with a single exit in plain PyTorch: trained for a while on generated scenes, exported to ONNX."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mess_compile.data import scenes

CLASSES, HW = 8, (64, 96)
COUNTS = {"train": 160, "test": 64}


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Frames (n, 3, H, W) with values from 0 to 1 -> logits (n, classes, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8, 2)
        self.down1 = nn.Sequential(block(8, 16), block(16, 16))
        self.down2 = nn.Sequential(block(16, 32, 2), block(32, 32))
        self.deep = nn.Sequential(block(32, 64, 2), *(block(64, 64) for _ in range(3)))
        self.up2 = nn.ConvTranspose2d(64, 32, 2, 2)
        self.fuse2 = nn.Sequential(block(64, 32), block(32, 32))
        self.up1 = nn.ConvTranspose2d(32, 16, 2, 2)
        self.fuse1 = nn.Sequential(block(32, 16), block(16, 16))
        self.classifier = nn.Conv2d(16, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.down1(self.stem(image))
        second = self.down2(first)
        value = self.up2(self.deep(second))
        value = self.up1(self.fuse2(torch.cat([value, second], 1)))  # a skip connection
        scores: Tensor = self.classifier(self.fuse1(torch.cat([value, first], 1)))
        return nn.functional.interpolate(scores, image.shape[2:], mode="bilinear")


def read_split(folder: Path) -> tuple[Tensor, Tensor]:
    """All images, (n, 3, H, W) from 0 to 1, and their labels, (n, H, W)."""
    names = sorted(path.name for path in (folder / "images").iterdir())
    images = np.stack([np.asarray(Image.open(folder / "images" / name)) for name in names])
    labels = np.stack([np.asarray(Image.open(folder / "labels" / name)) for name in names])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels).long()


def train(network: UNet, images: Tensor, labels: Tensor, steps: int) -> None:
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (8,))
        loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen], ignore_index=255)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder for the scenes")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    scenes.write_scenes(chosen.data, COUNTS, HW)
    network = UNet()
    train(network, *read_split(chosen.data / "train"), chosen.steps)
    warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export")  # needs no onnxscript
    example = torch.zeros(1, 3, *HW)
    torch.onnx.export(network.eval(), (example,), chosen.output, input_names=["image"], dynamo=False)
    print(f"{chosen.output}: one output, {CLASSES} classes, input {HW[0]} x {HW[1]}")


if __name__ == "__main__":
    main()
