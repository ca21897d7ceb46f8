"""beartype as jaxtyping's checker, with Python's own rule that an int will do where a float is asked for.

Choices are text to it: what another text leads to is a ValueError of ours, which tests look at.
"""

from typing import Literal

from beartype import BeartypeConf, FrozenDict, beartype

CHOICES = (
    Literal["map", "vmap", "unroll"],
    Literal["scan", "python"],
    Literal["jit", "pmap"],
    Literal["map", "vmap", "threads"],
    Literal["drop", "pad"],
    Literal["linear", "sqrt", "none"],
)

check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict(dict.fromkeys(CHOICES, str))))
