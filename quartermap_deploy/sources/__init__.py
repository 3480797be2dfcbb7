"""Where models come from: cards, and modules of the user's. Each becomes a `SourceModel`."""
