"""Files of images: which ones are, by their names, and those in a folder."""

from __future__ import annotations

from pathlib import Path

from quartermap_deploy.errors import InputError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder and the folders in it, in the order of their names.

    Raises:
        InputError: if there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(
            f"the folder {folder} holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return files
