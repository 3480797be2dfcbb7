"""Small modules with selective scans, as users have them: a classifier of images, two images, a sequence.

They call the scan by this package's function, so that they run without `public_code`. Their weights come from a fixed
seed and are such that the scans matter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from quartermap_deploy import selective_scan

WIDTH, STATE, DIRECTIONS = 6, 2, 4


class MapMixer(nn.Module):
    """Scans a map in VMamba's four directions and adds them up; channel-first, (batch, WIDTH, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.project = nn.Parameter(0.5 * torch.randn(DIRECTIONS, WIDTH + 2 * STATE, WIDTH))
        self.A_log = nn.Parameter(0.3 * torch.randn(DIRECTIONS * WIDTH, STATE))
        self.D = nn.Parameter(torch.randn(DIRECTIONS * WIDTH))
        self.bias = nn.Parameter(0.3 * torch.randn(DIRECTIONS * WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, WIDTH, H, W) → the same."""
        batch, _, height, width = x.shape
        features = functional.silu(self.conv(x))
        rows, columns = features.flatten(2), features.transpose(2, 3).flatten(2)
        u = torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], dim=1)
        steps, B, C = torch.einsum("bkdl,kcd->bkcl", u, self.project).split([WIDTH, STATE, STATE], dim=2)
        y = selective_scan(
            u.flatten(1, 2),
            steps.flatten(1, 2).contiguous(),
            -torch.exp(self.A_log),
            B.contiguous(),
            C.contiguous(),
            self.D,
            delta_bias=self.bias,
            delta_softplus=True,
        ).view(batch, DIRECTIONS, WIDTH, -1)
        y = y[:, :2] + y[:, 2:].flip(-1)
        merged = y[:, 0] + y[:, 1].view(batch, WIDTH, width, height).transpose(2, 3).flatten(2)
        mixed = self.out(self.norm(merged.transpose(1, 2))).transpose(1, 2)
        return x + mixed.view(batch, WIDTH, height, width)


class SequenceMixer(nn.Module):
    """Scans a sequence, (batch, L, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH + 2 * STATE)
        self.A_log = nn.Parameter(0.3 * torch.randn(WIDTH, STATE))
        self.D = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, L, WIDTH) → the same."""
        steps, B, C = self.project(x).transpose(1, 2).split([WIDTH, STATE, STATE], dim=1)
        y = selective_scan(
            x.transpose(1, 2),
            steps.contiguous(),
            -torch.exp(self.A_log),
            B[:, None],
            C[:, None],
            self.D,
            delta_softplus=True,
        )
        return x + y.transpose(1, 2)


class Classifier(nn.Module):
    """Images (batch, channels, H, W) → logits (batch, classes)."""

    def __init__(self, classes: int = 10, channels: int = 3, depth: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(channels, WIDTH, 4, stride=4)
        self.mixers = nn.ModuleList(MapMixer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.patch(images)
        for mixer in self.mixers:
            x = mixer(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class Change(nn.Module):
    """Two images of one size → a map of what changed and one number, by a shared encoder."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.encoder = MapMixer()
        self.decoder = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """(batch, 3, H, W) twice → change (batch, 1, H/4, W/4), score (batch, 1)."""
        change = self.decoder(self.encoder(self.patch(second)) - self.encoder(self.patch(first)))
        return {"change": change, "score": change.abs().mean(dim=(2, 3))}


class Sequences(nn.Module):
    """Sequences (batch, L, WIDTH) → logits (batch, classes); nothing here is an image."""

    def __init__(self, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mixer = SequenceMixer()
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.mixer(tokens).mean(dim=1))
        return logits


def classifier_with_another_scan() -> Classifier:
    """The classifier with a time step of its second block that is another one: a fault that stands in one scan."""
    model = Classifier()
    with torch.no_grad():
        model.mixers[1].bias += 0.3  # type: ignore[operator]
    return model
