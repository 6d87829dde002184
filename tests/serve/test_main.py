"""`align serve reward`: what is refused before it starts, and the whole service, in one process and with Ray Serve."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch

from align import cli
from align.config import (
    CheckpointRewardConfig,
    FunctionRewardConfig,
    HttpRewardConfig,
    ReplicasConfig,
    RewardConfig,
    RewardServiceConfig,
)
from align.data.chat import Dialogue, Message
from align.errors import ConfigError
from align.rewards.http import HttpScorer
from align.rewards.scorers import build_scorer
from align.serve.batcher import LoadingBackend

app = pytest.importorskip("align.serve.app", reason="needs the extra 'serve'")
service = pytest.importorskip("align.serve.main", reason="needs the extra 'serve'")
replicas = pytest.importorskip("align.serve.replicas", reason="needs the extra 'serve'")

TOKEN = "canary-0123456789abcdef"
DIALOGUES = [Dialogue((Message("user", f"copy {word}"),), word) for word in ("b", "d e", "a b c", "c c c c")]


@pytest.fixture
def recipe(tmp_path: Path, tiny_reward: Path) -> Path:
    path = tmp_path / "service.yaml"
    path.write_text(
        f"reward: {{path: {tiny_reward}, dtype: float32}}\n"
        f"dir: {tmp_path / 'run'}\nport: 0\ntoken_env: ALIGN_REWARD_TOKEN\nstart_timeout_s: 120\n"
    )
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["host=0.0.0.0", 'token_env=""'], "host 0.0.0.0 can be reached from elsewhere: it needs token_env=NAME"),
        (["host='::'", 'token_env=""'], "it needs token_env=NAME"),
        (["token_env=OTHER_TOKEN"], "the environment variable OTHER_TOKEN is not set"),
        (["token_env=SHORT_TOKEN"], "is not a token of at least 16"),
        (['reward.path=""'], "path must be a folder or a hub id"),
        (["reward.path=nowhere"], "reward.path=nowhere: is not a folder here, and is not in the hub"),
        (["reward.kind=http"], "reward.kind: expected one of checkpoint, ensemble, function, found 'http'"),
        (["reward.kind=function", "reward.function=os:nothing"], "has no function nothing"),
        (["replicas.min=3"], "max at least min: 3, 1"),
        (["replicas.gpus=2"], "spread a larger model by shards"),
        (["replicas.shards=2"], "needs executor ray and reward.zero_stage 3"),
        (["max_queue=1"], "max_queue at least max_conversations"),
        (["port=65536"], "port lies from 0 to 65535"),
        (["request_timeout_s=0"], "must be positive"),
        (["max_batch=3"], "unknown key"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(
    recipe: Path,
    overrides: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("ALIGN_REWARD_TOKEN", TOKEN)
    monkeypatch.setenv("SHORT_TOKEN", "fifteen-signs-1")
    assert cli.main(["serve", "reward", str(recipe), *overrides]) == 78
    output = capsys.readouterr()
    assert message in output.err
    assert TOKEN not in output.err + output.out and "fifteen" not in output.err + output.out


def test_a_check_starts_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("ALIGN_REWARD_TOKEN", TOKEN)
    assert cli.main(["serve", "reward", str(recipe), "host=0.0.0.0", "--check"]) == 0
    assert "can be served" in capsys.readouterr().out
    assert not (recipe.parent / "run").exists()


def front(port: int = 0) -> Any:
    section = RewardServiceConfig(reward=CheckpointRewardConfig(path="m"), port=port)
    return service.HTTPServer(section, app.RewardApp(LoadingBackend(), section, "m"))


def test_a_port_that_is_taken_is_an_error_before_the_model_is_loaded(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The other service has its port from its first moment, when its expected model is not loaded either."""
    monkeypatch.setenv("ALIGN_REWARD_TOKEN", TOKEN)
    monkeypatch.setattr(service, "_start_backend", lambda *_: pytest.fail("loads the model"))
    with front() as first:
        port = int(first.url.rpartition(":")[2])
        assert cli.main(["serve", "reward", str(recipe), f"port={port}"]) == 78
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}"), front(port):
            pass
        first.check()
    with front(port) as again:
        assert status_of(again.url) == 503
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError), front(taken.getsockname()[1]):
        pass


