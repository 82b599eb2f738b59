"""Names of the backbones that `train` builds, without what it takes to build them."""

from __future__ import annotations

EFFICIENTNET_LITE0 = "efficientnet-lite0"
BACKBONES = ("mobilenetv2", "resnet50", EFFICIENTNET_LITE0)
