"""The lines that another process appends to a file, as they come."""

import os
import pathlib
from collections.abc import Iterator

_CHUNK, _LONGEST = 1 << 20, 1 << 20  # bytes that are read at once; of a line without an end, what is kept


class Tail:
    """A file that grows. It need not exist yet; if it is written anew, it is read anew.

    Args:
        path: of the file.
        skip_existing: whether lines that are there already are left out.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "log")
        >>> tail = Tail(path)
        >>> list(tail.lines()), path.write_text("one" + chr(10) + "tw"), list(tail.lines()), list(tail.lines(final=True))
        ([], 6, ['one'], ['tw'])
    """

    def __init__(self, path: str | os.PathLike, skip_existing: bool = False):
        self.path = pathlib.Path(path)
        self.header = b""  # the first line, as it was when the file was last read
        self.num_bytes = 0  # that were read
        self._position, self._rest = 0, b""
        if skip_existing and self.path.exists():
            with open(self.path, "rb") as file:
                self.header = file.readline(_LONGEST)
                self._position = file.seek(0, os.SEEK_END)

    def lines(self, final: bool = False) -> Iterator[str]:
        """The lines that have come since the last call. Bytes that are no UTF-8 are replaced. A carriage return, too, ends a line.

        Args:
            final: whether nothing more will come, so that the last line may lack its end.
        """
        try:
            file = open(self.path, "rb")  # noqa: SIM115 (closed below)
        except FileNotFoundError:
            file = None
        if file is not None:
            with file:
                header, size = file.readline(_LONGEST), os.fstat(file.fileno()).st_size
                if not header.startswith(self.header) or size < self._position:  # it was written anew
                    self._position, self._rest = 0, b""
                self.header = header
                file.seek(self._position)
                while chunk := file.read(min(_CHUNK, size - self._position)):  # what comes meanwhile is for the next call
                    self._position += len(chunk)
                    self.num_bytes += len(chunk)
                    *whole, rest = (self._rest + chunk).replace(b"\r", b"\n").split(b"\n")
                    self._rest = rest[-_LONGEST:]
                    yield from (line.decode(errors="replace") for line in whole)
        if final and self._rest:
            last, self._rest = self._rest, b""
            yield last.decode(errors="replace")
