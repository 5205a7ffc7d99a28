"""Start a command on several devices, by torch's elastic launcher; under another launcher take the place it gives.

``vlmtune train recipe.yaml --devices 8`` starts the processes itself. ``torchrun -m vlmtune.cli train ...``,
``accelerate launch -m vlmtune.cli train ...`` and ``srun --ntasks-per-node=8 vlmtune train ...`` have started them
already; each then finds its number in the environment.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmtune.cli.common import SAVED_AND_STOPPED, recipe_and_flags
from vlmtune.config.devices import DeviceOptions
from vlmtune.config.secrets import redact
from vlmtune.errors import ConfigError, StoppedBySignal, VlmtuneError

logger = logging.getLogger("vlmtune.launch")

# torch's launcher names the file in which a process leaves why it stopped; ours reads it, and alone sets the second.
ERROR_FILE, STARTED_HERE = "TORCHELASTIC_ERROR_FILE", "VLMTUNE_LAUNCHED"
# Time to finish a step and save after a signal; the same time ends the others when a process dies.
SECONDS_TO_STOP = 60
# What ranks say whose neighbour is gone: never the reason.
LOST_PEER = re.compile(r"closed by peer|reset by peer|NCCL|gloo|Broken pipe|heartbeat", re.IGNORECASE)


def in_a_group() -> bool:
    """Whether a launcher has given this process its place."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return this process's number, 0 where it is the only one."""
    return int(os.environ.get("RANK") or 0)


def leave_group() -> None:
    """End this process's connections to the others, where it has any and its work with them is done.

    Without it the interpreter now and then exits while gloo's thread lets go of the last message's Python objects,
    and the process is aborted after all its work ("terminate called without an active exception").
    """
    distributed = sys.modules.get("torch.distributed")
    if in_a_group() and distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def on_devices(command: str, argv: list[str], classes: Sequence[type], places: Sequence[str] = ()) -> int | None:
    """Run a command on the devices that its options ask for.

    Args:
        command: its name.
        argv: what follows it.
        classes: of all options that may stand there or in the recipe.
        places: what stands between the command and ``argv``, where that is options alone.

    Returns:
        The exit code, or ``None`` where this process is to do the work.

    Raises:
        ConfigError: devices that are not there, or nodes that cannot meet.
    """
    if in_a_group():
        return None
    options = _asked(argv, classes)
    slurm = slurm_place(os.environ)
    if slurm and (slurm["LOCAL_WORLD_SIZE"] != "1" or (options.devices or 1) == 1):
        os.environ.update(slurm)
        return None
    devices, nodes, rendezvous = options.devices or 1, options.nodes, options.rendezvous
    if slurm:
        # One task a node starts the processes of its node.
        nodes = nodes or int(slurm["WORLD_SIZE"])
        rendezvous = rendezvous or f"{slurm['MASTER_ADDR']}:{slurm['MASTER_PORT']}"
    nodes = nodes or 1
    if devices == nodes == 1 and rendezvous is None:
        return None
    require_devices(devices)
    require_rendezvous(nodes, rendezvous)
    debug = ["--debug"] if "--debug" in sys.argv else []
    return _launch([sys.executable, "-m", "vlmtune.cli", command, *places, *argv, *debug], devices, nodes, rendezvous)


def _asked(argv: list[str], classes: Sequence[type]) -> DeviceOptions:
    """Read the options; what is wrong with any of them, the command itself reports together."""
    from vlmtune.config.recipe import parse_arguments

    recipe_path, flags = recipe_and_flags(argv)
    try:
        options: DeviceOptions = parse_arguments([DeviceOptions], flags, recipe_path, ignored=classes)[0]
    except ConfigError:
        return DeviceOptions()
    return options


def require_devices(devices: int) -> None:
    """Refuse more devices than this machine has; a machine without any runs processes on its CPU.

    Raises:
        ConfigError: there are fewer.
    """
    import torch

    there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if there and devices > there:
        raise ConfigError(
            f"devices is {devices}, but this machine has {there} (CUDA_VISIBLE_DEVICES can hide some). "
            f"Use at most {there}, or more nodes."
        )


def require_rendezvous(nodes: int, rendezvous: str | None) -> None:
    """Check that several nodes have a place to meet.

    Raises:
        ConfigError: they have none, or it is not ``host:port``.
    """
    if nodes > 1 and rendezvous is None:
        raise ConfigError(
            f"nodes is {nodes}, but rendezvous is not set. Name one of the nodes and a free port, the same on each: "
            "--rendezvous host:29500."
        )
    if rendezvous is not None and not re.fullmatch(r"(\[.+\]|[^:\s]+):\d{1,5}", rendezvous):
        raise ConfigError(f"rendezvous is {rendezvous!r}; it takes host:port, such as node1:29500.")


