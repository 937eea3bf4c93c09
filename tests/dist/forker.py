"""Runs supervisors in forked children, so that torch is imported once for all of them.

Reads one JSON request per line: `argv`, `env`, `out` (file of its output), `fifo` (to be tied to, or null), answered
with the child's process id; or `wait`, a process id, answered with its exit code.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback

import torch.distributed.run

from tinylab.dist import context, supervisor

assert torch and context


def child(request: dict) -> int:
    os.setsid()
    os.environ.update(request["env"])
    output = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tied = ["--tied", str(os.open(request["fifo"], os.O_RDONLY))] if request["fifo"] else []
    try:
        return supervisor.main([*tied, *request["argv"]])
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99


for line in sys.stdin:
    request = json.loads(line)
    if pid := request.get("wait"):
        deadline = time.monotonic() + 90
        while not (found := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.02)
        print(os.waitstatus_to_exitcode(found[1]) if found[0] else "null", flush=True)
        continue
    pid = os.fork()
    if not pid:
        code = child(request)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
