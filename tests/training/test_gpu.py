"""On a GPU training must do what it does on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mess_compile.data import scenes
from mess_compile.data.dataset import open_dataset
from mess_compile.nets.checkpoint import load_candidate
from mess_compile.nets.network import Architecture, heads_from_names, with_final_head
from mess_compile.reporter import Reporter
from mess_compile.training.parallel import Machines
from mess_compile.training.recipe import Recipe
from mess_compile.training.train import TrainingJob, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine shows no CUDA device"),
]
HW = (48, 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scenes.write_scenes(tmp_path / "data", {"train": 8, "val": 2}, HW)
    return tmp_path


def trained(folder: Path, machines: Machines, recipe: Recipe) -> list[float]:
    """Losses of the epochs of stage 1, summed over exits."""
    data = open_dataset(folder / "data", "train")
    heads = with_final_head(heads_from_names(("sep16-crm1-b0",), 3), 3)
    blocks = ("features.3", "features.6", "features.17")
    shape = Architecture("mobilenetv2", data.classes.names, data.classes.colours, HW, blocks, heads, width=0.25)
    lines: list[str] = []
    train(
        TrainingJob(shape, data, data, folder / f"{machines.accelerator}-{machines.precision}", recipe, None, machines),
        Reporter(note=lines.append),
    )
    found = [line.split("exit ")[1].split("  ")[0] for line in lines if line.startswith("stage 1")]
    return [sum(float(word) for word in words.split()) for words in found]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_those_of_the_cpu(folder: Path, precision: str) -> None:
    recipe = Recipe(epochs=(2, 1), batch=4, order="joint", learning_rate=1e-4, lovasz=0.5)
    alone = trained(folder, Machines("cpu"), recipe)
    assert trained(folder, Machines("cuda", precision=precision), recipe) == pytest.approx(alone, rel=0.05)


def test_a_network_trained_on_a_gpu_is_loaded_on_the_cpu(folder: Path) -> None:
    trained(folder, Machines("cuda"), Recipe(epochs=(1, 1), batch=4))
    assert load_candidate(folder / "cuda-fp32").candidate.heads
