"""Private names of Ray, and a patch of Ray Serve's gRPC server. No other module uses a private name of Ray.

None of these names has a public counterpart, and any minor version of Ray may change them. So `pyproject.toml` pins the
minor version that was run, `RAY_VERSIONS`, and `check_version` refuses others before Ray starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined] - compiled

from align.errors import PlacementError

try:
    import grpc  # part of the extra `serve`
except ImportError:
    grpc = None

RAY_VERSIONS = "2.60"
"""Minor version of Ray that was run (2.60.0); the same as in pyproject.toml."""


def check_version(version: str = ray.__version__) -> None:
    """Raise `PlacementError` if the installed Ray is not of `RAY_VERSIONS`."""
    if version.split(".")[:2] != RAY_VERSIONS.split("."):
        raise PlacementError(
            f"Ray {version} is installed, but align uses internals of Ray {RAY_VERSIONS}.*",
            remedy=f"pip install 'ray=={RAY_VERSIONS}.*', or set executor: local",
        )


@contextmanager
def private_cluster() -> Iterator[None]:
    """Within it, ``ray.init`` starts a Ray that listens on 127.0.0.1 only and asks for the token of the environment.

    Ray keeps both settings in memory, read at import. ``ENABLE_RAY_CLUSTER`` is meant for systems whose nodes cannot
    form a cluster; with True, Ray replaces the loopback address by an external one and listens on every interface.
    """
    previous = ray_constants.ENABLE_RAY_CLUSTER
    try:
        ray_constants.ENABLE_RAY_CLUSTER = False
        Config.initialize("")  # reads RAY_AUTH_MODE again
        AuthenticationTokenLoader.instance().reset_cache()  # reads RAY_AUTH_TOKEN_PATH again
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = previous


def block_grpc_port() -> None:
    """Keep Ray Serve from listening in this process. Needs the extra ``serve``.

    After the constructor of a deployment, Ray Serve opens a port on all interfaces for calls by gRPC instead of by Ray.
    The port asks for no token and unpickles its input, so whoever reaches it can run code. No caller here uses it.
    """
    grpc.aio._server.Server.add_insecure_port = lambda self, address: 0  # type: ignore[union-attr,method-assign]
