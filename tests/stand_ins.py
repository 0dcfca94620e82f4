"""Plays gcloud, xpk, kubectl, sbatch and srun for tests of launch/, by the name it is called.

In the folder $STAND_INS it notes each call's arguments in `calls.jsonl`, and keeps in `world.json`
how the world is and will behave. Commands for workers are run by bash, each worker having a folder
of `workers/` as its home and nothing of the caller's environment.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

FOLDER = Path(os.environ["STAND_INS"])
WORKERS = FOLDER / "workers"
world = {
    "workers": 2,  # of a pod
    # Per request for machines: the states that one look after another finds, the last one from then
    # on; SUSPENDED takes the workers and what is on them away.
    "lives": [["ACTIVE"]],
    "mains": [0],  # per request, what gradjax.main does: exit with a status, or `hang`
    "finish_after": sys.maxsize,  # looks at the workers after which those that hang exit with 0
    "node": "READY",  # state of the first machines themselves, while the request is ACTIVE
    "refuse": "",  # message with which a request is refused
    "unseen": 0,  # looks that do not find a request that is there
    "unheard": 0,  # looks at workers that have all ended well, which the last does not answer
    "copy": 0,  # exit status of a copy of results
} | {"exists": False, "life": -1, "looks": 0, "statuses": 0}
with contextlib.suppress(FileNotFoundError):
    world |= json.loads((FOLDER / "world.json").read_text())


def leave(status: int = 0, *, output: str = "", error: str = "") -> NoReturn:
    """Ends the call, keeping the world."""
    (FOLDER / "world.json").write_text(json.dumps(world))
    print(output, end="")
    print(error, end="", file=sys.stderr)
    sys.exit(status)


def flags(arguments: list[str], name: str) -> list[str]:
    """The values of --NAME=VALUE."""
    return [a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")]


def at(values: list[Any], index: int) -> Any:
    """One after another, the last one from then on."""
    return values[min(index, len(values) - 1)]


def make_worker(name: str, behaviour: object = 0) -> Path:
    home = WORKERS / name
    home.mkdir(parents=True, exist_ok=True)
    (home / "behaviour").write_text(str(behaviour))
    return home


def kill_workers() -> None:
    for file in WORKERS.glob("*/gradjax/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)
    shutil.rmtree(WORKERS, ignore_errors=True)


def bash(command: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command on another machine, of which only HOME and PATH are known."""
    given = {"HOME": str(home), "PATH": os.environ["WORKER_PATH"], "LC_ALL": "C.UTF-8"}
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(["bash", "-c", command], cwd=home, env=given | environment, **pipes)


