"""Paths that a user gives, and the cache folder, which keeps files between runs."""

import os
import pathlib


def local_path(path: str | os.PathLike, name: str) -> pathlib.Path:
    """A path on this machine, with ``~`` for the user's home.

    Args:
        path: the user's text.
        name: the argument that holds it, for the error message.

    Raises:
        ValueError: the path is an address such as ``s3://bucket/folder``, or the home folder is not known.

    Example:
        >>> local_path("gs://bucket/run", "output_dir")
        Traceback (most recent call last):
        ValueError: output_dir='gs://bucket/run' is an address. Give a folder or file of this machine, as that of a mounted bucket.
    """
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"{name}={text!r} is an address. Give a folder or file of this machine, as that of a mounted bucket.")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{name}={text!r}: the home folder is not known here. Set HOME, or give the whole path.") from None


def cache_folder() -> pathlib.Path | None:
    """The user's cache folder for jaxbatch: ``$XDG_CACHE_HOME/jaxbatch``, else ``~/.cache/jaxbatch``.

    It is None if neither is known: HOME is not set, and the system does not know the user's home. No function needs a cache.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (pathlib.Path(given) if given else pathlib.Path.home() / ".cache") / "jaxbatch"
    except RuntimeError:
        return None
