"""Whether all processes of a run were started alike: each reads its own copy of the configuration and of the files.

Where they were not, some steps would be computed from other numbers than the stage's fingerprint says, or processes
would wait for each other at different places until they are ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from model.ds_config import read_user_config
from model.world import World
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.stage import identities

_OWN = ("deepspeed", "init", "keep_checkpoints", "keep_every", "launcher", "tracker_project", "trackers")
"""Keys of pretrain that only rank 0 or nobody needs, and files, of which the content counts."""
_NAMED = 8


def require(config: Config, world: World) -> None:
    """Compare this process's start with rank 0's. Every process has to call it.

    Raises:
        UserError: on every process, naming the ranks that were started otherwise and what differs.
    """
    mine = _facts(config)
    first = world.share(mine)
    differing = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
    found = {rank: names for rank, names in enumerate(world.collect(differing)) if names}
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        ranks = ", ".join(map(str, list(found)[:_NAMED])) + more
        names = ", ".join(dict.fromkeys(name for names in found.values() for name in names))
        raise UserError(
            f"not all processes were started alike: {names} of rank 0 and of rank {ranks} differ; give every node the "
            "same configuration, files and versions"
        )


def _facts(config: Config) -> dict[str, Any]:
    """What has to be the same everywhere, by what users call it."""
    section = config.pretrain.model_dump(mode="json", exclude=set(_OWN))
    facts = {f"pretrain.{path}": value for path, value in _leaves(section)}
    if url := config.pretrain.deepspeed:
        content = json.dumps(read_user_config(url, config.storage_options), sort_keys=True)
        facts["the file of pretrain.deepspeed"] = hashlib.sha256(content.encode()).hexdigest()
    identity = identities(config, "pretrain")["pretrain"]
    facts |= {f"the version of {name}": version for name, version in identity.toolchain.items()}
    facts |= {f"the fingerprint of {name}": fingerprint for name, fingerprint in identity.upstream.items()}
    return {**facts, "the fingerprint of pretrain": identity.fingerprint}


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
