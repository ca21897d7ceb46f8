"""The memory that a compiled program needs, known before the program runs."""

from typing import Any


def program_memory(program: Any) -> int:
    """Bytes on the device that a compiled program needs while it runs: temporaries, arguments and results.

    Results that reuse the memory of donated arguments count once. Other data on the device, and the overhead of its allocator,
    need further memory.

    Args:
        program: the result of ``jax.jit(f).lower(...).compile()``.

    Raises:
        ValueError: the platform's compiler does not report the memory.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> program = jax.jit(lambda x: 2 * x).lower(jnp.zeros(1000, jnp.float32)).compile()
        >>> program_memory(program)  # 4,000 bytes in, 4,000 out
        8000
    """
    analysis = program.memory_analysis()
    if analysis is None:
        raise ValueError("the compiler of this platform does not report the memory of a program.")
    parts = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return parts - analysis.alias_size_in_bytes
