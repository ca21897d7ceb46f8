"""Streams of examples. A stream replaces data that do not fit on the device, which then holds only a few parts at a time.

Worker processes decode the examples in the order of training, and the parts are sent to the device ahead of their use.

Axes: M examples in a part of a batch, H × W pixels, C channels.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import multiprocessing
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int32, PyTree, UInt8

from jaxbatch.data import images
from jaxbatch.machine.cores import num_cores
from jaxbatch.states import check_integers

_CHUNK = 32  # images that a worker gets at a time
_DIGESTED_BYTES, _DIGESTED_EXAMPLES, _DIGESTED_IMAGES = 2**28, 4096, 64


@runtime_checkable
class Stream(Protocol):
    """The interface of a stream, which replaces a task's arrays where they do not fit on the device."""

    num_examples: int
    example: PyTree  # ShapeDtypeStruct of one example

    def parts(self, indices: Iterable[Int[np.ndarray, "M"]], seed_epoch: tuple[int, int]) -> Iterator[PyTree]:
        """The examples of each part in order, leaves ``(M, ...)`` on the host; ``seed_epoch`` is (seed, epoch)."""
        ...


class ArrayStream:
    """A :class:`Stream` of arrays that stay on the host, in memory or in a file (``numpy.memmap``).

    The device holds a few parts of a batch at a time, so the arrays may be larger than its memory, and those in a file larger
    than the host's.

    Args:
        arrays: a pytree of arrays ``(N, ...)``. NumPy's are not copied.

    Raises:
        ValueError: there is no array, or the leaves disagree on N; from ``parts``: an integer does not fit into the device's type.

    Example:
        >>> stream = ArrayStream((np.arange(6.0).reshape(3, 2), np.array([7, 8, 9])))
        >>> [labels.tolist() for _, labels in stream.parts([np.array([2, 0]), np.array([1])])]
        [[9, 7], [8]]
        >>> stream.num_examples, stream.example[0]
        (3, ShapeDtypeStruct(shape=(2,), dtype=float32))
    """

    def __init__(self, arrays: PyTree):
        self.arrays = jax.tree.map(np.asanyarray, arrays)  # memory maps stay what they are
        lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(self.arrays)}
        if len(lengths) != 1 or () in lengths:
            shapes = [leaf.shape for leaf in jax.tree.leaves(self.arrays)]
            raise ValueError(f"arrays have the shapes {shapes}: give at least one array, and all with the same number of examples first.")
        ((self.num_examples,),) = lengths
        as_on_device = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], jax.dtypes.canonicalize_dtype(leaf.dtype))
        self.example = jax.tree.map(as_on_device, self.arrays)

    def parts(self, indices: Iterable[Int[np.ndarray, "_"]], seed_epoch: tuple[int, int] = (0, 0)) -> Iterator[PyTree]:
        """The examples of each part in order; nothing depends on ``seed_epoch``."""
        for part in indices:
            taken = jax.tree.map(lambda leaf, part=part: leaf[part], self.arrays)
            check_integers(taken, "arrays")
            yield jax.tree.map(lambda leaf, example: np.asarray(leaf, example.dtype), taken, self.example)

    @property
    def fingerprint(self) -> str:
        """A digest of the arrays, by which a checkpoint tells other data; of arrays above 256 MiB, of 4,096 examples all over them."""
        digest = hashlib.blake2b(str(jax.tree.structure(self.arrays)).encode(), digest_size=16)
        for leaf in jax.tree.leaves(self.arrays):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            count = min(self.num_examples, self.num_examples if leaf.nbytes <= _DIGESTED_BYTES else _DIGESTED_EXAMPLES)
            for rows in np.array_split(np.linspace(0, self.num_examples - 1, count).astype(int), max(1, count // _DIGESTED_EXAMPLES)):
                digest.update(np.ascontiguousarray(leaf[rows]).tobytes())
        return digest.hexdigest()


class Decoders:
    """Worker processes that decode and crop images, in order and a bounded number of chunks ahead.

    Args:
        works: the kinds of work that the workers can do, each ``(source, image_size, augment)``.
        num_workers: processes; 0 decodes in the calling thread, ``None`` takes as many as there are cores. They start with the
            first chunk and end with ``close``. Each process imports the library and the main script, so the script must keep
            its start under ``if __name__ == "__main__":``.
        ahead: the most chunks in work or ready at a time; ``None``: two for each worker.

    Raises:
        ValueError: ``num_workers`` is below 0 or ``ahead`` below 1; from ``in_order``: an image cannot be decoded (the message
            names it).
    """

    def __init__(self, works: tuple[tuple, ...], *, num_workers: int | None = None, ahead: int | None = None):
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must be at least 0.")
        if ahead is not None and ahead < 1:
            raise ValueError(f"ahead={ahead} chunks must be at least 1.")
        self.num_workers = num_cores() if num_workers is None else num_workers
        self.works, self._ahead = works, ahead or max(1, 2 * self.num_workers)
        self._pool: concurrent.futures.Executor | None = None

    def in_order(self, which: int, chunks: Iterable[np.ndarray], seed_epoch: tuple[int, int]) -> Generator[tuple]:
        """Decodes chunks with work number ``which``."""
        if self.num_workers == 0:
            yield from (_decode(self.works[which], chunk, seed_epoch) for chunk in chunks)
            return
        if self._pool is None:
            # "spawn" and not "fork": a forked copy of a process in which JAX has started threads can hang.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.num_workers, context, _give_works, (self.works,))
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for chunk in chunks:
                pending.append(self._pool.submit(_decode_given, which, chunk, seed_epoch))
                if len(pending) >= self._ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Ends the worker processes; the next chunk starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class ImageStream:
    """A :class:`Stream` of images and labels of one split.

    The crop of an image in an epoch is a function of (seed, epoch, number of the example). It does not depend on the batch
    size, the number of workers, or the place from which a run was resumed. Memory is bounded by one part and the chunks that
    the decoders work on or have ready.

    Args:
        decoders: the worker processes.
        which: the number of the work, as in the decoders' ``works``.
        num_examples: images in the split.
        image_size: pixels each way.
    """

    def __init__(self, decoders: Decoders, which: int, num_examples: int, image_size: int):
        self.decoders, self._which, self.num_examples = decoders, which, num_examples
        pixels = jax.ShapeDtypeStruct((image_size, image_size, 3), jnp.uint8)
        self.example = (pixels, jax.ShapeDtypeStruct((), jnp.int32))

    @property
    def fingerprint(self) -> str:
        """A digest of their number and of 64 images all over them, as they are stored, by which a checkpoint tells other data."""
        source, image_size, augment = self.decoders.works[self._which]
        digest = hashlib.blake2b(f"{self.num_examples} {image_size} {augment}".encode(), digest_size=16)
        for index in np.linspace(0, self.num_examples - 1, min(self.num_examples, _DIGESTED_IMAGES)).astype(int).tolist():
            blob, label = source.read(index)
            digest.update(blob + str(label).encode())
        return digest.hexdigest()

    def parts(
        self, indices: Iterable[Int[np.ndarray, "M"]], seed_epoch: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[UInt8[np.ndarray, "M H W C"], Int32[np.ndarray, "M"]]]:
        """Images and labels of each part, in order; ``seed_epoch`` is (seed, epoch)."""
        lengths: collections.deque[int] = collections.deque()

        def chunks():
            for part in indices:
                pieces = [part[start : start + _CHUNK] for start in range(0, len(part), _CHUNK)]
                lengths.append(len(pieces))
                yield from pieces

        decoded = self.decoders.in_order(self._which, chunks(), seed_epoch)
        with contextlib.closing(decoded):
            while first := list(itertools.islice(decoded, 1)):
                pieces = first + list(itertools.islice(decoded, lengths.popleft() - 1))
                images, labels = (np.concatenate(leaves) for leaves in zip(*pieces, strict=True))
                yield images, labels


def image_streams(
    dataset: images.ImageDataset, *, image_size: int = 224, num_workers: int | None = None, ahead: int | None = None
) -> tuple[ImageStream, ImageStream]:
    """Streams of the training images (random crops) and test images (centre crops), both from the same worker processes.

    Args:
        dataset: from :func:`jaxbatch.open_images`.
        image_size: pixels each way of the crops that the model sees.
        num_workers, ahead: see :class:`Decoders`.

    Raises:
        ValueError: ``image_size`` is below 1.
    """
    if image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1 pixel.")
    works = ((dataset.train, image_size, True), (dataset.test, image_size, False))
    decoders = Decoders(works, num_workers=num_workers, ahead=ahead)
    sizes = (dataset.num_train, dataset.num_test)
    train, test = (ImageStream(decoders, which, count, image_size) for which, count in enumerate(sizes))
    return train, test


def is_stream(data: Any) -> bool:
    """Whether a task's data are a :class:`Stream` rather than arrays on the device."""
    return isinstance(data, Stream)


_given: tuple = ()  # in a worker process: the works that it can do


def _give_works(works: tuple) -> None:
    global _given
    _given = works


def _decode_given(which: int, chunk, seed_epoch):
    return _decode(_given[which], chunk, seed_epoch)


def _decode(work: tuple, chunk: Int[np.ndarray, "M"], seed_epoch: tuple[int, int]) -> tuple[UInt8[np.ndarray, "M H W C"], Int32[np.ndarray, "M"]]:
    source, image_size, augment = work
    pixels, labels = np.empty((len(chunk), image_size, image_size, 3), np.uint8), np.empty(len(chunk), np.int32)
    for row, index in enumerate(chunk):
        blob, labels[row] = source.read(int(index))
        try:
            if augment:
                random = np.random.default_rng([*seed_epoch, int(index)])
                pixels[row] = images.random_crop(blob, image_size, random)
            else:
                pixels[row] = images.centre_crop(blob, image_size)
        except (OSError, SyntaxError) as error:  # Pillow raises these on damaged files
            raise ValueError(f"{source.name_of(int(index))} cannot be decoded ({error}). Replace or remove it.") from error
    return pixels, labels
