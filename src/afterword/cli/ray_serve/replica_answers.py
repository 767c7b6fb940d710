"""Calls a method on all replicas of a deployment. The only module that calls a private method of Ray Serve's handles.

It does not import Ray, so its tests need no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any


async def replica_answers(replicas: Any, method: str, seconds: float) -> Sequence[Any]:
    """The answers of the replicas that give one within `seconds`; those that fail or are silent are left out.

    `replicas`: Serve's handle. Raises `TimeoutError` if Serve does not say in time which replicas there are.
    """
    # Serve's public `results_async` has one time limit for all: a silent replica would hide the answers of the others.
    # This is its first half, in Ray 2.60; `afterword[ray]` requires that version.
    async with asyncio.timeout(seconds):
        asked = await replicas.broadcast(method)._fetch_replica_results_async()
    answers = [asyncio.wait_for(each.get_async(), seconds) for each in asked]
    found = await asyncio.gather(*answers, return_exceptions=True)
    return [each for each in found if not isinstance(each, BaseException)]
