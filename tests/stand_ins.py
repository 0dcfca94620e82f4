"""Plays gcloud, xpk, kubectl, sbatch and srun for tests of launch/, by the name it is called.

In the folder $STAND_INS it notes each call's arguments in `calls.jsonl`, reads from `plan.json` how
the world is to behave, and keeps how the world is in `state.json`. Commands for workers are run by
bash, each worker having a folder of `workers/` as its home and nothing of the caller's environment.

plan.json:
  workers       number of workers of a pod
  lives         per request for machines: the states that one look after another finds, the last
                one from then on; SUSPENDED takes the workers and what is on them away
  mains         per request, what gradjax.main does: exit with a status, or `hang`
  finish_after  looks at the workers after which those that hang exit with status 0
  node          state of the machines themselves once, while the request is ACTIVE
  unseen        looks at first that do not find a request that is there
  refuse        message with which a request is refused
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


def read(name: str) -> dict[str, Any]:
    file = FOLDER / name
    return json.loads(file.read_text()) if file.exists() else {}


plan = read("plan.json")
state = {"exists": False, "life": -1, "looks": 0, "statuses": 0} | read("state.json")


def leave(status: int = 0, *, output: str = "", error: str = "") -> NoReturn:
    """Ends the call, keeping the state."""
    (FOLDER / "state.json").write_text(json.dumps(state))
    print(output, end="")
    print(error, end="", file=sys.stderr)
    sys.exit(status)


def flag(arguments: list[str], name: str) -> str:
    """The value of --NAME=VALUE."""
    return next(a.partition("=")[2] for a in arguments if a.startswith(f"--{name}="))


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


def at(values: list[Any], index: int) -> Any:
    """One after another, the last one from then on."""
    return values[min(index, len(values) - 1)]


def gcloud(arguments: list[str]) -> None:
    match arguments:
        case ["compute", "tpus", "queued-resources", "create", *_]:
            if "refuse" in plan or state["exists"]:
                leave(1, error=plan.get("refuse", "ERROR: ALREADY_EXISTS\n"))
            state.update(exists=True, life=state["life"] + 1, looks=0)
            for index in range(plan["workers"]):
                make_worker(f"w-{index}", at(plan["mains"], state["life"]))
        case ["compute", "tpus", "queued-resources", "delete", *_]:
            state["exists"] = False
            kill_workers()
        case ["compute", "tpus", "queued-resources", "describe", *rest]:
            if "failedData" in flag(rest, "format"):
                leave(output="no capacity\n")
            state["unseen"] = state.get("unseen", plan.get("unseen", 0)) - 1
            if not state["exists"] or state["unseen"] >= 0:
                leave(1, error="ERROR: NOT_FOUND: Resource was not found\n")
            found = at(at(plan["lives"], state["life"]), state["looks"])
            state["looks"] += 1
            if found == "SUSPENDED":
                kill_workers()
            leave(output=f"{found}\n")
        case ["compute", "tpus", "tpu-vm", "describe", *_]:
            leave(output=f"{plan.get('node', 'READY') if state['life'] == 0 else 'READY'}\n")
        case ["compute", "tpus", "tpu-vm", "ssh", _, *rest]:
            ssh(flag(rest, "command"), sorted(WORKERS.glob("*")))
        case ["compute", "tpus", "tpu-vm", "scp", *rest]:
            *sources, destination = [a for a in rest if not a.startswith("--")]
            worker = flag(rest, "worker")
            if worker != "all":
                shutil.copy(WORKERS / f"w-{worker}" / sources[0].partition(":")[2], destination)
            for home in WORKERS.glob("*") if worker == "all" else ():
                for source in sources:
                    shutil.copy(source, home / destination.partition(":")[2])
        case ["storage", "rsync", "--recursive", _, destination, *_]:
            (Path(destination) / "run.json").write_text("{}")
        case _:
            leave(2, error=f"unexpected: {arguments}\n")


def ssh(command: str, homes: list[Path]) -> None:
    if not homes:
        leave(1, error="ERROR: there is no such TPU\n")
    results = [bash(command, home) for home in homes]
    if "tpu_worker.sh status" in command:
        state["statuses"] += 1
        if state["statuses"] >= plan.get("finish_after", sys.maxsize):
            for home in homes:
                make_worker(home.name)
    output, error = ("".join(getattr(r, name) for r in results) for name in ("stdout", "stderr"))
    leave(max(result.returncode for result in results), output=output, error=error)


def xpk(arguments: list[str]) -> None:
    match arguments[:2]:
        case ["workload", "list"]:
            leave(output="Jobset Name\n")
        case ["workload", "delete"]:
            state["exists"] = False
        case ["workload", "create"]:
            if state["exists"]:
                leave(1, error="already exists, XPK will not create this workload\n")
            state.update(exists=True, jobset="StartupPolicyCompleted")
            shutil.rmtree(WORKERS / "pod", ignore_errors=True)
            shutil.copytree(flag(arguments, "script-dir"), WORKERS / "pod")
            files = [a.partition("=")[2] for a in arguments if a.startswith("--env-file=")]
            names = [name for file in files for name in Path(file).read_text().split()]
            # As Kubernetes reads a container's command.
            command = re.sub(r"\$\$|\$\(\w+\)", lambda m: m[0][:1], flag(arguments, "command"))
            environment = {name: os.environ[name] for name in names}
            result = bash(f"({command})", make_worker("pod"), **environment)
            leave(output="" if result.returncode == 0 else result.stderr)
        case _:
            leave(2, error=f"unexpected: {arguments}\n")


def kubectl(arguments: list[str]) -> None:
    if arguments[:2] == ["get", "jobset"] and state["exists"]:
        leave(output=f"{arguments[2]}:{state['jobset']}")


def sbatch(arguments: list[str]) -> None:
    script = next(i for i, a in enumerate(arguments) if a.endswith(".sbatch"))
    spool = shutil.copy(arguments[script], FOLDER / "slurm_script")
    job = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_CPUS_ON_NODE": "24"}
    names = {"--nodes": "SLURM_JOB_NUM_NODES", "--gpus": "SLURM_GPUS_ON_NODE"}
    for option in arguments[:script]:
        name, _, value = option.partition("=")
        job[names[name]] = value
    done = subprocess.run(["bash", spool, *arguments[script + 1 :]], env=os.environ | job)
    leave(done.returncode)


def srun(arguments: list[str]) -> None:
    count = next(i for i, a in enumerate(arguments) if not a.startswith("--"))
    options, command = arguments[:count], arguments[count:]
    nodes, per_node = int(flag(options, "nodes")), int(flag(options, "ntasks-per-node"))
    for task in range(nodes * per_node):
        there = {"HOME": str(make_worker(f"task-{task}")), "SLURM_LOCALID": str(task % per_node)}
        subprocess.run(command, env=os.environ | there, check=True)


if __name__ == "__main__":
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    with (FOLDER / "calls.jsonl").open("a") as file:
        file.write(json.dumps([name, *arguments]) + "\n")
    plays = {"gcloud": gcloud, "xpk": xpk, "kubectl": kubectl, "sbatch": sbatch, "srun": srun}
    plays[name](arguments)
    leave()
