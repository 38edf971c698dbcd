"""The uncompressed cache: what everything is compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvsim.policies.base import Policy


class Full(Policy):
    """Keep every token, channel and bit."""

    kind: Literal["full"] = "full"
    full_cache: ClassVar[bool] = True
    blocks_shareable: ClassVar[bool] = True