def test_of_two_services_that_begin_together_one_gets_the_port():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))

        class Late(socket.socket):
            def bind(self, address: Any, /) -> None:
                super().bind(address)
                other.listen()

        late = front(other.getsockname()[1])
        late._socket.close()
        late._socket = Late()
        with pytest.raises(ConfigError, match="cannot listen on"), late:
            pass


def status_of(url: str) -> int:
    """Of the service's health."""
    try:
        with urlopen(f"{url}/health", timeout=10) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def test_a_service_answers_503_until_its_model_is_loaded(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    statuses: list[int] = []
    fronts: list[Any] = []

    class RecordedServer(service.HTTPServer):
        def __enter__(self) -> RecordedServer:
            fronts.append(self)
            return super().__enter__()

    class Scorer:
        async def replicas(self) -> int:
            return 1

    @contextmanager
    def up(_: RewardServiceConfig, stop: Any) -> Iterator[Any]:
        statuses.append(status_of(fronts[0].url))

        def look() -> None:
            statuses.append(status_of(fronts[0].url))
            stop.requested.set()

        yield Scorer(), look

    monkeypatch.setattr(service, "HTTPServer", RecordedServer)
    monkeypatch.setattr(service, "_start_backend", up)
    monkeypatch.setattr(service, "CHECK_S", 0.001)
    monkeypatch.setenv("ALIGN_REWARD_TOKEN", TOKEN)
    assert cli.main(["serve", "reward", str(recipe)]) == 0
    assert statuses == [503, 200]


def test_a_sharded_judge_without_a_score_answers_null(monkeypatch: pytest.MonkeyPatch):
    """The reward role raises an error of the whole request unless it is told to leave such scores."""

    class Role(replicas.Reward):
        def _score_text(self, dialogues: Any, *_: Any) -> Future[torch.Tensor]:
            scored = SimpleNamespace(score_B=torch.tensor([1.0, math.nan]), metrics={})
            future: Future[torch.Tensor] = Future()
            future.set_result(self._gather([scored], [torch.tensor([0, 1])]))  # type: ignore[list-item]
            return future

    @contextmanager
    def start_reward(section: RewardConfig, *_: Any) -> Iterator[Any]:
        yield Role(SimpleNamespace(world_size=1), section)  # type: ignore[arg-type]

    monkeypatch.setattr(service, "start_reward", start_reward)
    section = RewardServiceConfig(
        reward=CheckpointRewardConfig(path="m", zero_stage=3), replicas=ReplicasConfig(shards=2)
    )
    assert section.reward.failed == "fail"
    with service._start_backend(section, service.StopSignal()) as (scorer, _):
        values = asyncio.run(scorer.score(DIALOGUES[:2])).values
    assert values[0] == 1.0 and math.isnan(values[1])


def test_names_of_models(tmp_path: Path):
    def name(**reward: Any) -> str:
        return service.model_name(
            RewardServiceConfig(
                reward=FunctionRewardConfig(**reward) if "function" in reward else CheckpointRewardConfig(**reward)
            )
        )

    (tmp_path / "my-model").mkdir()
    assert name(path=f"{tmp_path}/my-model/") == "my-model"
    assert name(path="nvidia/Some-Reward") == "nvidia/Some-Reward"
    assert name(function="scores.py:length") == "length"


class Running:
    """`align serve reward` as a process."""

    def __init__(self, recipe: Path, *overrides: str):
        self.log = recipe.parent / "log"
        self.command = [sys.executable, "-m", "align.cli", "serve", "reward", str(recipe), *overrides]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env={**os.environ, "ALIGN_REWARD_TOKEN": TOKEN}
            )
        self.wait_until(lambda: "serving " in self.output, 150)
        self.url = next(line for line in self.output.splitlines() if line.startswith("serving ")).split()[-1]

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended: {self.output}"
            assert time.monotonic() < end, f"not within {seconds} s: {self.output}"
            time.sleep(0.1)


