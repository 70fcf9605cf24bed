"""The endpoint's metrics, gathered from where Ray's agents export them: one on each node, for all its processes."""

from __future__ import annotations

import asyncio

import httpx2 as httpx
import ray

PREFIX = "ray_vas_"
SECONDS = 3.0


async def scrape() -> str:
    """Prometheus's text format; a node that does not answer in time is left out."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort")]
    async with httpx.AsyncClient(timeout=SECONDS) as client:
        pages = await asyncio.gather(
            *(client.get(f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics") for n in nodes),
            return_exceptions=True,
        )
    lines: dict[str, None] = {}  # a metric's HELP and TYPE stand on every node
    for page in pages:
        if isinstance(page, BaseException):
            continue
        for line in page.text.splitlines():
            words = line.split(" ", 3)
            name = words[2] if line.startswith("# ") and len(words) > 2 else line
            if name.startswith(PREFIX):
                lines[line.replace(PREFIX, "vas_")] = None
    return _grouped(lines)


def _grouped(lines: dict[str, None]) -> str:
    """The lines of a metric must stand together, its comments first."""
    groups: dict[str, list[str]] = {}
    families = [line.split(" ", 3)[2] for line in lines if line.startswith("# TYPE ")]
    for line in lines:
        name = line.split(" ", 3)[2] if line.startswith("# ") else line.partition("{")[0].partition(" ")[0]
        family = max((f for f in families if name.startswith(f)), key=len, default=name)
        groups.setdefault(family, []).append(line)
    ordered = [sorted(group, key=lambda line: not line.startswith("# ")) for group in groups.values()]
    return "\n".join(line for group in ordered for line in group) + "\n"
