"""The public models that `public_models.py` knows: where each lies in a checkout, and how it is made.

A model is made by the repository's own code, unchanged. What stands here are the names, sizes and options that the
repository's own configuration files and scripts give.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE: Mapping[str, tuple[int, ...]] = {"x": (1, 3, 224, 224)}


@dataclass(frozen=True)
class PublicModel:
    """A model of a public repository.

    Attributes:
        repository: names that the folder of its checkout may have.
        make: makes the model, given the folder; called under `public_code`, with `paths` importable.
        paths: folders in the checkout that its scripts have on their path.
        inputs: shape of each example input, by name.
        needs: packages that its code imports.
        hollow: packages of the checkout whose `__init__` imports what training needs; only their folders are used.
        any_size: whether it takes other sizes than that of `inputs`.
        note: what is special about it.
    """

    repository: tuple[str, ...]
    make: Callable[[Path], Any]
    paths: tuple[str, ...] = (".",)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: IMAGE)
    needs: tuple[str, ...] = ("einops", "timm")
    hollow: tuple[str, ...] = ()
    any_size: bool = True
    note: str = ""

    def folder(self, root: Path) -> Path | None:
        """The checkout in a folder of checkouts, or None."""
        return next((root / name for name in self.repository if (root / name).is_dir()), None)

    def build(self, folder: Path) -> Any:
        """Make the model; the process must be one of its own, since repositories share names of modules."""
        sys.path[:0] = [str(folder / path) for path in self.paths]
        for name in self.hollow:
            package = types.ModuleType(name)
            package.__path__ = [str(folder / self.paths[0] / name.replace(".", "/"))]
            sys.modules[name] = package
        return self.make(folder)


def _call(module: str, name: str, **arguments: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        return getattr(importlib.import_module(module), name)(**arguments)

    return make


def _timm(module: str, name: str, **arguments: Any) -> Callable[[Path], Any]:
    """A model that its module registers with timm."""

    def make(folder: Path) -> Any:
        importlib.import_module(module)
        return importlib.import_module("timm").create_model(name, **arguments)

    return make


_VMAMBA_V0 = {"depths": [2, 2, 9, 2], "dims": 96, "ssm_d_state": 16, "ssm_ratio": 2.0, "forward_type": "v0"}
_VMAMBA_V05 = {
    "depths": [2, 2, 8, 2],
    "dims": 96,
    "ssm_d_state": 1,
    "ssm_ratio": 1.0,
    "ssm_conv_bias": False,
    "forward_type": "v05_noz",
    "mlp_ratio": 4.0,
    "downsample_version": "v3",
    "patchembed_version": "v2",
    "norm_layer": "ln2d",
}
_CHANGE = {
    "depths": [2, 2, 4, 2],
    "dims": 96,
    "ssm_d_state": 1,
    "ssm_ratio": 2.0,
    "ssm_rank_ratio": 2.0,
    "ssm_dt_rank": "auto",
    "ssm_act_layer": "silu",
    "ssm_conv": 3,
    "ssm_conv_bias": False,
    "ssm_drop_rate": 0.0,
    "ssm_init": "v0",
    "forward_type": "v3noz",
    "mlp_ratio": 4.0,
    "mlp_act_layer": "gelu",
    "mlp_drop_rate": 0.0,
    "drop_path_rate": 0.2,
    "patch_norm": True,
    "norm_layer": "ln",
    "downsample_version": "v3",
    "patchembed_version": "v2",
    "gmlp": False,
    "use_checkpoint": False,
}
_PAIR: Mapping[str, tuple[int, ...]] = {"pre_data": (1, 3, 256, 256), "post_data": (1, 3, 256, 256)}
_VMAMBA = ("einops", "timm", "fvcore")
_MMCV = ("einops", "mmcv<1.9")


def _plain_mamba(folder: Path) -> Any:
    module = importlib.import_module("mmcls.plain_mamba_dev.models.plain_mamba.plain_mamba")
    return module.PlainMamba(arch="L1", drop_path_rate=0.0)


MODELS: dict[str, PublicModel] = {
    "vmamba_tiny_s1l8": PublicModel(
        ("VMamba",), _call("vmamba", "vmamba_tiny_s1l8"), ("classification/models",), needs=_VMAMBA
    ),
    "vmamba_tiny_s1l8_channel_last": PublicModel(
        ("VMamba",),
        _call("vmamba", "vmamba_tiny_s1l8", channel_first=False),
        ("classification/models",),
        needs=_VMAMBA,
    ),
    "vmamba_single_file": PublicModel(
        ("VMamba",), _call("vmamba", "vmamba_tiny_s1l8"), (".",), needs=_VMAMBA, note="the file for users"
    ),
    "vmamba_tiny_v0": PublicModel(
        ("VMamba",), _call("vmamba", "vanilla_vmamba_tiny"), ("classification/models",), needs=_VMAMBA
    ),
    "vmamba_cascade": PublicModel(
        ("VMamba",),
        _call("vmamba", "VSSM", **{**_VMAMBA_V05, "forward_type": "v052dc_noz"}),
        ("classification/models",),
        needs=_VMAMBA,
    ),
    "vmamba_backbone": PublicModel(
        ("VMamba",),
        _call("vmamba", "Backbone_VSSM", **_VMAMBA_V05),
        ("classification/models",),
        needs=_VMAMBA,
        note="four feature maps",
    ),
    "medmamba_t": PublicModel(
        ("MedMamba",),
        _call("MedMamba", "VSSM", depths=[2, 2, 4, 2], dims=[96, 192, 384, 768], num_classes=6),
        needs=("einops", "timm"),
        note="its module runs three models on a GPU when it is imported",
    ),
    "vm_unet": PublicModel(
        ("VM-UNet",), _call("models.vmunet.vmunet", "VMUNet"), inputs={"x": (1, 3, 256, 256)}
    ),
    "mamba_unet": PublicModel(
        ("Mamba-UNet",),
        _call("networks.mamba_sys", "VSSM", in_chans=1, num_classes=4),
        ("code",),
        inputs={"x": (1, 1, 224, 224)},
    ),
    "mambair_light": PublicModel(
        ("MambaIR",),
        _call(
            "basicsr.archs.mambair_arch",
            "MambaIR",
            upscale=2,
            img_size=64,
            embed_dim=60,
            d_state=10,
            depths=(6, 6, 6, 6),
            mlp_ratio=1.2,
            upsampler="pixelshuffledirect",
        ),
        inputs={"x": (1, 3, 64, 64)},
        hollow=("basicsr", "basicsr.archs"),
        needs=("einops", "timm", "opencv-python-headless"),
    ),
    "mambairv2_light": PublicModel(
        ("MambaIR",),
        _call("basicsr.archs.mambairv2light_arch", "MambaIRv2Light", upscale=2, img_size=64),
        inputs={"x": (1, 3, 64, 64)},
        hollow=("basicsr", "basicsr.archs"),
        needs=("einops", "timm", "opencv-python-headless"),
        note="its output is random, also in eval mode",
    ),
    "plainmamba_l1": PublicModel(
        ("PlainMamba",),
        _plain_mamba,
        needs=_MMCV,
        hollow=("mmcls.models", "mmcls.models.backbones"),
        any_size=False,
    ),
    "vim_tiny": PublicModel(
        ("Vim",),
        _call(
            "models_mamba",
            "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
        ),
        ("vim", "mamba-1p1p1"),
        any_size=False,
        note="with the repository's own mamba_ssm",
    ),
    "vim_tiny_stand_in": PublicModel(
        ("Vim",),
        _call(
            "models_mamba",
            "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
        ),
        ("vim",),
        any_size=False,
        note="without any mamba_ssm",
    ),
    "local_vssm_tiny": PublicModel(
        ("LocalMamba",),
        _call("lib.models.local_vmamba", "local_vssm_tiny"),
        ("classification",),
        needs=_VMAMBA,
        hollow=("lib.models",),
    ),
    "local_vim_tiny": PublicModel(
        ("LocalMamba",),
        _call("lib.models.local_vim", "local_vim_tiny"),
        ("classification", "mamba-1p1p1"),
        hollow=("lib.models",),
        any_size=False,
    ),
    "efficientvmamba_t": PublicModel(
        ("EfficientVMamba",),
        _call(
            "models.vmamba_efficient",
            "EfficientVSSM",
            depths=[2, 2, 4, 2],
            dims=48,
            d_state=16,
            dt_rank="auto",
            ssm_ratio=2.0,
            mlp_ratio=0.0,
            downsample_version="v1",
            window_size=2,
        ),
        ("classification",),
        needs=_VMAMBA,
        hollow=("lib.models", "models"),
    ),
    "changemamba_bcd": PublicModel(
        ("MambaCD", "ChangeMamba"),
        _call("MambaCD.changedetection.models.MambaBCD", "STMambaBCD", pretrained=None, **_CHANGE),
        ("..",),
        inputs=_PAIR,
        needs=_VMAMBA,
        note="two images, one encoder",
    ),
    "changemamba_scd": PublicModel(
        ("MambaCD", "ChangeMamba"),
        _call(
            "MambaCD.changedetection.models.STMambaSCD",
            "STMambaSCD",
            pretrained=None,
            output_cd=2,
            output_clf=7,
            **_CHANGE,
        ),
        ("..",),
        inputs=_PAIR,
        needs=_VMAMBA,
    ),
}
