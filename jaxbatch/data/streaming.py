"""Batches that are made on the host while the device works: decoded, moved about, sent ahead.

Data that do not fit on the device, or arrive compressed, take this road. Past some batch size it decides the speed:
the work on the host grows with every example, the cost of a step hardly does while the device is not full.

Axes: B examples, H × W pixels, C channels.
"""

import io
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8


def encode_png(images: UInt8[np.ndarray, "B H W C"]) -> list[bytes]:
    """Each image compressed without loss, as data sets are stored; C is 1 or 3.

    Example:
        >>> images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
        >>> bool((decode_png(encode_png(images)) == images).all())
        True
    """
    from PIL import Image

    blobs = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "png")
        blobs.append(file.getvalue())
    return blobs


def decode_png(blobs: Sequence[bytes]) -> UInt8[np.ndarray, "B H W C"]:
    """Images of one size, from their PNG bytes."""
    from PIL import Image

    images = np.stack([np.asarray(Image.open(io.BytesIO(blob))) for blob in blobs])
    return images if images.ndim == 4 else images[..., None]


def shift(images: UInt8[np.ndarray, "B H W C"], offsets: Int[np.ndarray, "B 2"]) -> UInt8[np.ndarray, "B H W C"]:
    """Each image moved down and right by its own offset, zeros where nothing was.

    Example:
        >>> shift(np.full((1, 2, 2, 1), 7, np.uint8), np.array([[1, 0]]))[0, :, :, 0].tolist()
        [[0, 0], [7, 7]]
    """
    room = int(np.abs(offsets).max(initial=0))
    padded = np.pad(images, ((0, 0), (room, room), (room, room), (0, 0)))
    moved = np.empty_like(images)
    height, width = images.shape[1:3]
    for index, (down, right) in enumerate(offsets):
        top, left = room - down, room - right
        moved[index] = padded[index, top : top + height, left : left + width]
    return moved


def own(batch: Any) -> Any:
    """A batch in memory of its own. On a CPU an array on the device may be the host's, and on any device the transfer may still
    be under way when the maker of batches fills the same buffer anew.

    Example:
        >>> buffer = np.zeros(2)
        >>> mine = own(buffer)
        >>> buffer[:] = 7
        >>> mine.tolist()
        [0.0, 0.0]
    """
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)


def prefetch(batches: Iterable[Any], depth: int = 2, put: Callable[[Any], Any] = jax.device_put) -> Iterator[Any]:
    """The batches of a slow iterable, made in a background thread and sent to the device ahead of their use.

    Args:
        batches: pytrees of arrays. Drawn in another thread, in order.
        depth: how many are ready at most; bounds the memory.
        put: moves a batch to where it is used. It is given a copy: whoever makes the batches may use their memory again.

    Yields:
        The batches, on the device. An error in making one is raised where it would have come. Leaving the
        loop early ends the thread.

    Raises:
        ValueError: ``depth`` below 1.

    Example:
        >>> [int(batch.sum()) for batch in prefetch(np.full(3, number) for number in range(4))]
        [0, 3, 6, 9]
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1.")
    ready: queue.Queue = queue.Queue(maxsize=depth)
    left = threading.Event()
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]  # a setting of the thread that asks

    def offer(item) -> bool:
        while not left.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make():
        try:
            with jax.enable_x64(x64):
                for batch in batches:
                    if not offer(("batch", put(own(batch)))):
                        return
            offer(("end", None))
        except BaseException as error:  # handed over, whatever it is: a silent thread would hang the loop
            offer(("error", error))

    thread = threading.Thread(target=make, name="jaxbatch-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            what, found = ready.get()
            if what == "error":
                raise found
            if what == "end":
                return
            yield found
    finally:
        left.set()
        thread.join()
