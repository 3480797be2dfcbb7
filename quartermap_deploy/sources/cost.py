"""How much a source model computes, block by block: positions that its scans walk, and multiply-accumulates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from quartermap_deploy.complexity import measure
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.sources.architectures import ArchitectureSource
from quartermap_deploy.sources.discovery import ScanSite
from quartermap_deploy.sources.modules import ModuleSource
from quartermap_deploy.sources.source_model import SourceModel, Traced


@dataclass(frozen=True)
class BlockCost:
    """What one block computes for one entry of a batch, before and after pruning.

    Attributes:
        index: number of the block.
        stage: number of its stage.
        path: path of its module.
        pruned: whether the plan prunes it.
        map_size: (height, width) of the map that its scan is of; a sequence lies in a map of one row.
        scanned_size: the same after pruning.
        tokens: positions that its scans walk, over all directions and calls.
        tokens_unpruned: the same before pruning.
        flops: multiply-accumulates.
        flops_unpruned: the same before pruning.
    """

    index: int
    stage: int
    path: str
    pruned: bool
    map_size: tuple[int, int]
    scanned_size: tuple[int, int]
    tokens: int
    tokens_unpruned: int
    flops: int
    flops_unpruned: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "map_size": list(self.map_size), "scanned_size": list(self.scanned_size)}


@dataclass(frozen=True)
class Cost:
    """What a source model computes for one entry of a batch.

    Attributes:
        parameters: how many it has.
        blocks: its blocks.
        other_flops: multiply-accumulates outside the blocks.
    """

    parameters: int
    blocks: tuple[BlockCost, ...]
    other_flops: int

    def totals(self) -> dict[str, int]:
        """The sums over the model, as a manifest has them."""
        return {
            "tokens": sum(block.tokens for block in self.blocks),
            "tokens_unpruned": sum(block.tokens_unpruned for block in self.blocks),
            "flops": self.other_flops + sum(block.flops for block in self.blocks),
            "flops_unpruned": self.other_flops + sum(block.flops_unpruned for block in self.blocks),
        }


def cost_of(source: SourceModel, plan: QuarterMap | None, traced: Traced) -> Cost:
    """Count what a source model computes for one entry of a batch, pruned by a plan.

    A block of our own models is counted in its canonical form. Of a foreign module a plan takes the positions that the
    scans walk and the operations of the scans themselves; what projections save in the graph is not counted.
    """
    if isinstance(source, ArchitectureSource):
        return _architecture_cost(source, plan)
    assert isinstance(source, ModuleSource)
    return _module_cost(source, plan, traced)


def _architecture_cost(source: ArchitectureSource, plan: QuarterMap | None) -> Cost:
    from quartermap_deploy.pruning.reference import prune

    before = measure(source.module, source.size)
    after = before if plan is None else measure(prune(source.module, plan), source.size)
    blocks = tuple(
        BlockCost(
            index=new.index,
            stage=new.stage,
            path=new.path,
            pruned=new.pruned,
            map_size=new.map_size,
            scanned_size=new.scanned_size,
            tokens=new.tokens,
            tokens_unpruned=old.tokens,
            flops=new.flops,
            flops_unpruned=old.flops,
        )
        for old, new in zip(before.blocks, after.blocks, strict=True)
    )
    return Cost(before.parameters, blocks, before.other_flops)


def _module_cost(source: ModuleSource, plan: QuarterMap | None, traced: Traced) -> Cost:
    selected = source.selected(plan)
    total, by_path = _layer_flops(source)
    blocks = []
    for block in source.blocks:
        sites = [site for site in source.discovery.sites if site.block == block.index]
        layers = by_path.get(block.path, 0)
        pruned = block.index in selected
        whole, kept = _walked(sites, traced, None), _walked(sites, traced, plan if pruned else None)
        order = traced.orders.get(sites[0].name)
        size = (1, sites[0].length) if order is None else (order.height, order.width)
        small = size
        if pruned and plan is not None and order is not None:
            small = (plan.subsample.kept_size(size[0]), plan.subsample.kept_size(size[1]))
        blocks.append(
            BlockCost(
                index=block.index,
                stage=block.stage,
                path=block.path,
                pruned=pruned,
                map_size=size,
                scanned_size=small,
                tokens=sum(steps * site.groups for site, steps in kept),
                tokens_unpruned=sum(steps * site.groups for site, steps in whole),
                flops=layers + sum(_scan_flops(site, steps) for site, steps in kept),
                flops_unpruned=layers + sum(_scan_flops(site, steps) for site, steps in whole),
            )
        )
    parameters = sum(parameter.numel() for parameter in source.module.parameters())
    inside = sum(by_path.get(block.path, 0) for block in source.blocks)
    return Cost(parameters, tuple(blocks), max(0, total - inside))


def _walked(sites: list[ScanSite], traced: Traced, plan: QuarterMap | None) -> list[tuple[ScanSite, int]]:
    """The steps of each scan, those outside a map among them."""
    found = []
    for site in sites:
        order = traced.orders.get(site.name)
        steps = site.length
        if plan is not None and order is not None:
            kept = plan.subsample.kept_size(order.height) * plan.subsample.kept_size(order.width)
            steps = kept + site.length - order.height * order.width
        found.append((site, steps))
    return found


def _scan_flops(site: ScanSite, steps: int) -> int:
    """Operations of a scan, as `complexity` counts them."""
    return 9 * steps * site.channels * site.d_state + steps * site.channels


def _layer_flops(source: ModuleSource) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of products and convolutions for one entry of a batch: of all, and by module path."""
    from torch.utils.flop_counter import FlopCounterMode

    feeds = source.feeds()
    entries = len(next(iter(feeds.values()))) if source.dynamic_batch else 1
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), source.running(), counter:
        source.signature.call(source.module, feeds)
    root = type(source.module).__name__
    counts = {
        name.removeprefix(root).lstrip("."): sum(by_operator.values()) // 2 // entries
        for name, by_operator in counter.get_flop_counts().items()
    }
    return counts.get("Global", counter.get_total_flops() // 2 // entries), counts
