"""A process that compiles programs for accelerators that are not here. :mod:`jaxbatch.machine.cross_compiling` starts it.

It is a process of its own because the compilers need ``JAX_PLATFORMS=cpu`` before JAX starts, write to standard error, and may
end the process that they run in. It reads requests from standard input and writes answers to standard output, each a pickled
dictionary after its length in 8 bytes.
"""

import os
import pickle
import time
from typing import Any


def main() -> None:
    """Answers requests until standard input ends."""
    answers, requests = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)  # what the compilers print goes where their log goes
    while head := requests.read(8):
        request = pickle.loads(requests.read(int.from_bytes(head, "little")))
        try:
            answer = compile_program(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        blob = pickle.dumps(answer)
        answers.write(len(blob).to_bytes(8, "little") + blob)
        answers.flush()


_topologies: dict = {}


def find_devices(platform: str, topology: str, count: int) -> list:
    """Devices of a topology, one for each chip."""
    from jax.experimental import topologies

    key = (platform, topology, count)
    if key not in _topologies:
        if platform == "tpu":
            topology_here = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        else:
            topology_here = topologies.get_topology_desc(platform="cuda", target_config=topology, topology=f"1x1x{count}")
        _topologies[key] = [device for device in topology_here.devices if getattr(device, "core_on_chip", 0) == 0][:count]
    return _topologies[key]


def compile_program(*, platform, topology, count, exported, donate, axis, split, x64, with_text, options) -> dict:
    """Compiles one exported program and returns what the compiler says of it."""
    import jax
    import numpy as np
    from jax import export
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    devices = find_devices(platform, topology, count)
    with jax.enable_x64(x64):
        program = export.deserialize(bytearray(exported))
        if count == 1:
            shardings: list = [SingleDeviceSharding(devices[0])] * len(split)
        else:
            mesh = Mesh(np.array(devices), (axis,))
            shardings = [NamedSharding(mesh, PartitionSpec(axis) if dealt else PartitionSpec()) for dealt in split]
        shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=where) for one, where in zip(program.in_avals, shardings)]
        started = time.perf_counter()
        lowered = jax.jit(program.call, donate_argnums=donate).lower(*shapes)
        compiled = lowered.compile(compiler_options=options or None)
        seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
    return {**sizes, "peak": memory.peak_memory_in_bytes, "seconds": seconds, "text": compiled.as_text() if with_text else ""}


if __name__ == "__main__":
    main()