@contextmanager
def running(recipe: Path, *overrides: str) -> Iterator[Running]:
    server = Running(recipe, *overrides)
    try:
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.output
    finally:
        server.process.kill()
        server.process.wait()


@contextmanager
def client(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpScorer]:
    monkeypatch.setenv("ALIGN_REWARD_TOKEN", TOKEN)
    http = HttpRewardConfig(
        url=url, token_env="ALIGN_REWARD_TOKEN", cache_size=0, retries=100, backoff_s=0.2, max_backoff_s=1.0
    )
    scorer = HttpScorer(http)
    try:
        yield scorer
    finally:
        scorer.close()


@pytest.mark.slow
def test_in_one_process_the_scores_are_those_of_the_judge(
    recipe: Path, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch
):
    with running(recipe, "executor=local") as server, client(server.url, monkeypatch) as scorer:
        scores = scorer.score(DIALOGUES)
    expected = build_scorer(CheckpointRewardConfig(path=str(tiny_reward), dtype="float32"), torch.device("cpu")).score(
        DIALOGUES
    )
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert len(set(expected.tolist())) == len(DIALOGUES)
    assert server.output.splitlines()[-1] == f"serving {tiny_reward.name} on {server.url}"


@pytest.mark.long
def test_weights_spread_over_two_workers_give_the_same_scores(
    recipe: Path, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = build_scorer(CheckpointRewardConfig(path=str(tiny_reward), dtype="float32"), torch.device("cpu")).score(
        DIALOGUES
    )
    with (
        running(recipe, "replicas.shards=2", "reward.zero_stage=3") as server,
        client(server.url, monkeypatch) as scorer,
    ):
        torch.testing.assert_close(scorer.score(DIALOGUES), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(scorer.score(DIALOGUES[:1]), expected[:1], rtol=0, atol=1e-6)  # one worker has none


def parents() -> dict[int, int]:
    """The parent of each process."""
    parent_of = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent_of[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
    return parent_of


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    parent_of, pids = parents(), [pid]
    for member in pids:
        pids += [child for child, parent in parent_of.items() if parent == member]
    return pids


def listens_on(pids: list[int]) -> set[str]:
    """Addresses, in hexadecimal, on which processes listen for TCP connections."""
    sockets = {os.readlink(fd) for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


@pytest.mark.slow
def test_a_replica_that_is_killed_is_replaced_and_nothing_is_lost(
    recipe: Path, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch
):
    """With Ray Serve; on the way: only this machine is listened to, and no process but the first holds the token."""
    expected = build_scorer(CheckpointRewardConfig(path=str(tiny_reward), dtype="float32"), torch.device("cpu")).score(
        DIALOGUES
    )
    logs = recipe.parent / "run" / "logs"
    with running(recipe) as server, client(server.url, monkeypatch) as scorer:
        torch.testing.assert_close(scorer.score(DIALOGUES), expected, rtol=0, atol=1e-6)
        processes = family(server.process.pid)
        assert listens_on(processes) == {"0100007F", "0000000000000000FFFF00000100007F"}
        for pid in processes:
            assert TOKEN.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert pid == server.process.pid or TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        (first,) = logs.glob("replica-*.log")
        os.kill(int(first.stem.removeprefix("replica-")), signal.SIGKILL)
        torch.testing.assert_close(scorer.score(DIALOGUES), expected, rtol=0, atol=1e-6)
        assert len(list(logs.glob("replica-*.log"))) == 2
        assert scorer.metrics()["failures"] == 0
    assert TOKEN not in server.output + "".join(log.read_text() for log in logs.iterdir())
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
