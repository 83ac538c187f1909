"""Run a function on several gloo ranks, started from a server that has imported torch already."""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
#: The longest time that the ranks of one test may take, in seconds; a rank that waits for another is found by it.
LONGEST = 120


class RankFailedError(AssertionError):
    """A rank raised an error; the message has its traceback."""


def run_ranks(size: int, run: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a module-level function of a test module on each of ``size`` ranks of a new process group.

    Returns:
        What each rank returned.

    Raises:
        RankFailedError: a rank raised, ended, or did not end in time.
    """
    context = _find_server()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            given = (theirs, f"{folder}/store", rank, size, _find_name(run), args)
            process = context.Process(target=_run, args=given, daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            return _collect(pipes, processes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _find_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["adapter_compiler.integrations.fsdp", "torch._dynamo", "tests.integrations.fsdp.runs"]
    )
    return context


def _find_name(run: Callable[..., Any]) -> tuple[str, str]:
    """The module of a function by its path from the root, as pytest gives test modules other names."""
    path = Path(inspect.getfile(run)).relative_to(ROOT).with_suffix("")
    return ".".join(path.parts), run.__qualname__


def _collect(pipes: Sequence[Connection], processes: Sequence[BaseProcess]) -> list[Any]:
    results: dict[int, Any] = {}
    errors: list[str] = []
    end = time.monotonic() + LONGEST
    waiting = {id(pipe): rank for rank, pipe in enumerate(pipes)}
    while waiting and not errors:
        ready = wait([pipe for pipe in pipes if id(pipe) in waiting], timeout=max(0.0, end - time.monotonic()))
        if not ready:
            errors.append(f"ranks {sorted(waiting.values())} did not end in {LONGEST} s")
        for pipe in ready:
            rank = waiting.pop(id(pipe))
            try:
                is_right, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                is_right, value = False, f"ended with code {processes[rank].exitcode}"
            if is_right:
                results[rank] = value
            else:
                errors.append(f"rank {rank}: {value}")
    if errors:
        raise RankFailedError("\n".join(errors))
    return [results[rank] for rank in range(len(pipes))]


def _run(pipe: Connection, store: str, rank: int, size: int, name: tuple[str, str], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    try:
        run = getattr(importlib.import_module(name[0]), name[1])
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        _send(pipe, True, run(*args))
    except BaseException:
        _send(pipe, False, traceback.format_exc())
    finally:
        pipe.close()
        os._exit(0)  # without waiting for a rank that failed


def _send(pipe: Connection, is_right: bool, value: Any) -> None:
    """Send a value in a pickle of its own; torch's would share the memory of tensors, which ends with the rank."""
    pipe.send_bytes(pickle.dumps((is_right, value)))
