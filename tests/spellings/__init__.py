"""Small models in the spellings of public families: how they import their scan, unroll, project and merge.

Written for these tests from what the families do; no line is theirs. Each imports its scan as the public code does, so
that it needs `public_code()`. `SPELLINGS` says what there is in each of them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quartermap_deploy.sources.public_code.context import public_code


@dataclass(frozen=True)
class Spelling:
    """One small model.

    Attributes:
        module: the file in this package.
        factory: its function or class that makes the model.
        inputs: shape of each input, by name, in the order of the forward; the batch is 2.
        scans: calls of a selective scan in one run.
        maps: how many of them become two-dimensional: they unroll a whole map in VMamba's four directions, or one of
            them, and are merged by a plain sum, or they are wide enough to be scanned one direction by itself.
        why_not: what the others are.
        arguments: for the factory.
        open_size: whether height and width may be left open.
    """

    module: str
    factory: str
    inputs: Mapping[str, tuple[int, ...]]
    scans: int
    maps: int
    why_not: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    open_size: bool = False

    def make(self, seed: int = 0) -> nn.Module:
        """Import the module and make the model, with weights with which the scans matter."""
        torch.manual_seed(seed)
        with public_code():
            model: nn.Module = getattr(importlib.import_module(f"{__name__}.{self.module}"), self.factory)(
                **self.arguments
            )
        enliven(model, seed)
        return model.eval()

    def examples(self, seed: int = 1) -> tuple[Tensor, ...]:
        """Random inputs."""
        random = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=random) for shape in self.inputs.values())


IMAGE = {"x": (2, 3, 16, 24)}

SPELLINGS: dict[str, Spelling] = {
    "vmamba_v05": Spelling(
        "vmamba_v05", "Classifier", {"x": (2, 3, 32, 48)}, 2, 2, arguments={"channel_first": True}
    ),
    "vmamba_v05_channel_last": Spelling(
        "vmamba_v05", "Classifier", {"x": (2, 3, 32, 48)}, 2, 2, arguments={"channel_first": False}
    ),
    "vmamba_v05_cascade": Spelling(
        "vmamba_v05",
        "Classifier",
        {"x": (2, 3, 32, 48)},
        4,
        0,
        "rows are scanned by themselves, and then the columns of what came out",
        {"cascade": True},
    ),
    "vmamba_backbone": Spelling("vmamba_v05", "Backbone", {"x": (2, 3, 32, 48)}, 2, 2),
    "vmamba_v0": Spelling("vmamba_v0", "VSSM", IMAGE, 2, 2),
    "vmamba_v0_sequence": Spelling(
        "vmamba_v0", "VSSM", IMAGE, 4, 4, "one call for each direction", {"one_by_one": True}
    ),
    "medmamba": Spelling("medmamba", "MedClassifier", IMAGE, 2, 2),
    "vm_unet": Spelling("vm_unet", "UNet", IMAGE, 3, 3),
    "mamba_unet": Spelling("mamba_unet", "MambaSystem", {"x": (2, 1, 32, 48)}, 4, 4),
    "mambair": Spelling("mambair", "Restorer", {"x": (2, 3, 12, 20)}, 2, 2, open_size=True),
    "plainmamba": Spelling("plainmamba", "Plain", IMAGE, 4, 0, "snakes, whose steps stay in raster order"),
    "vim": Spelling("vim", "VisionMamba", IMAGE, 4, 0, "a sequence with a class token in its middle"),
    "localmamba": Spelling(
        "localmamba",
        "LocalClassifier",
        IMAGE,
        1,
        0,
        "windows, and directions with a gate each, all of them narrow",
    ),
    "localmamba_wide": Spelling("localmamba", "LocalClassifier", IMAGE, 1, 1, arguments={"dim": 64}),
    "localmamba_gates": Spelling(
        "localmamba",
        "LocalClassifier",
        IMAGE,
        1,
        1,
        arguments={"dim": 48, "choices": ("h", "v_flip", "h_flip", "v")},
    ),
    "efficientvmamba": Spelling(
        "efficientvmamba",
        "Efficient",
        IMAGE,
        1,
        0,
        "each direction scans another quarter of the map, and is narrow",
    ),
    "efficientvmamba_wide": Spelling("efficientvmamba", "Efficient", IMAGE, 1, 1, arguments={"dim": 96}),
    "changemamba": Spelling(
        "changemamba",
        "ChangeDetector",
        {"before": (2, 3, 16, 24), "after": (2, 3, 16, 24)},
        5,
        5,
    ),
    "mambavision": Spelling(
        "mambavision", "HybridBackbone", {"x": (2, 3, 32, 48)}, 2, 0, "windows as sequences"
    ),
    "u_mamba": Spelling("u_mamba", "UMamba", {"x": (2, 1, 16, 24)}, 2, 0, "a Mamba layer over all positions"),
}


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Give a model weights with which its scans matter: freshly initialised ones hardly show a fault.

    Parameters are told by the names that all families use.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=random)

    with torch.no_grad():
        for path, parameter in model.named_parameters():
            name = path.rpartition(".")[2]
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            if name.startswith("A") and "log" in name:
                parameter.copy_(normal(parameter) * 0.5)
            elif name in ("D", "Ds", "D_b"):
                parameter.copy_(0.5 * normal(parameter))
            elif "dt_proj" in path and name.endswith("bias"):
                # Steps between 0.05 and 1, after softplus.
                steps = torch.exp(math.log(0.05) * torch.rand(parameter.shape, generator=random))
                parameter.copy_(steps + torch.log(-torch.expm1(-steps)))
            elif "x_proj" in path:
                parameter.copy_(2 * normal(parameter) / math.sqrt(parameter.shape[-1]))
            elif parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * normal(parameter))
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * normal(parameter))
            else:
                parameter.copy_(normal(parameter) / math.sqrt(fan_in))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.1 * normal(module.running_mean))  # type: ignore[union-attr,arg-type]
