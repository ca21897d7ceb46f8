"""Makes batches on the host while the device works: decodes images, shifts them, and sends them to the device ahead of use.

This is for data that do not fit on the device or are compressed. Above some batch size the host limits the speed: its work
grows with every example, but the cost of a step hardly grows while the device is not full.

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

from jaxbatch.kinds import checked


def encode_png(images: UInt8[np.ndarray, "B H W C"]) -> list[bytes]:
    """Compresses each image without loss, in the way data sets are stored; C is 1 or 3.

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
    """Decodes images of one size from their PNG bytes."""
    from PIL import Image

    images = np.stack([np.asarray(Image.open(io.BytesIO(blob))) for blob in blobs])
    return images if images.ndim == 4 else images[..., None]


def shift(images: UInt8[np.ndarray, "B H W C"], offsets: Int[np.ndarray, "B 2"]) -> UInt8[np.ndarray, "B H W C"]:
    """Moves each image down and right by its own offset and fills the gap with zeros.

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
    """Copies a batch into memory of its own.

    Without the copy, the iterable that makes the batches could overwrite a batch in use: on a CPU an array on the device may
    share the host's memory, and on any device the transfer may not be complete when the same buffer is filled again.

    Example:
        >>> buffer = np.zeros(2)
        >>> mine = own(buffer)
        >>> buffer[:] = 7
        >>> mine.tolist()
        [0.0, 0.0]
    """
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)


@checked
def prefetch(batches: Iterable[Any], depth: int = 2, put: Callable[[Any], Any] = jax.device_put) -> Iterator[Any]:
    """Draws batches from a slow iterable in a background thread and sends them to the device ahead of their use.

    Args:
        batches: pytrees of arrays. Another thread draws them, in order.
        depth: the largest number of batches that are ready; it bounds the memory.
        put: moves a batch to where it is used. It gets a copy, so ``batches`` may reuse its memory.

    Yields:
        The batches, on the device. If making a batch fails, the error is raised in place of that batch. Leaving the loop early
        ends the thread.

    Raises:
        ValueError: ``depth`` below 1.

    Example:
        >>> [int(batch.sum()) for batch in prefetch(np.full(3, number) for number in range(4))]
        [0, 3, 6, 9]
    """
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
        except BaseException as error:  # every error is passed on: without it the loop would wait forever
            offer(("error", error))

    thread = threading.Thread(target=make, name="jaxbatch-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            what, item = ready.get()
            if what == "error":
                raise item
            if what == "end":
                return
            yield item
    finally:
        left.set()
        thread.join()
