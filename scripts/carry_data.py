"""Packs CIFAR into a few small files for a machine that only little can be sent to at a time, and unpacks them there.

    python scripts/carry_data.py pack --dataset cifar10 --data-dir DATA --parts-dir PARTS       cifar10_1of2.npz, cifar10_2of2.npz
    python scripts/carry_data.py unpack --dataset cifar10 --data-dir DATA --parts-dir PARTS     the official files, whatever parts there are

Images are compressed without loss, as one large image for each official file (WebP), to about 0.6 of their size. What is unpacked has the
published checksums.
"""

import dataclasses
import io
import pathlib
from typing import Literal

import numpy as np
import tyro

import experiments  # noqa: F401 (loads JAX without a message)
from experiments.harness.command_line import one_line_errors
from jaxbatch.data.official import verify
from jaxbatch.data.published import CIFAR

SIDE, ACROSS = 32, 100  # pixels of an image, images in a row of the large one


@dataclasses.dataclass(frozen=True)
class Config:
    """What to do, and where."""

    action: tyro.conf.Positional[Literal["pack", "unpack"]]
    """pack or unpack."""
    data_dir: pathlib.Path
    """Folder that holds, or gets, the folder of the official binary files."""
    parts_dir: pathlib.Path
    """Folder that gets, or holds, the parts."""
    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """Data set."""
    parts: int = 2
    """Number of parts to pack into."""


def to_webp(pixels: np.ndarray) -> bytes:
    """Images (N, 3, 32, 32) as one, side by side."""
    from PIL import Image

    rows = -(-len(pixels) // ACROSS)
    full = np.zeros((rows * ACROSS, 3, SIDE, SIDE), np.uint8)
    full[: len(pixels)] = pixels
    large = full.reshape(rows, ACROSS, 3, SIDE, SIDE).transpose(0, 3, 1, 4, 2).reshape(rows * SIDE, ACROSS * SIDE, 3)
    file = io.BytesIO()
    Image.fromarray(large).save(file, "WEBP", lossless=True, quality=50, method=4)
    return file.getvalue()


def from_webp(blob: bytes, count: int) -> np.ndarray:
    """The images that :func:`to_webp` has made one of."""
    from PIL import Image

    large = np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))
    rows = large.shape[0] // SIDE
    return large.reshape(rows, SIDE, ACROSS, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)[:count]


def pack(config: Config) -> list[pathlib.Path]:
    """Writes the parts; each holds some of the official files."""
    version = CIFAR[config.dataset][0]
    files, written = list(version.files), []
    config.parts_dir.mkdir(parents=True, exist_ok=True)
    for number, names in enumerate(np.array_split(np.array(files), config.parts), 1):
        kept = {}
        for name in names.tolist():
            blob = (config.data_dir / version.folder / name).read_bytes()
            verify(blob, version.files[name], f"{config.dataset}: {config.data_dir / version.folder / name}")
            rows = np.frombuffer(blob, np.uint8).reshape(-1, _row(config.dataset))
            labels, pixels = rows[:, : -3 * SIDE**2], rows[:, -3 * SIDE**2 :]
            kept |= {f"{name} labels": labels, f"{name} images": np.frombuffer(to_webp(pixels.reshape(-1, 3, SIDE, SIDE)), np.uint8)}
        path = config.parts_dir / f"{config.dataset}_{number}of{config.parts}.npz"
        np.savez(path, **kept)
        written.append(path)
    return written


def unpack(config: Config) -> list[pathlib.Path]:
    """Writes the official files of all parts that are there, and returns those that are there now."""
    version = CIFAR[config.dataset][0]
    folder = config.data_dir / version.folder
    parts = sorted(config.parts_dir.glob(f"{config.dataset}_*of*.npz"))
    if not parts:
        raise ValueError(f"--parts-dir {config.parts_dir} holds no {config.dataset}_*.npz. Pack them first.")
    folder.mkdir(parents=True, exist_ok=True)
    for path in parts:
        with np.load(path) as kept:
            for name in (name.removesuffix(" labels") for name in kept.files if name.endswith(" labels")):
                if (folder / name).exists():
                    continue
                labels = kept[f"{name} labels"]
                pixels = from_webp(kept[f"{name} images"].tobytes(), len(labels))
                blob = np.concatenate([labels, pixels.reshape(len(labels), -1)], axis=1).tobytes()
                verify(blob, version.files[name], f"{config.dataset}: {path}")
                (folder / f"{name}.part").write_bytes(blob)
                (folder / f"{name}.part").replace(folder / name)
    return [folder / name for name in version.files if (folder / name).exists()]


def _row(dataset: str) -> int:
    """Bytes of an example."""
    return (1 if dataset == "cifar10" else 2) + 3 * SIDE**2


if __name__ == "__main__":
    options = tyro.cli(Config, description=__doc__)
    with one_line_errors():
        for path in (pack if options.action == "pack" else unpack)(options):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
