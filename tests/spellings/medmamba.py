"""As MedMamba: imports that may fail, the scan as an attribute, a convolutional branch and a channel shuffle."""

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
except:
    pass

try:
    from selective_scan import selective_scan_fn as selective_scan_fn_v1
    from selective_scan import selective_scan_ref as selective_scan_ref_v1
except:
    pass


class SS2D(nn.Module):
    def __init__(self, d_model, d_state=4, d_conv=3, expand=2, rank=1, version=0):
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank = expand * d_model, d_state, rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv2d = nn.Conv2d(
            self.d_inner, self.d_inner, d_conv, padding=(d_conv - 1) // 2, groups=self.d_inner
        )
        self.x_proj_weight = nn.Parameter(torch.zeros(4, rank + 2 * d_state, self.d_inner))
        self.dt_projs_weight = nn.Parameter(torch.zeros(4, self.d_inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.zeros(4, self.d_inner))
        self.A_logs = nn.Parameter(torch.zeros(4 * self.d_inner, d_state))
        self.Ds = nn.Parameter(torch.ones(4 * self.d_inner))
        self.version = version
        self.out_norm = nn.LayerNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward_core(self, x):
        # Assigned while the model runs, as the public code does.
        self.selective_scan = selective_scan_fn if self.version == 0 else selective_scan_fn_v1
        b, _, h, w = x.shape
        length = h * w
        hw = x.view(b, -1, length)
        wh = x.transpose(2, 3).contiguous().view(b, -1, length)
        x_hwwh = torch.stack([hw, wh], dim=1)
        xs = torch.cat([x_hwwh, torch.flip(x_hwwh, dims=[-1])], dim=1)
        x_dbl = torch.einsum("bkdl,kcd->bkcl", xs.view(b, 4, -1, length), self.x_proj_weight)
        dts, Bs, Cs = torch.split(x_dbl, [self.dt_rank, self.d_state, self.d_state], dim=2)
        dts = torch.einsum("bkrl,kdr->bkdl", dts.view(b, 4, -1, length), self.dt_projs_weight)
        out_y = self.selective_scan(
            xs.float().view(b, -1, length),
            dts.contiguous().float().view(b, -1, length),
            -torch.exp(self.A_logs.float()).view(-1, self.d_state),
            Bs.float().view(b, 4, -1, length),
            Cs.float().view(b, 4, -1, length),
            self.Ds.float().view(-1),
            delta_bias=self.dt_projs_bias.float().view(-1),
            delta_softplus=True,
        ).view(b, 4, -1, length)
        inv_y = torch.flip(out_y[:, 2:4], dims=[-1]).view(b, 2, -1, length)
        wh_y = out_y[:, 1].view(b, -1, w, h).transpose(2, 3).contiguous().view(b, -1, length)
        invwh_y = inv_y[:, 1].view(b, -1, w, h).transpose(2, 3).contiguous().view(b, -1, length)
        return out_y[:, 0], inv_y[:, 0], wh_y, invwh_y

    def forward(self, x):
        b, h, w, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        y1, y2, y3, y4 = self.forward_core(x)
        y = (y1 + y2 + y3 + y4).transpose(1, 2).contiguous().view(b, h, w, -1)
        return self.out_proj(self.out_norm(y) * F.silu(z))


def channel_shuffle(x, groups):
    b, h, w, c = x.size()
    return x.view(b, h, w, groups, c // groups).transpose(3, 4).contiguous().view(b, h, w, -1)


class ConvAndScan(nn.Module):
    def __init__(self, dim, version):
        super().__init__()
        half = dim // 2
        self.ln_1, self.self_attention = nn.LayerNorm(half), SS2D(half, version=version)
        self.conv = nn.Sequential(
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 3, padding=1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 1),
            nn.ReLU(),
        )

    def forward(self, inputs):
        left, right = inputs.chunk(2, dim=-1)
        right = self.self_attention(self.ln_1(right))
        left = self.conv(left.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1).contiguous()
        return inputs + channel_shuffle(torch.cat((left, right), dim=-1), groups=2)


class MedClassifier(nn.Module):
    def __init__(self, dim=16, classes=4):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, stride=2)
        self.layers = nn.ModuleList([ConvAndScan(dim, version) for version in (0, 1)])
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1)
        return self.head(torch.flatten(x, start_dim=1))
