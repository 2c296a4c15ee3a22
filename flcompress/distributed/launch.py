"""What a launcher says in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from flcompress.errors import RequestError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_NAMES = (*_NUMBERS, "MASTER_ADDR")


@dataclass(frozen=True)
class Launch:
    """One process among those that torchrun, accelerate launch or a cluster's scheduler started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """Raises RequestError where the environment is half set: such a process would train alone, and all others too.

        A launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
        """
        given = {name: os.environ[name] for name in _NAMES if name in os.environ}
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls()
        missing = [name for name in _NAMES if name not in given]
        if missing and given != {"WORLD_SIZE": "1"}:
            raise RequestError(
                f"environment: {', '.join(sorted(given))} set, but not {', '.join(missing)}; a launcher sets all of "
                "them: start with torchrun or accelerate launch, or unset them to run one process"
            )
        for name in _NUMBERS:
            if not given.get(name, "0").isdecimal():
                raise RequestError(f"environment: {name}={given[name]} given, expected a whole number")
        rank, size = int(given.get("RANK", 0)), int(given["WORLD_SIZE"])
        if rank >= size:
            raise RequestError(f"environment: RANK={rank} given with WORLD_SIZE={size}, expected a smaller RANK")
        return cls(rank, size, int(given.get("LOCAL_RANK", 0)))
