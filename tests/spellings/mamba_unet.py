"""As Mamba-UNet, with the reference scan, a loop over positions; columns come first, and maps are (width, height)."""

import torch
import torch.nn.functional as F
from torch import nn


def selective_scan_ref(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """One position after the other; unrolled, it would be hundreds of nodes."""
    if delta_bias is not None:
        delta = delta + delta_bias[..., None].float()
    if delta_softplus:
        delta = F.softplus(delta)
    per_group = u.shape[1] // B.shape[1]
    B, C = (matrix.repeat_interleave(per_group, dim=1) for matrix in (B, C))
    state = torch.zeros(u.shape[0], u.shape[1], A.shape[1])
    ys = []
    for position in range(u.shape[2]):
        step = delta[:, :, position, None]
        state = torch.exp(step * A) * state + step * B[..., position] * u[:, :, position, None]
        ys.append((state * C[..., position]).sum(-1))
    y = torch.stack(ys, dim=2)
    y = y if D is None else y + u * D[:, None]
    y = y if z is None else y * F.silu(z)
    return (y, state) if return_last_state else y


class SS2D(nn.Module):
    def __init__(self, dim, states=4, rank=2):
        super().__init__()
        self.states, self.rank = states, rank
        self.selective_scan = selective_scan_ref
        self.in_proj = nn.Conv2d(dim, dim, 1)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        # One projection for all four directions, which differ in their steps and states alone.
        self.x_proj = nn.Conv1d(4 * dim, 4 * (rank + 2 * states), 1, groups=4, bias=False)
        self.dt_proj = nn.Conv1d(4 * rank, 4 * dim, 1, groups=4)
        self.A_log = nn.Parameter(torch.zeros(4 * dim, states))
        self.D = nn.Parameter(torch.ones(4 * dim))
        self.out_norm = nn.GroupNorm(1, dim)
        self.out_proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        x = F.silu(self.conv2d(self.in_proj(x)))
        b, c, h, w = x.shape
        turned = x.movedim(3, 2)
        xs = torch.stack((turned.reshape(b, c, -1), x.reshape(b, c, -1)), 1)
        xs = torch.stack((xs, xs.flip(-1)), 1).reshape(b, 4 * c, h * w)
        dts, Bs, Cs = self.x_proj(xs).reshape(b, 4, -1, h * w).split([self.rank, self.states, self.states], 2)
        dts = F.conv1d(dts.reshape(b, -1, h * w), self.dt_proj.weight, groups=4)
        y = self.selective_scan(
            xs,
            dts,
            -torch.exp(self.A_log),
            Bs,
            Cs,
            D=self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )
        there, back = y.reshape(b, 2, 2, c, h * w).unbind(1)
        columns, rows = (there + back.flip(-1)).unbind(1)
        y = rows.reshape(b, c, h, w) + columns.reshape(b, c, w, h).movedim(3, 2)
        return self.out_proj(self.out_norm(y))


class MambaSystem(nn.Module):
    def __init__(self, dim=8, classes=3):
        super().__init__()
        self.embed = nn.Conv2d(1, dim, 4, 4)
        self.encoder = nn.ModuleList([SS2D(dim), SS2D(2 * dim)])
        self.down = nn.Conv2d(dim, 2 * dim, 2, 2)
        self.neck = SS2D(2 * dim)
        self.up = nn.ConvTranspose2d(2 * dim, dim, 2, 2)
        self.concat_back = nn.Conv2d(2 * dim, dim, 1)
        self.decoder = SS2D(dim)
        self.output = nn.Conv2d(dim, 16 * classes, 1)

    def forward(self, x):
        # One channel is taken three times by the public code; here its mean stays one.
        x = self.embed(x)
        skip = x + self.encoder[0](x)
        x = self.down(skip)
        x = x + self.encoder[1](x)
        x = x + self.neck(x)
        x = self.concat_back(torch.cat([self.up(x), skip], dim=1))
        x = x + self.decoder(x)
        return F.pixel_shuffle(self.output(x), 4)
