"""Cases over a Ray cluster: the same rows as from local processes."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from kvsim.api import versions
from kvsim.errors import InputError, KvsimError
from kvsim.sweeping.cases import Work
from kvsim.sweeping.pool import TICK_S
from kvsim.sweeping.rows import crashed, simulate_case

LOCAL = "local"
"""In place of an address: a Ray of this machine alone, started for the sweep."""
_ACCEPT_S, _ANSWER_S = 5.0, 15.0
"""A machine accepts a connection in milliseconds, a Ray greets within three seconds or so; Ray itself goes on trying for a minute."""
_PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); ray.shutdown()"
_RETRIES = 2
"""Of cases whose worker was lost: on a cluster that is a node taken away more often than the case's fault."""
_QUEUED_PER_CPU = 4
"""Enough to keep every worker fed, few enough that an interrupted sweep leaves no long queue behind."""

Simulate = Callable[[Iterable[Work]], Iterator[list[dict[str, Any]]]]


@contextmanager
def ray_cluster(address: str, jobs: int) -> Iterator[Simulate]:
    """What simulates cases on the Ray at `address` (host:port, ray://host:port, auto, or LOCAL with `jobs` CPUs).

    Raises InputError where no Ray answers there, KvsimError where it runs other versions. A Ray that this process is connected to
    already, as in a notebook, is used as it is, and left connected.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, jobs)
    try:
        yield lambda work: _simulate(ray, work)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str, jobs: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address == LOCAL:
            ray.init(address="local", num_cpus=jobs, include_dashboard=False, **quiet)
            return
        _check_listening(address)
        _check_answers(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _no_ray(address, _last_line(error)) from None


def _check_listening(address: str) -> None:
    """Raises OSError within _ACCEPT_S where nothing listens at host:port, InputError where that is no address."""
    if address == "auto":
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise InputError("--ray", address, "must be host:port, ray://host:port or auto", "try --ray=10.0.0.1:6379")
    socket.create_connection((host, port), timeout=_ACCEPT_S).close()


def _check_answers(address: str) -> None:
    """Raises OSError within _ANSWER_S where what listens is no Ray.

    In a process of its own: where it gives up, Ray ends the process instead of raising.
    """
    command = [sys.executable, "-c", _PROBE, address]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_ANSWER_S, check=False)
        said, otherwise = done.stderr, "it ended without a word"
        if not done.returncode:
            return
    except subprocess.TimeoutExpired as error:
        said, otherwise = error.stderr or b"", f"no answer within {_ANSWER_S:g} s"
    lines = said.decode(errors="replace").strip().splitlines()
    # Ray's own log says more than its exception: that a token is missing, say.
    logged = [line for line in lines if "GCS" in line and "] " in line]
    raise OSError(re.sub(r"^\[.*?\] (\S+:\d+: )?", "", (logged or lines or [otherwise])[-1]))


def _no_ray(address: str, why: str) -> InputError:
    fix = "is it running? `ray start --head` starts one; --ray alone needs none"
    return InputError("--ray", address, f"must be a Ray cluster that answers ({' '.join(why.split())})", fix)


def _simulate(ray: Any, work: Iterable[Work]) -> Iterator[list[dict[str, Any]]]:
    """Rows as they are finished, in any order."""
    from ray import exceptions

    task, here = ray.remote(max_retries=_RETRIES)(_simulate_there), versions()
    source, more = iter(work), True
    pending: dict[Any, Work] = {}
    while more or pending:
        limit = _QUEUED_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while more and len(pending) < limit:
            case = next(source, None)
            if case is None:
                more = False
            else:
                pending[task.remote(case, here)] = case
        if not pending:
            break
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        if not done:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=TICK_S)
        rows = []
        for reference in done:
            case = pending.pop(reference)
            try:
                rows.append(ray.get(reference))
            except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError) as error:
                rows.append(crashed(case, f"the worker process died ({type(error).__name__})"))
            except exceptions.RayTaskError as error:
                raise KvsimError(f"--ray: {_last_line(error.cause if getattr(error, 'cause', None) else error)}") from None
            except exceptions.RayError as error:
                raise KvsimError(f"--ray: the cluster failed ({_last_line(error)}); run the sweep again to go on") from None
        yield rows


def _simulate_there(work: Work, wanted: dict[str, str]) -> dict[str, Any]:
    """On a node of the cluster."""
    found = versions()
    for package, version in wanted.items():
        if found[package] != version:
            raise KvsimError(f"a node of the cluster has {package} {found[package]}, this machine {version}; install the same")
    return simulate_case(work)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise KvsimError("--ray needs ray, which is not installed; pip install 'kvsim[ray]'") from error
    return ray
