"""As PlainMamba: snakes through the map by lists of indices, a learnt term for the direction of each step."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.layernorm import RMSNorm


def snakes(height, width):
    """The four orders, what undoes each, and for each step whether it starts or goes right, left, up or down."""
    positions = [[row * width + column for column in range(width)] for row in range(height)]
    by_rows = [p for row, line in enumerate(positions) for p in (line if row % 2 == 0 else line[::-1])]
    turned = [list(column) for column in zip(*positions)]
    by_columns = [p for column, line in enumerate(turned) for p in (line if column % 2 == 0 else line[::-1])]
    orders = (by_rows, by_rows[::-1], by_columns, by_columns[::-1])
    moves = {1: 1, -1: 2, -width: 3, width: 4}
    inverses, steps = [], []
    for order in orders:
        inverses.append([place for _, place in sorted(zip(order, range(len(order))))])
        steps.append([0] + [moves[b - a] for a, b in zip(order, order[1:])])
    return orders, inverses, steps


class Mixer(nn.Module):
    def __init__(self, dim, states=4, rank=2):
        super().__init__()
        self.states, self.rank, self.inner = states, rank, 2 * dim
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=False)
        self.conv2d = nn.Conv2d(self.inner, self.inner, 7, padding=3, groups=self.inner)
        self.x_proj = nn.Linear(self.inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, self.inner)
        self.A_log = nn.Parameter(torch.zeros(self.inner, states))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, dim, bias=False)
        self.direction_Bs = nn.Parameter(torch.zeros(5, states))

    def forward(self, x, hw_shape):
        b, length, _ = x.shape
        height, width = hw_shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        maps = x.reshape(b, height, width, -1).permute(0, 3, 1, 2)
        x = F.silu(self.conv2d(maps)).permute(0, 2, 3, 1).reshape(b, length, -1)
        dt, B, C = torch.split(self.x_proj(x), [self.rank, self.states, self.states], dim=-1)
        # With its bias inside, and once more in the scan, as the public code has it.
        dt = self.dt_proj(dt).permute(0, 2, 1).contiguous()
        B, C = B.permute(0, 2, 1).contiguous(), C.permute(0, 2, 1).contiguous()
        ys = []
        for order, inverse, steps in zip(*snakes(height, width)):
            towards = self.direction_Bs[steps, :][None].expand(b, -1, -1).permute(0, 2, 1)
            y = selective_scan_fn(
                x[:, order, :].permute(0, 2, 1).contiguous(),
                dt,
                -torch.exp(self.A_log.float()),
                (B + towards).contiguous(),
                C,
                self.D.float(),
                z=None,
                delta_bias=self.dt_proj.bias.float(),
                delta_softplus=True,
                return_last_state=None,
            )
            ys.append(y.permute(0, 2, 1)[:, inverse, :])
        return self.out_proj(sum(ys) * F.silu(z))


class Plain(nn.Module):
    def __init__(self, dim=8, classes=4):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.norms = nn.ModuleList([RMSNorm(dim)])
        self.layers = nn.ModuleList([Mixer(dim)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch_embed(x)
        hw_shape = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x), hw_shape)
        return self.head(self.norm(x).mean(1))
