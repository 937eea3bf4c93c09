"""Parts of a file that lie apart, as one piece of memory: equal to reading them, and never written back."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

import pytest

from tinylab.formats.mapping import map_parts

PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mapping") / "file"
    path.write_bytes(random.Random(0).randbytes(64 * PAGE + 5))
    return path


@pytest.mark.parametrize("lead", [0, 1, 8, PAGE - 1])
@pytest.mark.parametrize(
    "pages",
    [[(0, 1)], [(3, 2)], [(9, 4), (2, 1), (5, 3)], [(1, 2), (1, 2)], [(40, 20), (0, 1)], [(60, 3), (59, 1)]],
)
def test_parts_are_the_bytes_of_the_file_one_after_the_other(file: Path, lead: int, pages: list[tuple[int, int]]):
    parts = [(page * PAGE + lead, count * PAGE) for page, count in pages]
    content = file.read_bytes()
    assert bytes(map_parts(file, parts) or b"") == b"".join(content[a : a + n] for a, n in parts)


def test_sizes_that_are_no_whole_pages_work_where_the_next_part_fits(file: Path):
    content = file.read_bytes()
    parts = [(7, PAGE + 100), (5 * PAGE + 107, 3), (2 * PAGE + 110, 2 * PAGE), (64 * PAGE + 110 - PAGE, 9)]
    assert bytes(map_parts(file, parts) or b"") == b"".join(content[a : a + n] for a, n in parts)


def test_parts_that_cannot_share_their_pages_are_left_to_the_reader(file: Path):
    assert map_parts(file, [(0, PAGE), (PAGE + 1, PAGE)]) is None
    assert map_parts(file, [(0, 100), (PAGE, PAGE)]) is None


def test_writing_leaves_the_file_alone_and_the_memory_keeps_it(file: Path):
    content = file.read_bytes()
    mapped = map_parts(file, [(9 * PAGE + 8, 4 * PAGE), (2 * PAGE + 8, PAGE)])
    assert mapped is not None
    mapped[:] = bytes(len(mapped))
    assert bytes(mapped) == bytes(5 * PAGE) and file.read_bytes() == content


def test_memory_is_unmapped_when_nobody_holds_it(file: Path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps (Linux)")
    mapped = map_parts(file, [(9 * PAGE + 8, 4 * PAGE), (2 * PAGE + 8, PAGE)])
    held = maps.read_text().count(str(file))
    del mapped
    assert held >= 2 and str(file) not in maps.read_text()


def test_a_file_that_became_shorter_raises_and_does_not_crash(file: Path, tmp_path: Path):
    short = tmp_path / "short"
    short.write_bytes(file.read_bytes()[: 3 * PAGE])
    with pytest.raises(OSError, match="shorter than its header says"):
        map_parts(short, [(0, PAGE), (2 * PAGE, 2 * PAGE)])
