"""Small modules with selective scans for every task: words, masks, images, probabilities, feature maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toy_modules import WIDTH, MapMixer, SequenceMixer


class Words(nn.Module):
    """Whole numbers and truth values in; scores and whole numbers out, the latter of one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mixer = nn.Embedding(16, WIDTH), SequenceMixer()
        self.to_scores = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """(batch, L) of int64, (batch, L) of bool → scores (batch, 5), best (batch,)."""
        y = self.mixer(self.embed(tokens) * keep[..., None])
        scores = self.to_scores(y.mean(1))
        return {"scores": scores, "best": scores.argmax(1)}


class Segmenter(nn.Module):
    """Images (batch, 3, H, W) → logits of each class, or probabilities, (batch, classes, H/2, W/2)."""

    def __init__(self, classes: int = 4, sigmoid: bool = False) -> None:
        super().__init__()
        self.stem, self.mixer = nn.Conv2d(3, WIDTH, 4, 2, 1), MapMixer()
        self.head, self.sigmoid = nn.Conv2d(WIDTH, classes, 1), sigmoid

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mixer(self.stem(x)))
        return logits.sigmoid() if self.sigmoid else logits


class Restorer(nn.Module):
    """Grey images (batch, 1, H, W) of sizes that are multiples of 4 → the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixer, self.head = nn.Conv2d(1, WIDTH, 4, 4), MapMixer(), nn.Conv2d(WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError("height and width must be multiples of 4")
        y = self.head(self.mixer(self.stem(x)))
        return x + 0.1 * torch.tanh(y.repeat_interleave(4, 2).repeat_interleave(4, 3))


class Judge(nn.Module):
    """Images with alpha, (batch, 4, H, W) → probabilities (batch, 3), by a softmax of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixer, self.head = nn.Conv2d(4, WIDTH, 4, 4), MapMixer(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mixer(self.stem(x)).mean((2, 3)))
        return logits.softmax(1)


class Pooled(nn.Module):
    """Images (batch, 3, H, W) → features (batch, WIDTH, H/4, W/4), and a number that belongs to no image by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixer = nn.Conv2d(3, WIDTH, 4, 4), MapMixer()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.mixer(self.stem(x))
        return {"features": y, "total": y.sum()}
