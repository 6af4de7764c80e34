"""Episodes as JSON Lines: appended as they finish, readable after a crash."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from preconcert.core.episode import Episode
from preconcert.core.errors import StoreError

_EPISODE = TypeAdapter(Episode)
# A diverged run has infinite or undefined numbers; the default writes them as null, which no longer reads. Only an
# adapter of a container hands its configuration down to plain dataclasses, hence the list of one.
_WRITER = TypeAdapter(list[Episode], config=ConfigDict(ser_json_inf_nan="constants"))


@dataclass(frozen=True, slots=True)
class StoredEpisodes:
    """What a file held."""

    episodes: tuple[Episode, ...]
    torn_bytes: int
    """Length of an unfinished last line, as a crash leaves it; 0 for a clean file."""


def dump_episode(episode: Episode) -> bytes:
    """One line of JSON, without the line end."""
    return _WRITER.dump_json([episode])[1:-1]


def parse_episode(line: bytes | str) -> Episode:
    """The inverse of `dump_episode`.

    Raises:
        StoreError: the line is not an episode.
    """
    try:
        return _EPISODE.validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "line"
        raise StoreError(f"not an episode: {where}: {first['msg']}") from error


def append_episodes(path: Path, episodes: Iterable[Episode]) -> None:
    """Append whole lines and hand them to the disk before returning. A torn last line is cut off first."""
    data = b"".join(dump_episode(episode) + b"\n" for episode in episodes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = _end_of_last_line(path, end)
        if keep != end:
            file.truncate(keep)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load_episodes(path: Path) -> StoredEpisodes:
    """Every whole line of the file, and how long a torn last line was.

    Raises:
        StoreError: the file is missing, or a whole line is not an episode.
    """
    if not path.is_file():
        raise StoreError(f"no episode file at {str(path)!r}")
    data = path.read_bytes()
    whole, _, torn = data.rpartition(b"\n")
    episodes: list[Episode] = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            episodes.append(parse_episode(line))
        except StoreError as error:
            raise StoreError(f"{path.name} line {number}: {error}") from error
    return StoredEpisodes(tuple(episodes), len(torn))


def keep_episodes_before(path: Path, iteration: int) -> int:
    """Drop the episodes of rollouts from `iteration` on, and a torn line; written beside and renamed.

    Returns:
        How many episodes were dropped.
    """
    if not path.exists():
        return 0
    stored = load_episodes(path)
    kept = [episode for episode in stored.episodes if episode.iteration < iteration]
    beside = path.with_suffix(path.suffix + ".new")
    with open(beside, "wb") as file:
        file.writelines(dump_episode(episode) + b"\n" for episode in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    return len(stored.episodes) - len(kept)


def _end_of_last_line(path: Path, size: int) -> int:
    """Byte offset just after the last line end."""
    if size == 0:
        return 0
    with open(path, "rb") as file:
        block = 1 << 16
        position = size
        while position > 0:
            start = max(0, position - block)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
    return 0
