"""Several runs at a time, each in a thread of its own."""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Sequence


@contextlib.contextmanager
def run_in_threads(jobs: int, stopped: threading.Event):
    """What maps a function over numbered arguments and gives each result when it is there. One job needs no thread.

    After an error, such as Ctrl-C, nothing is waited for: ``stopped`` is set, by which what runs in threads may know that it is to end.

    Example:
        >>> with run_in_threads(2, threading.Event()) as map_done:
        ...     sorted(map_done(lambda number, letter: number * letter, [(1, "a"), (3, "b")]))
        [(1, 'a'), (3, 'bbb')]
    """

    def one_by_one(make: Callable, numbered: Sequence):
        for number, argument in numbered:
            yield number, make(number, argument)

    if jobs == 1:
        yield one_by_one
        return
    pool = concurrent.futures.ThreadPoolExecutor(jobs)

    def as_they_end(make: Callable, numbered: Sequence):
        begun = {pool.submit(make, number, argument): number for number, argument in numbered}
        for ended in concurrent.futures.as_completed(begun):
            yield begun[ended], ended.result()

    try:
        yield as_they_end
    except BaseException:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
