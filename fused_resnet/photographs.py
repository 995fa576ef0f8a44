"""Real photographs to run networks on."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .command import CommandError

#: The photographs among the images inside scikit-image's package: nothing is downloaded.
IN_SCIKIT_IMAGE = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "camera.png",
    "motorcycle_left.png",
    "coins.png",
    "retina.jpg",
    "moon.png",
    "hubble_deep_field.jpg",
    "grass.png",
    "gravel.png",
    "brick.png",
    "ihc.png",
    "cell.png",
    "motorcycle_right.png",
)

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class Photographs(NamedTuple):
    names: list[str]
    pixels: Tensor  #: (N, 3, H, W), float32, preprocessed


def find(folder: Path | None, option: str = "--images") -> list[Path]:
    """The image files of a folder, which ``option`` named, or those of scikit-image."""
    if folder is None:
        spec = importlib.util.find_spec("skimage")
        places = list(spec.submodule_search_locations or ()) if spec else []
        found = [Path(p, "data", name) for p in places for name in IN_SCIKIT_IMAGE]
        found = [path for path in found if path.is_file()]
        if not found:
            raise CommandError("this scikit-image has no photographs inside; use --images FOLDER")
        return found
    if not folder.is_dir():
        raise CommandError(f"{option} {folder}: there is no such folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise CommandError(f"{option} {folder}: it has no images ({', '.join(SUFFIXES)})")
    return found


def load(
    folder: Path | None,
    count: int,
    preprocess: Callable[[Any], Tensor],
    option: str = "--images",
) -> Photographs:
    """Up to ``count`` photographs, each through ``preprocess``."""
    from PIL import Image, ImageOps

    names, tensors = [], []
    for path in find(folder, option)[:count]:
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise CommandError(f"{path}: cannot be read as an image: {error}") from error
        names.append(path.name)
        tensors.append(preprocess(upright))
    return Photographs(names, torch.stack(tensors))
