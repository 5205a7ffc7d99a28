"""What PyTorch's CPU allocator says of its own use."""

from __future__ import annotations


def peak(profile) -> int:
    """Most bytes that PyTorch had on the CPU at once, from its allocator's own events."""
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
