"""The cards with an eighth of the channels, so that a test can build and store every model."""

from __future__ import annotations

import dataclasses

import pytest

from quartermap_deploy.architectures import factory
from quartermap_deploy.architectures.cards import ModelCard, list_models, load_card


def small_card(name: str) -> ModelCard:
    """The card of a model, without weights."""
    card = load_card(name)
    dims = [width // 8 for width in card.architecture["dims"]]
    return dataclasses.replace(card, architecture={**card.architecture, "dims": dims}, weights=None)


@pytest.fixture
def small_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """All models are built from small cards."""
    cards = {name: small_card(name) for name in list_models()}
    monkeypatch.setattr(factory, "load_card", cards.__getitem__)
