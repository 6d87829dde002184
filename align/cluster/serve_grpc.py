"""A patch of Ray Serve's private gRPC server (needs the extra ``serve``), for the Ray versions of pyproject.toml."""

from __future__ import annotations

import grpc


def block_grpc_port() -> None:
    """Keep Ray Serve from listening in this process.

    After the constructor of a deployment, Ray Serve opens a port on all interfaces for calls by gRPC instead of by Ray.
    The port asks for no token and unpickles its input, so whoever reaches it can run code. No caller here uses it.
    """
    grpc.aio._server.Server.add_insecure_port = lambda self, address: 0  # type: ignore[method-assign]