def play(call: list[str]) -> None:
    match call:
        case ["gcloud", "compute", "tpus", "queued-resources", "create", *_]:
            if world["refuse"] or world["exists"]:
                leave(1, error=world["refuse"] or "ERROR: ALREADY_EXISTS\n")
            world.update(exists=True, life=world["life"] + 1, looks=0)
            for index in range(world["workers"]):
                make_worker(f"w-{index}", at(world["mains"], world["life"]))
        case ["gcloud", "compute", "tpus", "queued-resources", "delete", *_]:
            world["exists"] = False
            kill_workers()
        case ["gcloud", "compute", "tpus", "queued-resources", "describe", *_, what]:
            if "failedData" in what:
                leave(output="no capacity\n")
            world["unseen"] -= 1
            if not world["exists"] or world["unseen"] >= 0:
                leave(1, error="ERROR: NOT_FOUND: Resource was not found\n")
            found = at(at(world["lives"], world["life"]), world["looks"])
            world["looks"] += 1
            if found == "SUSPENDED":
                kill_workers()
            leave(output=f"{found}\n")
        case ["gcloud", "compute", "tpus", "tpu-vm", "describe", *_]:
            node = world["node"] if world["life"] == 0 else "READY"
            leave(output=f"{node}\t{world['workers']}\n")
        case ["gcloud", "compute", "tpus", "tpu-vm", "ssh", *_, command]:
            if not (homes := sorted(WORKERS.glob("*"))):
                leave(1, error="ERROR: there is no such TPU\n")
            done = [bash(command.removeprefix("--command="), home) for home in homes]
            world["statuses"] += "tpu_worker.sh status" in command
            if all(one.stdout.endswith(" exited 0\n") for one in done):
                world["unheard"] -= 1
                done = done[:-1] if world["unheard"] >= 0 else done
            if world["statuses"] >= world["finish_after"]:
                for home in homes:
                    make_worker(home.name)
            output = "".join(one.stdout for one in done)
            error = "".join(one.stderr for one in done)
            leave(max(one.returncode for one in done), output=output, error=error)
        case ["gcloud", "compute", "tpus", "tpu-vm", "scp", *arguments]:
            *sources, destination = [a for a in arguments if not a.startswith("--")]
            (worker,) = flags(arguments, "worker")
            if worker != "all":
                shutil.copy(WORKERS / f"w-{worker}" / sources[0].partition(":")[2], destination)
            for home in WORKERS.glob("*") if worker == "all" else ():
                for source in sources:
                    shutil.copy(source, home / destination.partition(":")[2])
        case ["gcloud", "storage", "rsync", "--recursive", _, destination, *_]:
            if world["copy"]:
                leave(world["copy"], error="ERROR: no such bucket\n")
            (Path(destination) / "run.json").write_text("{}")
        case ["xpk", "workload", "list", *_]:
            leave(output="Jobset Name\n")
        case ["xpk", "workload", "delete", *_]:
            world["exists"] = False
        case ["xpk", "workload", "create", *arguments]:
            if world["exists"]:
                leave(1, error="already exists, XPK will not create this workload\n")
            world.update(exists=True, jobset="StartupPolicyCompleted")
            shutil.rmtree(WORKERS / "pod", ignore_errors=True)
            (folder,) = flags(arguments, "script-dir")
            shutil.copytree(folder, WORKERS / "pod")
            files = map(Path, flags(arguments, "env-file"))
            names = [name for file in files for name in file.read_text().split()]
            (command,) = flags(arguments, "command")
            # As Kubernetes reads a container's command.
            command = re.sub(r"\$\$|\$\(\w+\)", lambda m: m[0][:1], command)
            environment = {name: os.environ[name] for name in names}
            home = make_worker("pod", world["mains"][0])
            (restarts,) = map(int, flags(arguments, "max-restarts"))
            result = bash(f"({command})", home, **environment)
            # As xpk's pod failure policy and JobSet's restarts have it.
            while restarts and result.returncode in (42, *range(127, 256)):
                restarts -= 1
                result = bash(f"({command})", home, **environment)
            if result.returncode:
                world["jobset"] = "Failed"
            leave(output="" if result.returncode == 0 else result.stderr)
        case ["kubectl", "get", "jobset", name, *_]:
            leave(output=f"{name}:{world['jobset']}" if world["exists"] else "")
        case ["kubectl", *_]:
            pass
        case ["sbatch", *arguments]:
            script = next(i for i, a in enumerate(arguments) if a.endswith(".sbatch"))
            spool = shutil.copy(arguments[script], FOLDER / "slurm_script")
            job = {
                "SLURM_JOB_ID": "17",
                "SLURM_SUBMIT_DIR": os.getcwd(),
                "SLURM_CPUS_ON_NODE": "24",
            }
            names = {"--nodes": "SLURM_JOB_NUM_NODES", "--gpus": "SLURM_GPUS_ON_NODE"}
            for name, _, value in (option.partition("=") for option in arguments[:script]):
                job[names[name]] = value
            done = subprocess.run(["bash", spool, *arguments[script + 1 :]], env=os.environ | job)
            leave(done.returncode)
        case ["srun", *arguments]:
            count = next(i for i, a in enumerate(arguments) if not a.startswith("--"))
            for task in range(int(*flags(arguments[:count], "ntasks"))):
                there = {"HOME": str(make_worker(f"task-{task}"))}
                subprocess.run(arguments[count:], env=os.environ | there, check=True)
        case _:
            leave(2, error=f"unexpected: {call}\n")


call = [Path(sys.argv[0]).name, *sys.argv[1:]]
with (FOLDER / "calls.jsonl").open("a") as file:
    file.write(json.dumps(call) + "\n")
play(call)
leave()
