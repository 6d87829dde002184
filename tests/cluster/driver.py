"""A driver of its own: one worker on a Ray that it starts. Says where it is, and does what it is told on stdin."""

import json
import sys
from pathlib import Path

import torch
from toy_workers import Toy, specs

from align.cluster.pool import RayCluster
from align.config import ClusterConfig
from align.errors import AlignError
from align.run import Clock

section = ClusterConfig(start_timeout_s=200.0, call_timeout_s=60.0)
try:
    with RayCluster(section, 1) as cluster:
        ranks = cluster.start_roles({"policy": (Toy, specs("policy", 1), (0,))}, Path(sys.argv[1]), Clock())["policy"]
        (environment,) = ranks.call("look", Toy.environment, [()], list).result()
        place = ranks.members[0].place
        assert place is not None
        print(json.dumps({"worker": place.pid, "host": place.host, "environment": environment}), flush=True)
        for line in sys.stdin:
            if line.strip() == "ask":
                answer = ranks.call("double", Toy.double, [(torch.ones(1),)], list).result()
                print(json.dumps(answer[0].tolist()), flush=True)
            else:
                ranks.call("sleep", Toy.sleep, [(30.0,)], list).result()
except AlignError as error:
    print(f"align: {error}", flush=True)
    sys.exit(error.exit_status)
