"""Counter-based random numbers: a draw is a function of its key, not of what was drawn before.

So a completion does not depend on the engine, the shard, the chunk or the order in which prompts were computed, and a
resumed run draws what the undisturbed one would have drawn. The generator is Philox4x32-10.

Source: Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); the tests hold its published
known answers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WordArray = npt.NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter_N4: WordArray, key: tuple[int, int]) -> WordArray:
    """Philox4x32-10: four random words for each counter of four words under a key of two words.

    Returns uint32 `[N, 4]`.
    """
    c0, c1, c2, c3 = (counter_N4[:, column].astype(np.uint64) for column in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(
    *, seed: int, step: int, prompt_id_P: npt.NDArray[np.integer], members: int, token: int
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) for the `token`-th draw of every member of every group.

    Returns float64 `[P, members]` with 53 random bits each, keyed by (seed, step, prompt id, member, token).

    Raises:
        ValueError: a part of the key does not fit its word (seed 64 bits, the others 32).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is not in [0, 2^64)")
    ids_P = np.asarray(prompt_id_P, np.int64)
    if not 0 <= step < 2**32 or not 0 <= token < 2**32 or (len(ids_P) and not 0 <= ids_P.min() <= ids_P.max() < 2**32):
        raise ValueError("step, prompt ids and token index must be in [0, 2^32)")
    counter_PG4 = np.empty((len(ids_P), members, 4), np.uint32)
    counter_PG4[..., 0] = step
    counter_PG4[..., 1] = ids_P[:, None]
    counter_PG4[..., 2] = np.arange(members)
    counter_PG4[..., 3] = token
    words = philox(counter_PG4.reshape(-1, 4), (seed & 0xFFFFFFFF, seed >> 32))
    high, low = words[:, 0] >> np.uint32(5), words[:, 1] >> np.uint32(6)
    uniform = (high * 2.0**26 + low) * 2.0**-53
    return uniform.reshape(len(ids_P), members)
