"""Starts the processes in which compilers for other devices run, and asks them. Answers are kept while this process runs."""

import atexit
import collections
import hashlib
import os
import pathlib
import pickle
import selectors
import subprocess
import sys
import tempfile

_LIMIT_SECONDS = 900  # no program of this library takes so long; a compiler that hangs must not hang a study


class CompilationError(RuntimeError):
    """A compiler refused a program for a reason other than its size, or ended, or took too long."""


class _Worker:
    """A process that compiles; ``ask`` sends it one program."""

    def __init__(self):
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_FLAGS", "TF_CPP"))}
        environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag.startswith("--xla_gpu")]
        environ |= {"XLA_FLAGS": " ".join(flags)} if flags else {}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        script = pathlib.Path(__file__).with_name("target_worker.py")
        # -P: the script's folder has modules with common names, and must not come first on the path
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environ
        )

    def ask(self, request: dict) -> dict:
        blob = pickle.dumps(request)
        try:
            self.process.stdin.write(len(blob).to_bytes(8, "little") + blob)
            self.process.stdin.flush()
            with selectors.DefaultSelector() as waiting:
                waiting.register(self.process.stdout, selectors.EVENT_READ)
                if not waiting.select(_LIMIT_SECONDS):
                    self.close()
                    raise CompilationError(f"the compiler took more than {_LIMIT_SECONDS} s and was stopped.")
            head = self.process.stdout.read(8)
        except BrokenPipeError:
            head = b""
        if len(head) < 8:
            self.log.seek(0)
            last = self.log.read().decode(errors="replace").strip().splitlines()[-3:]
            self.close()
            raise CompilationError(f"the compiler's process ended. It last said: {' '.join(last)[:500]}")
        return pickle.loads(self.process.stdout.read(int.from_bytes(head, "little")))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            file.close()


_answers: collections.OrderedDict[str, dict] = collections.OrderedDict()  # an optimizer's update, say, is the same for every batch size
_KEPT = 256


def ask_compiler(request: dict) -> dict:
    """The answer of :func:`jaxbatch.machine.target_worker.compile_program`, or its ``error``;
    an answer that was given before is given again.

    Raises:
        CompilationError: the compiler's process ended, or took too long.
    """
    key = hashlib.sha256(pickle.dumps(request)).hexdigest()
    if key in _answers:
        return _answers[key]
    answer = _ask_worker(request)
    if not answer.get("text"):  # texts are long, and are asked for once
        _answers[key] = answer
        while len(_answers) > _KEPT:
            _answers.popitem(last=False)
    return answer


_idle: list[_Worker] = []  # each thread takes one, or starts one


def _ask_worker(request: dict) -> dict:
    worker = _idle.pop() if _idle else _Worker()
    answer = worker.ask(request)
    _idle.append(worker)
    return answer


@atexit.register
def _close_workers() -> None:
    while _idle:
        _idle.pop().close()
