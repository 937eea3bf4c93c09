"""A file of JSON lines whose beginning every commit seals, so that a lost or altered line is noticed and put back.

A commit seals the lines before it: their number and SHA-256 go into the checkpoint's `trainer.json`, a copy of the
lines into `RUN/sealed/`. What comes after the newest seal is not protected until the next commit.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tinylab.errors import CheckpointError
from tinylab.runs.durable import (
    MAX_LINE_BYTES,
    append_line,
    complete_lines,
    disk_error,
    fsync_path,
    parse_line,
    repair_tail,
    write_atomic,
)
from tinylab.runs.manifest import compare_file, read_manifest
from tinylab.runs.regular import open_regular, read_json

SEALED = "sealed"
QUARANTINE = "quarantine"


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What a checkpoint knows of a log: how many lines it had, and their SHA-256."""

    checkpoint: str
    lines: int
    sha256: str


def stored_seals(checkpoints: Iterable[Path], name: str) -> list[Seal]:
    """The seals of the log `name` (`metrics` or `journal`) in `checkpoints`, oldest first.

    A checkpoint of an earlier version has none; a trainer.json that differs from its manifest is not believed.
    """
    found = []
    for folder in checkpoints:
        path = folder / "trainer" / "trainer.json"
        with suppress(CheckpointError, OSError, KeyError, TypeError):
            seal = read_json(path)[name]
            if compare_file(path, read_manifest(folder)["trainer/trainer.json"]) is None:
                found.append(Seal(checkpoint=folder.name, lines=int(seal["lines"]), sha256=str(seal["sha256"])))
    return sorted(found, key=lambda seal: seal.lines)


