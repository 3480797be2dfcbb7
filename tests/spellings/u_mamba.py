"""As U-Mamba and its like: a convolutional network with mamba-ssm's own layer over all positions, imported late."""

import torch.nn as nn


class MambaLayer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        from mamba_ssm import Mamba

        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(d_model=dim, d_state=4, d_conv=4, expand=2)

    def forward(self, x):
        b, c = x.shape[:2]
        tokens = x.reshape(b, c, -1).transpose(-1, -2)
        return self.mamba(self.norm(tokens)).transpose(-1, -2).reshape(x.shape) + x


class UMamba(nn.Module):
    def __init__(self, dim=8, classes=2):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, dim, 3, padding=1, bias=False), nn.InstanceNorm2d(dim, affine=True), nn.LeakyReLU()
        )
        self.down = nn.Conv2d(dim, 2 * dim, 3, 2, 1)
        self.bottom, self.top = MambaLayer(2 * dim), MambaLayer(dim)
        self.up = nn.ConvTranspose2d(2 * dim, dim, 2, 2)
        self.head = nn.Conv2d(dim, classes, 1)

    def forward(self, x):
        skip = self.stem(x)
        x = self.bottom(self.down(skip))
        return self.head(self.top(self.up(x) + skip))
