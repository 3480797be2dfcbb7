"""What a session of ONNX Runtime runs where, as the session itself says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quartermap_deploy.targets.execution import CPU, short_names

LISTED = 4
"""Operators of the CPU that a sentence names."""


@dataclass(frozen=True)
class Placement:
    """What a session of ONNX Runtime runs where.

    Attributes:
        providers: of the session, in order of preference, as ONNX Runtime spells them.
        nodes: how many nodes of the graph each provider runs, those in bodies of loops among them; None where nobody
            counted: with the CPU provider alone, or before ONNX Runtime 1.24, which does not tell.
        on_cpu: of those that run on the CPU though another provider is preferred, how many there are of each operator,
            most first.
        left_out: providers that were wanted and do not start, or take nothing of the model, each with the reason.
        passed_over: why a native library that is there, or was named, is not used, and what is in its place; None where
            nothing was passed over.
    """

    providers: tuple[str, ...]
    nodes: Mapping[str, int] | None = None
    on_cpu: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    passed_over: str | None = None

    @property
    def takes_nothing(self) -> bool:
        """Whether another provider than the CPU's is there, and the CPU has every node."""
        return self.providers[0] != CPU and bool(self.nodes) and set(self.nodes or ()) == {CPU}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "providers": list(self.providers),
            "nodes": None if self.nodes is None else dict(self.nodes),
            "on_cpu": dict(self.on_cpu),
            "left_out": dict(self.left_out),
        }

    def notes(self) -> list[str]:
        """What the user should know, in sentences: what was left out, and what the CPU runs all the same."""
        found = [] if self.passed_over is None else [self.passed_over]
        found += [
            f"{short_names([name])} is left out, so the model runs on {short_names(self.providers)}: {reason}"
            for name, reason in self.left_out.items()
        ]
        if self.providers[0] == CPU:
            return found
        preferred = short_names([name for name in self.providers if name != CPU])
        if self.nodes is None:
            return [
                *found,
                f"how much of the model {preferred} runs is not known: ONNX Runtime tells it from version 1.24 on",
            ]
        count, total = self.nodes.get(CPU, 0), sum(self.nodes.values())
        if not count:
            return found
        kinds = [f"{number} {name}" for name, number in list(self.on_cpu.items())[:LISTED]]
        further = len(self.on_cpu) - LISTED
        if further > 0:
            kinds.append(f"{further} more kinds")
        return [
            *found,
            f"{count} of {total} nodes are not taken by {preferred} and run on the CPU: {', '.join(kinds)}",
        ]

    def __str__(self) -> str:
        if self.nodes is None or len(self.nodes) < 2:
            return short_names(tuple(self.nodes or self.providers))
        return ", ".join(f"{short_names([name])} ({count} nodes)" for name, count in self.nodes.items())
