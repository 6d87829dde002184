"""Runs of ``align`` as processes of their own that need not import torch again: a process that forks.

Reads one JSON object a line: {"argv", "env", "log"} starts a run and is answered by its pid, {"wait": pid} is answered
by its exit status, negative for a signal. The parent must stay without threads, so nothing is computed in it.
"""

import gc
import importlib
import json
import os
import signal
import sys
import traceback

from align import cli

for name in ("align.launch", "align.eval.compare"):
    importlib.import_module(name)
gc.freeze()  # DeepSpeed collects garbage often, and what was imported is none


def child(order: dict) -> None:
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["env"])
    status = 1
    try:
        status = cli.main(order["argv"])
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for number in (signal.SIGINT, signal.SIGHUP):  # which a shell in the background or nohup may have had ignored
    signal.signal(number, signal.SIG_DFL)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        status = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        print(json.dumps(status), flush=True)
    else:
        pid = os.fork()
        if pid == 0:
            child(order)
        print(json.dumps(pid), flush=True)