class SealedLog:
    """The log at `path`, its seal so far, and its repair. A subclass says what a good line is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.copy_path = path.parent / SEALED / path.name
        self._forget()

    def _forget(self) -> None:
        self._lines = self._bytes = self._copied = 0
        self._sha256 = hashlib.sha256()
        self._last = b""

    def problem(self, record: dict[str, Any], previous: dict[str, Any]) -> str | None:
        """Why `record` is no line of this log after `previous` (empty for the first); None if it is one."""
        raise NotImplementedError

    def is_later(self, record: dict[str, Any], last: dict[str, Any]) -> bool:
        """Whether a line belongs behind the `last` sealed one, rather than being an altered copy of a sealed line."""
        raise NotImplementedError

    def append(self, record: dict[str, Any], *, sync: bool = False) -> None:
        """Add one line, handed to the operating system before this returns (and to the device if `sync`)."""
        append_line(self.path, record, sync=sync)

    def records(self) -> list[dict[str, Any]]:
        """Every complete line. Raises CheckpointError naming the first that is damaged, and the remedy."""
        records: list[dict[str, Any]] = []
        for number, (line, _) in enumerate(complete_lines(self.path), start=1):
            record, problem = self._parsed(line, records[-1] if records else {})
            if problem:
                raise CheckpointError(
                    f"{self.path}, line {number}: {problem}. To repair it: tinylab train {self.path.parent}"
                )
            records.append(record)
        return records

    def _parsed(self, line: bytes, previous: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The record of a line, and why it is none of this log."""
        record = parse_line(line)
        if record is None:
            return {}, f"must be a JSON object; found {line[:-1][:80]!r}"
        return record, self.problem(record, previous)

    # ---- the seal of a commit ---------------------------------------------------------------------------------------

    def seal(self) -> dict[str, Any]:
        """Seal and copy every complete line; what `trainer.json` holds. Reads only the lines since the last seal."""
        if not self._holds_last():
            now = Seal(checkpoint="the last commit", lines=self._lines, sha256=self._sha256.hexdigest())
            for note in self.repair([now]):
                print(f"warning: {note}", file=sys.stderr)
        for line, end in complete_lines(self.path, self._bytes):
            self._add(line, end)
        try:
            self._copy()
        except (OSError, CheckpointError) as error:  # a full disk, perhaps: the next seal tries again
            reason = disk_error(self.copy_path, error) if isinstance(error, OSError) else error
            print(f"warning: {reason}", file=sys.stderr)
        return {"lines": self._lines, "sha256": self._sha256.hexdigest()}

    def _add(self, line: bytes, end: int) -> None:
        self._sha256.update(line)
        self._lines += 1
        self._last, self._bytes = line, end

    def _holds_last(self) -> bool:
        """Whether the last sealed line is still in its place: the file may have been replaced while it grew."""
        if not self._last:
            return True
        try:
            with open(open_regular(self.path), "rb") as file:
                file.seek(self._bytes - len(self._last))
                return file.read(len(self._last)) == self._last
        except FileNotFoundError:
            return False

    def _copy(self) -> None:
        """Bring the copy up to the seal: by the new lines, or by all if it was removed or cannot be trusted."""
        if not self._bytes:
            return
        self.copy_path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(open_regular(self.copy_path, os.O_RDWR | os.O_CREAT), "rb+") as copy:
            at = self._copied if copy.seek(0, os.SEEK_END) >= self._copied else 0
            copy.seek(at)
            if at < self._bytes:
                with open(open_regular(self.path), "rb") as file:
                    file.seek(at)
                    while block := file.read(min(self._bytes - at, 2**20)):
                        at += copy.write(block)
            copy.truncate()
        self._copied = self._bytes

    def sync(self) -> None:
        """Flush the log and its copy to the device; called before a checkpoint commits."""
        for path in (self.path, self.copy_path):
            if path.is_file():
                fsync_path(path)

    # ---- what became of the sealed lines ----------------------------------------------------------------------------

    def damage(self, seals: Sequence[Seal]) -> list[str]:
        """How the log differs from `seals`, oldest first, or what is no line of it; nothing is changed."""
        try:
            with suppress(FileNotFoundError):
                os.close(open_regular(self.path))
        except CheckpointError as error:
            return [str(error)]
        if broken := self._broken(seals):
            return [f"{self.path}: {self._compared(broken, seals[-1], self._sealed_lines(seals[-1]))}"]
        if seals and seals[-1].lines and not self._sealed_lines(seals[-1]):
            return [f"{self.copy_path} is not the copy of the sealed lines: remove it, the next commit makes it again"]
        return [f"{self.path}, line {number}: {problem}" for number, problem in self._bad_lines()]

    def repair(self, seals: Sequence[Seal]) -> list[str]:
        """Put back what is missing or altered of the lines under `seals`, oldest first; leave damaged ones out.

        Returns what was found and done, one sentence each. The damaged file stays in RUN/quarantine/.
        """
        try:
            notes = []
            if broken := self._broken(seals):
                sealed = self._sealed_lines(seals[-1])
                found = self._compared(broken, seals[-1], sealed)
                done = "they cannot be restored: the sealed copy is damaged too"
                if sealed:
                    done = f"restored from {self.copy_path}{self._replace([*sealed, *self._after(sealed)])}"
                    self._follow(seals[-1:])
                notes.append(f"{self.path}: {found}; {done}")
            repair_tail(self.path)
            if bad := dict(self._bad_lines()):
                lines = enumerate((line for line, _ in self._readable_lines()), start=1)
                done = self._replace([line for number, line in lines if number not in bad])
                first, problem = next(iter(bad.items()))
                notes.append(f"{self.path}: {len(bad)} damaged lines left out, the first, {first}: {problem}{done}")
        except OSError as error:
            raise disk_error(self.path, error) from error
        return notes

    def _broken(self, seals: Sequence[Seal]) -> Seal | None:
        """The oldest seal that does not hold, if the newest does not; the log is read up to the last that holds."""
        return self._follow(seals[-1:]) and (self._follow(seals) or seals[-1])

    def _follow(self, seals: Sequence[Seal]) -> Seal | None:
        """Read the log from its beginning as far as the seals hold; the first that does not."""
        self._forget()
        for seal in seals:
            sha256, end = self._sha256.copy(), self._end_of_lines(seal.lines - self._lines)
            if end is not None:
                with open(open_regular(self.path), "rb") as file:
                    file.seek(self._bytes)
                    left = end - self._bytes
                    while block := file.read(min(left, 2**20)):
                        sha256.update(block)
                        left -= len(block)
                    file.seek(max(0, end - MAX_LINE_BYTES))
                    *_, last = [b"", *file.read(end - file.tell()).splitlines(keepends=True)]
            if end is None or sha256.hexdigest() != seal.sha256:
                return seal
            self._lines, self._sha256, self._last, self._bytes = seal.lines, sha256, last, end
        self._copied = self._bytes
        return None

    def _end_of_lines(self, count: int) -> int | None:
        """Where the `count` lines behind the sealed ones end; None if there are fewer. Faster than line by line."""
        end, silent = self._bytes, 0
        try:
            descriptor = open_regular(self.path)
        except FileNotFoundError:
            return None if count else end
        with open(descriptor, "rb") as file:
            file.seek(end)
            while count and silent < MAX_LINE_BYTES and (block := file.read(2**20)):
                found = block.count(b"\n")
                silent = 0 if found else silent + len(block)
                if found >= count:
                    position = -1
                    for _ in range(count):
                        position = block.index(b"\n", position + 1)
                    return end + position + 1
                count, end = count - found, end + len(block)
        return None if count else end

    def _readable_lines(self) -> Iterator[tuple[bytes, int]]:
        """The complete lines and the offset behind each, up to one that is too long to be read."""
        with suppress(CheckpointError):
            yield from complete_lines(self.path)

    def _sealed_lines(self, seal: Seal) -> list[bytes]:
        """The lines that `seal` covers, from the copy; none if the copy does not hold them."""
        try:
            lines = [line for line, _ in islice(complete_lines(self.copy_path), seal.lines)]
        except CheckpointError:
            return []
        digest = hashlib.sha256(b"".join(lines)).hexdigest()
        return lines if (len(lines), digest) == (seal.lines, seal.sha256) else []

    def _compared(self, broken: Seal, newest: Seal, sealed: list[bytes]) -> str:
        """What is wrong with the lines under `newest`, by the `sealed` lines if the copy holds them.

        If it does not, only the oldest seal that is `broken`, and the one before it, tell where.
        """
        found = [line for line, _ in self._readable_lines()]
        if not found:
            return f"all {newest.lines} lines that {newest.checkpoint} sealed are missing"
        if not sealed:
            return f"lines {self._lines + 1} to {broken.lines} are not those that {broken.checkpoint} sealed"
        first = next((i for i, line in enumerate(sealed) if i >= len(found) or found[i] != line), 0)
        lost = len(set(sealed) - set(found))
        what = f"{lost} of {len(sealed)} sealed lines missing or altered" if lost else "sealed lines doubled or moved"
        return f"{what}, the first at line {first + 1}"

    def _after(self, sealed: list[bytes]) -> list[bytes]:
        """The good lines of a damaged file that belong behind the `sealed` ones."""
        known, last, tail = set(sealed), parse_line(sealed[-1]) or {}, []
        for line, _ in self._readable_lines():
            if line in known:
                tail = []
                continue
            record, problem = self._parsed(line, last)
            if not problem and self.is_later(record, last):
                tail.append(line)
        return tail

    def _bad_lines(self) -> Iterator[tuple[int, str]]:
        """(number, problem) of each line behind the sealed ones that is no line of this log."""
        previous, number = parse_line(self._last) or {}, self._lines
        try:
            for line, _ in complete_lines(self.path, self._bytes):
                number += 1
                record, problem = self._parsed(line, previous)
                if problem:
                    yield number, problem
                else:
                    previous = record
        except CheckpointError as error:
            yield number + 1, str(error)

    def _replace(self, lines: list[bytes]) -> str:
        """Put `lines` in place of the damaged file, which stays in RUN/quarantine/; the sentence's end says where."""
        if not self.path.exists():
            write_atomic(self.path, b"".join(lines))
            return ""
        folder = self.path.parent / QUARANTINE
        folder.mkdir(mode=0o700, exist_ok=True)
        place, number = folder / self.path.name, 1
        while place.exists():
            number += 1
            place = folder / f"{self.path.stem}.{number}{self.path.suffix}"
        os.link(self.path, place)
        write_atomic(self.path, b"".join(lines))
        return f"; the damaged file is now {place}"
