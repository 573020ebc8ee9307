"""Random number generators derived from (seed, purpose, step).

A run draws every random number from a generator made here, so that it neither reads nor writes the
global state, and a step can be repeated after a restart without replaying the steps before it.
"""

from __future__ import annotations

import hashlib
import operator

import torch

__all__ = ["generator", "seed_of"]


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an integer, got {value!r} of type {type(value).__name__}")
    return operator.index(value)


def seed_of(seed: int, purpose: str, *step: int) -> int:
    """A 63-bit seed for one purpose and step of a run.

    The first 63 bits of a SHA-256 hash: the same on every platform and with every version of
    Python and torch. Any integers do, negative ones and NumPy's included.

    Args:
        seed: the seed of the run.
        purpose: what the numbers are for, such as ``"real batch"``; not empty.
        step: any number of integers, such as the iteration and the class.

    Returns:
        An integer in ``[0, 2**63)``.

    Raises:
        TypeError: ``seed`` or a step is not an integer (a bool is not one), or ``purpose`` is not
            a string.
        ValueError: ``purpose`` is empty.
    """
    numbers = [_integer(seed, "seed")]
    numbers += [_integer(value, f"step {place}") for place, value in enumerate(step)]
    if not isinstance(purpose, str):
        raise TypeError(
            f"purpose must be a string, got {purpose!r} of type {type(purpose).__name__}"
        )
    if not purpose:
        raise ValueError("purpose must say what the random numbers are for, got an empty string")
    # The numbers come first and contain no colon, so no two different inputs share a message.
    message = ",".join(map(str, numbers)) + ":" + purpose
    return int.from_bytes(hashlib.sha256(message.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *step: int) -> torch.Generator:
    """A CPU generator for one purpose and step of a run, seeded with :func:`seed_of`.

    torch's CPU generator (Mersenne twister) uses the low 32 bits of its seed. Among the many
    generators of a long run two may therefore start alike; each one by itself is as good as any.

    Raises:
        TypeError, ValueError: as :func:`seed_of`.
    """
    return torch.Generator(device="cpu").manual_seed(seed_of(seed, purpose, *step))
