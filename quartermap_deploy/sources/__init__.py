"""Where models come from, and how code that is not ours runs here."""
