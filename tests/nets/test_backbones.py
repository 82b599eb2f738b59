"""Users bring torchvision's ImageNet weights; they must load whole, or be refused by name."""

from __future__ import annotations

import pytest
import torch

from mess_compile.nets.backbones import build_backbone, load_imagenet
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


@pytest.mark.parametrize(
    ("name", "stride"), [("resnet50", 8), ("resnet50", 16), ("mobilenetv2", 8), ("mobilenetv2", 16)]
)
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


def imagenet_like(name: str) -> dict[str, torch.Tensor]:
    state = {key: torch.randn(value.shape) for key, value in build_backbone(name).state_dict().items()}
    rest = {"resnet50": ["fc.weight", "fc.bias"], "mobilenetv2": ["features.18.0.weight", "classifier.1.weight"]}
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


@pytest.mark.parametrize(("arguments", "said"), [(("vgg", 8), "vgg"), (("resnet50", 4), "stride 4")])
def test_unknown_choices_are_named(arguments: tuple[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_backbone(*arguments)
