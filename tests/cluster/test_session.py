"""Our own Ray: who can reach it, what it inherits, and that nothing of it is left, however it ends."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import ray

from align.cluster import ray_internals, reaper, session
from align.cluster.process import inherited
from align.cluster.session import Session, remove_abandoned
from align.config import ClusterConfig
from align.errors import PlacementError, WorkerError

HERE = Path(__file__).parent


def processes_of(folder: str) -> dict[int, str]:
    """Processes of the Ray in this folder, with their command lines."""
    found = {}
    for pid in reaper.processes_of(Path(folder)):
        with suppress(OSError):  # ended meanwhile
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def listening(pids: set[int]) -> set[str]:
    """IP addresses, in hexadecimal, on which processes listen for TCP connections."""
    sockets = set()
    for pid in pids:
        try:
            sockets |= {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:  # 0A: LISTEN
                found.add(fields[1].partition(":")[0])
    return found


class Driver:
    """A process that runs `driver.py`."""

    def __init__(self, logs: Path, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "driver.py"), str(logs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.found = self.read()
        self.folder = str(Path(self.found["environment"]["RAY_AUTH_TOKEN_PATH"]).parent)

    def read(self):
        """The next line of JSON that it prints."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("{", "[")):
                return json.loads(line)
        raise AssertionError("the driver ended")

    def tell(self, word: str) -> None:
        """Give it something to do."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def seconds_to_nothing(self) -> float:
        """How long its processes take to be gone, at most ten seconds."""
        begun = time.monotonic()
        while processes_of(self.folder) and time.monotonic() < begun + 10.0:
            time.sleep(0.05)
        left = processes_of(self.folder)
        assert not left
        return time.monotonic() - begun


@contextmanager
def run(logs: Path) -> Iterator[Driver]:
    driver = Driver(logs, ALIGN_FAULT="kind=error,role=nobody", MY_SECRET="canary", HF_TOKEN="for the hub")
    yield driver
    driver.process.kill()
    driver.process.wait()
    driver.seconds_to_nothing()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    """One to be ended."""
    with run(tmp_path) as driver:
        yield driver


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """One that tests leave as it is."""
    with run(tmp_path_factory.mktemp("logs")) as driver:
        yield driver


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("stop", [False, True])
def test_a_killed_driver_leaves_no_process_and_no_folder(driver: Driver, stop: bool):
    """Also while its worker is stopped and cannot see that it should end."""
    assert len(processes_of(driver.folder)) >= 4
    if stop:
        os.kill(driver.found["worker"], signal.SIGSTOP)
    driver.tell("sleep")
    driver.process.kill()
    driver.process.wait()
    print(f"\nall gone {driver.seconds_to_nothing():.2f} s after SIGKILL of the driver, worker stopped: {stop}")
    time.sleep(0.5)
    assert not Path(driver.folder).exists()


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["/gcs_server ", "/raylet/raylet "])
def test_the_end_of_a_daemon_of_ray_ends_the_wait(driver: Driver, daemon: str):
    (pid,) = [pid for pid, command in processes_of(driver.folder).items() if daemon in command.partition("--")[0]]
    driver.tell("sleep")
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    said = next(line for line in driver.process.stdout if line.startswith("align: "))  # type: ignore[union-attr]
    print(f"\n{daemon.strip()}: told after {time.monotonic() - begun:.2f} s")
    assert time.monotonic() - begun < 60.0  # the call would take an hour
    name = "Ray's control store (gcs_server) at 127.0.0.1:" if "gcs" in daemon else "the raylet at 127.0.0.1:"
    assert said.startswith(f"align: {name}")
    assert "is gone; policy was asked for sleep, step 0; remedy: run again" in said
    assert driver.process.wait(timeout=30) == 76
    driver.seconds_to_nothing()
    assert not Path(driver.folder).exists()


@pytest.mark.slow
def test_two_side_by_side_listen_on_loopback_only_and_do_not_meet(lasting: Driver, tmp_path: Path):
    other = Driver(tmp_path / "other")
    pids = {one.process.pid: one for one in (lasting, other)}
    folders = [one.folder for one in pids.values()]
    assert folders[0] != folders[1]
    tokens = [Path(folder) / "token" for folder in folders]
    assert tokens[0].read_text() != tokens[1].read_text()
    assert {token.stat().st_mode & 0o777 for token in tokens} == {0o600}
    assert {Path(folder).stat().st_mode & 0o777 for folder in folders} == {0o700}  # and Ray's own within it
    started = {pid for folder in folders for pid in processes_of(folder)}
    heard = listening({*pids, *started})
    assert heard
    assert heard <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}  # loopback
    for one in (lasting, other):
        one.tell("ask")
    assert [one.read() for one in (lasting, other)] == [[3.0], [3.0]]
    other.process.stdin.close()  # type: ignore[union-attr]
    assert other.process.wait(timeout=60) == 0
    other.seconds_to_nothing()
    assert not Path(other.folder).exists()
    lasting.tell("ask")
    assert lasting.read() == [4.0]


@pytest.mark.full
@pytest.mark.slow
def test_workers_inherit_what_is_listed_and_no_other_variable(lasting: Driver):
    environment = lasting.found["environment"]
    assert not {"ALIGN_FAULT", "MY_SECRET"} & environment.keys()
    assert environment["HF_TOKEN"] == "for the hub"
    assert environment["RAY_AUTH_MODE"] == "token"
    for pid in processes_of(lasting.folder):
        if pid != lasting.process.pid:
            assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
    token = (Path(lasting.folder) / "token").read_text()
    assert len(token) == 64
    for pid, command in processes_of(lasting.folder).items():
        assert token not in command
        assert token.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


INTRUDER = """
import sys, ray
try:
    ray.init(address=sys.argv[1], _node_ip_address="127.0.0.1", log_to_driver=False, logging_level="error")
    print("let in", ray.get(ray.remote(lambda: 7).remote()))
except Exception as error:
    print("refused", type(error).__name__)
"""


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("token", ["none", "wrong", "right"])
def test_only_who_has_the_token_is_let_in(tmp_path: Path, lasting: Driver, token: str):
    address = next(
        command.partition("--gcs-address=")[2].split()[0]
        for command in processes_of(lasting.folder).values()
        if "--gcs-address=127" in command
    )
    file = tmp_path / "token"
    file.write_text((Path(lasting.folder) / "token").read_text() if token == "right" else "0" * 64)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mode = (
        {"RAY_AUTH_MODE": "disabled"}
        if token == "none"
        else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    )
    local = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # or it would look for a raylet on another interface
    intruder = subprocess.Popen(
        [sys.executable, "-c", INTRUDER, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, **mode, **local},
    )
    try:
        said, _ = intruder.communicate(timeout=90.0 if token == "right" else 30.0)
    except subprocess.TimeoutExpired:  # Ray asks again and again
        intruder.kill()
        said, _ = intruder.communicate()
    assert ("let in 7" in said) == (token == "right"), said


@pytest.mark.slow
def test_an_address_where_no_ray_is_gives_a_remedy_in_time():
    begun = time.monotonic()
    with pytest.raises(PlacementError, match="cluster.address=127.0.0.1:9 could not be reached within") as caught:
        Session(ClusterConfig(address="127.0.0.1:9", start_timeout_s=0.2)).open()
    assert "ray start --head" in str(caught.value) and caught.value.exit_status == 78
    assert time.monotonic() - begun < 10.0
    assert not ray.is_initialized()


def test_a_ray_that_does_not_start_is_told_and_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine that is too busy makes Ray raise an exception of no class of its own."""

    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(session, "FOLDERS", tmp_path)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(WorkerError, match="The current node timed out") as caught:
        Session(ClusterConfig()).open()
    assert str(caught.value).startswith("Ray cannot be reached or started")
    assert "cluster.address" not in str(caught.value)  # nobody gave one
    assert not list(tmp_path.iterdir())


def test_only_folders_that_nobody_holds_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "FOLDERS", tmp_path)
    names = ("align-ray-1-dead", "align-ray-2-held", "align-ray-3-starting", "align-ray-4-foreign", "other-5-dead")
    for name in names:
        (tmp_path / name).mkdir()
        if "starting" not in name:
            (tmp_path / name / "token").touch()
    if os.getuid() == 0:
        os.chown(tmp_path / "align-ray-4-foreign", 12345, 12345)
    (tmp_path / "align-ray-6-link").symlink_to(tmp_path / "other-5-dead")
    with (tmp_path / "align-ray-2-held" / "token").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_abandoned()
    left = {path.name for path in tmp_path.iterdir()}
    gone = {"align-ray-1-dead"} | (set() if os.getuid() == 0 else {"align-ray-4-foreign"})
    assert left == {*names, "align-ray-6-link"} - gone


@pytest.mark.parametrize(
    ("name", "passed"),
    [
        ("PATH", True),
        ("CUDA_VISIBLE_DEVICES", True),
        ("NCCL_SOCKET_IFNAME", True),
        ("TORCHDYNAMO_DISABLE", True),
        ("SLURM_JOB_ID", True),
        ("HF_TOKEN", True),
        ("OPENAI_API_KEY", True),
        ("NVIDIA_API_KEY", True),
        ("ALIGN_JUDGE_KEY", True),
        ("https_proxy", True),
        ("ALIGN_FAULT", False),
        ("WANDB_API_KEY", False),
        ("AWS_SECRET_ACCESS_KEY", False),
        ("MY_PATH", False),
    ],
)
def test_variables_are_inherited_by_name(name: str, passed: bool):
    assert (inherited({name: "x"}) == {name: "x"}) == passed


def test_an_unsupported_version_of_ray_is_refused():
    ray_internals.check_version("2.60.7")
    with pytest.raises(PlacementError, match=r"Ray 2\.61\.0 is installed, but align uses internals of Ray 2\.60"):
        ray_internals.check_version("2.61.0")
