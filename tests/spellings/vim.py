"""As Vision Mamba: both ways along the tokens, a class token in the middle, fused norms with residuals."""

import torch
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.utils.generation import GenerationMixin
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from torch import nn

try:
    from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
except ImportError:
    RMSNorm, layer_norm_fn, rms_norm_fn = None, None, None


class Block(nn.Module):
    def __init__(self, dim, kind):
        super().__init__()
        self.mixer = Mamba(dim, d_state=4, bimamba_type=kind, if_devide_out=kind == "v2")
        self.norm = RMSNorm(dim, eps=1e-5)

    def forward(self, hidden, residual=None):
        fused = rms_norm_fn if isinstance(self.norm, RMSNorm) else layer_norm_fn
        hidden, residual = fused(
            hidden,
            self.norm.weight,
            self.norm.bias,
            residual=residual,
            prenorm=True,
            residual_in_fp32=True,
            eps=self.norm.eps,
        )
        return self.mixer(hidden, inference_params=None), residual


class VisionMamba(nn.Module):
    def __init__(self, dim=16, tokens=(4, 6), classes=4):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens[0] * tokens[1] + 1, dim))
        self.layers = nn.ModuleList([Block(dim, "v2"), Block(dim, "v1")])
        self.norm_f = RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        token = self.cls_token.expand(x.shape[0], -1, -1)
        place = x.shape[1] // 2
        x = torch.cat((x[:, :place, :], token, x[:, place:, :]), dim=1) + self.pos_embed
        residual, hidden = None, x
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        hidden = rms_norm_fn(
            hidden,
            self.norm_f.weight,
            self.norm_f.bias,
            eps=self.norm_f.eps,
            residual=residual,
            prenorm=False,
            residual_in_fp32=True,
        )
        return self.head(hidden[:, place, :])
