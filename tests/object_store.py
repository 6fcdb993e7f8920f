"""An S3 server on this machine, and how a process is pointed at it."""

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

_SECONDS_TO_START = 30


@contextlib.contextmanager
def serve_s3(*buckets: str) -> Iterator[str]:
    """URL of a server with these buckets, in a process of its own.

    Its web framework leaves objects in ``sys.modules`` that fail when an engine looks through loaded modules.
    """
    for module in ("moto", "s3fs"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        url = f"http://127.0.0.1:{port}"
        for bucket in buckets:
            s3_client(url).create_bucket(Bucket=bucket)
        yield url
    finally:
        server.terminate()
        server.wait()


def s3_client(url: str) -> Any:
    """boto3's client of that server."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )


@contextlib.contextmanager
def using_store(url: str) -> Iterator[None]:
    """Everything that reads ``s3://`` goes to that server, here and in processes started inside."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        _forget_stores()
        try:
            yield
        finally:
            _forget_stores()


def _forget_stores() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    # A client keeps the endpoint it was made for.
    getattr(s3fs.S3FileSystem, "_conn", {}).clear()


def _wait_for(port: int, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    pytest.fail("the S3 server does not start", pytrace=False)