def slurm_place(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the place that ``srun`` gave this process, in torch's variables, or ``None`` outside of one.

    A batch script has ``SLURM_NTASKS`` too, but only the tasks of a step are started that many times.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) < 2:
        return None
    here = _tasks_here(environment)
    port = 20_000 + int(environment.get("SLURM_JOB_ID") or 0) % 20_000
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST") or "localhost"),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks on this node, from a list such as ``2(x3),1``: three nodes with 2 and one with 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [int(count)] * int(times or 1)
    return counts[int(environment.get("SLURM_NODEID") or 0)]


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's list, such as ``gpu007`` of ``gpu[007-010,012],cpu1``."""
    return re.sub(r"\[(\d+)[^\]]*\].*", r"\1", nodes) if "[" in nodes.partition(",")[0] else nodes.partition(",")[0]


def _launch(command: list[str], devices: int, nodes: int, rendezvous: str | None) -> int:
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[STARTED_HERE] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    # Each process would take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // devices)))
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    what = "devices" if torch.accelerator.is_available() else "processes on the CPU"
    logger.info("starting %d %s%s", devices, what, f" on each of {nodes} nodes" if nodes > 1 else "")
    with tempfile.TemporaryDirectory(prefix="vlmtune-") as logs:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=devices,
            rdzv_backend="c10d",
            rdzv_endpoint=rendezvous or "localhost:0",
            # Nodes that meet at one place belong to one run.
            run_id=f"vlmtune-{rendezvous or os.getpid()}",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            return _say_why(error.failures, devices * nodes)
        except SignalException as received:
            # By now the processes have had their time to save.
            left = [_told(json.loads(file.read_text())) for file in Path(logs).rglob("error.json")]
            return _say_stopped(left) or 128 + int(received.sigval)
        except (RuntimeError, OSError, ValueError) as error:
            raise VlmtuneError(
                f"The nodes could not meet at {rendezvous}: {' '.join(str(error).split())}. The host must be one of "
                "the nodes, its port free and reachable from the others, and the command started on all of them."
            ) from error
    return 0


def _say_stopped(left: Iterable[dict[str, Any]]) -> int:
    """Print that a signal ended the run after a checkpoint and return its exit code; 0 where it was not so.

    All ranks agree on the step before they save and wait for one another after it, so one that says it speaks for all.
    """
    stopped = next((told for told in left if told.get("stopped")), None)
    if stopped is None:
        return 0
    print(f"stopped: {stopped['text']}", file=sys.stderr)
    return SAVED_AND_STOPPED


def _say_why(failures: Mapping[int, Any], processes: int) -> int:
    """Print why the first process stopped, which ended the others, and return its exit code."""
    if code := _say_stopped(_told(failure.error_file_data) for failure in failures.values()):
        return code
    number, failure = min(failures.items(), key=_order)
    told, code = _told(failure.error_file_data), int(failure.exitcode)
    if code < 0:
        name = signal.Signals(-code).name
        why = " The system kills a process that takes too much memory (`dmesg` says so)." if name == "SIGKILL" else ""
        message = f"Rank {number} of {processes} (process {failure.pid}) was ended by {name}.{why}"
    elif told.get("known"):
        message = told["text"]
    else:
        message = f"Rank {number} of {processes} stopped: {told.get('text', f'exit code {code}')}"
        print(told.get("traceback", ""), file=sys.stderr, end="")
    alike = [n for n, other in failures.items() if _told(other.error_file_data).get("text") == told.get("text", "")]
    if told.get("known") and len(alike) < processes:
        message += f" (Rank {number} of {processes} found it, and the others were ended.)"
    elif not told.get("known"):
        message += " The others were ended. Go on from the last checkpoint by the same command."
    print(f"error: {message}", file=sys.stderr)
    return code if code > 0 else 128 - code


def _order(failure: tuple[int, Any]) -> tuple[bool, bool, float]:
    """The reason comes first: not one that was ended for it, nor one that lost its peer; else the earliest."""
    found = failure[1]
    told = _told(found.error_file_data)
    ended = found.exitcode == -signal.SIGTERM
    lost = bool(LOST_PEER.search(told.get("text", ""))) or found.exitcode == -signal.SIGABRT
    return ended, lost, float(told.get("moment", found.timestamp))


def _told(file: Mapping[str, Any]) -> dict[str, Any]:
    found = file.get("message")
    return found.get("vlmtune", {}) if isinstance(found, dict) else {}


def leave_reason(error: BaseException) -> bool:
    """Leave why this process stops for the launcher, and return whether it is ours, which prints it once for all."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return False
    moment = time.time()
    text = redact(str(error) if isinstance(error, VlmtuneError) else f"{type(error).__name__}: {error}")
    stack = redact(traceback.format_exc())
    told = {"text": text, "known": isinstance(error, VlmtuneError), "moment": moment, "traceback": stack}
    told["stopped"] = isinstance(error, StoppedBySignal)
    # The layout that torch's launcher reads.
    extra = {"py_callstack": stack, "timestamp": str(int(moment))}
    Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra, "vlmtune": told}}))
    return STARTED_HERE in os.environ
