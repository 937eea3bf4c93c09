"""Parts of a file as one piece of memory, mapped and not read: a fused matrix whose parts are apart in the file.

Pages come from the file when they are touched, and a page that is written to becomes the process's own.
"""

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

_FIXED = 0x10
"""MAP_FIXED on Linux and macOS; Python's mmap has no name for it."""
_FAILED = ctypes.c_void_p(-1).value


def map_parts(path: Path, parts: Sequence[tuple[int, int]]) -> memoryview | None:
    """The bytes of `parts` (start, size) of one file, one after the other; None where they cannot be mapped.

    They can when every part begins as far into a page of the file as it will in memory. A page that two parts share
    is filled by reading (so are the few bytes up to the first page border); all others are mapped privately. Raises
    OSError when the file cannot be opened or read.
    """
    page = mmap.PAGESIZE
    lead = parts[0][0] % page
    position = lead
    for start, size in parts:
        if (start - position) % page:
            return None
        position += size
    # The area is one anonymous mapping. The file's pages are laid over it, so that dropping it unmaps them all.
    area = mmap.mmap(-1, position, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(area)
    base = ctypes.addressof(anchor)
    del anchor
    position = lead
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < max(start + size for start, size in parts):
            raise OSError(f"{path} is shorter than its header says")
        for start, size in parts:
            head = min(-position % page, size)
            # The pages first: the part before may end inside the page that `head` completes.
            if size > head:
                place, flags = base + position + head, mmap.MAP_PRIVATE | _FIXED
                access = mmap.PROT_READ | mmap.PROT_WRITE
                if _system_mmap()(place, size - head, access, flags, file.fileno(), start + head) in (None, _FAILED):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            area[position : position + head] = os.pread(file.fileno(), head, start)
            position += size
    return memoryview(area)[lead:position]


@functools.cache
def _system_mmap() -> Callable[..., int | None]:
    """The C library's mmap; offsets are 64 bits wide on every system that torch runs on."""
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    return function
