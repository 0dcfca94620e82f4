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
from typing import Any

FOLDER = Path(os.environ["STAND_INS"])
WORKERS = FOLDER / "workers"


def read(name: str) -> dict[str, Any]:
    file = FOLDER / name
    return json.loads(file.read_text()) if file.exists() else {}


plan = read("plan.json")
state = {"exists": False, "life": -1, "looks": 0, "statuses": 0} | read("state.json")


def leave(status: int = 0, *, output: str = "", error: str = "") -> None:
    """Ends the call, keeping the state."""
    (FOLDER / "state.json").write_text(json.dumps(state))
    print(output, end="")
    print(error, end="", file=sys.stderr)
    sys.exit(status)


def flag(arguments: list[str], name: str) -> str:
    """The value of --NAME=VALUE."""
    return next(a.partition("=")[2] for a in arguments if a.startswith(f"--{name}="))


def for_life(name: str) -> Any:
    values = plan[name]
    return values[min(state["life"], len(values) - 1)]


# --- Machines ---


def make_workers() -> None:
    for index in range(plan["workers"]):
        home = WORKERS / f"w-{index}"
        home.mkdir(parents=True)
        (home / "behaviour").write_text(str(for_life("mains")))


def kill_workers() -> None:
    for file in WORKERS.glob("*/gradjax/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)
    shutil.rmtree(WORKERS, ignore_errors=True)


def bash(command: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command on another machine, of which only HOME and PATH are known."""
    given = {"HOME": str(home), "PATH": os.environ["WORKER_PATH"], "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=home,
        env=given | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def request(arguments: list[str]) -> None:
    match arguments[0]:
        case "create":
            if "refuse" in plan:
                leave(1, error=plan["refuse"])
            if state["exists"]:
                leave(1, error="ERROR: ALREADY_EXISTS\n")
            state.update(exists=True, life=state["life"] + 1, looks=0)
            make_workers()
        case "delete":
            state["exists"] = False
            kill_workers()
        case "describe" if "failedData" in flag(arguments, "format"):
            leave(output="no capacity\n")
        case "describe":
            state["unseen"] = state.get("unseen", plan.get("unseen", 0)) - 1
            if not state["exists"] or state["unseen"] >= 0:
                leave(1, error="ERROR: NOT_FOUND: Resource was not found\n")
            states = for_life("lives")
            found = states[min(state["looks"], len(states) - 1)]
            state["looks"] += 1
            if found == "SUSPENDED":
                kill_workers()
            leave(output=found + "\n")
    leave()


def ssh(arguments: list[str]) -> None:
    homes = sorted(WORKERS.glob("*"))
    command = flag(arguments, "command")
    if not homes:
        leave(1, error="ERROR: there is no such TPU\n")
    results = [bash(command, home) for home in homes]
    if "tpu_worker.sh status" in command:
        state["statuses"] += 1
        if state["statuses"] >= plan.get("finish_after", sys.maxsize):
            for home in homes:
                (home / "behaviour").write_text("0")
    leave(
        max(result.returncode for result in results),
        output="".join(result.stdout for result in results),
        error="".join(result.stderr for result in results),
    )


def scp(arguments: list[str]) -> None:
    *sources, destination = [a for a in arguments if not a.startswith("--")]
    worker = flag(arguments, "worker")
    if worker == "all":
        for home in WORKERS.glob("*"):
            for source in sources:
                shutil.copy(source, home / destination.partition(":")[2])
    else:
        shutil.copy(WORKERS / f"w-{worker}" / sources[0].partition(":")[2], destination)
    leave()


def gcloud(arguments: list[str]) -> None:
    match arguments:
        case ["compute", "tpus", "queued-resources", *rest]:
            request(rest)
        case ["compute", "tpus", "tpu-vm", "describe", *_]:
            node = plan.get("node", "READY") if state["life"] == 0 else "READY"
            leave(output=node + "\n")
        case ["compute", "tpus", "tpu-vm", "ssh", _, *rest]:
            ssh(rest)
        case ["compute", "tpus", "tpu-vm", "scp", *rest]:
            scp(rest)
        case ["storage", "rsync", "--recursive", _, destination, *_]:
            (Path(destination) / "run.json").write_text("{}")
            leave()
    leave(2, error=f"unexpected: {arguments}\n")


# --- A cluster ---


def xpk(arguments: list[str]) -> None:
    match arguments[:2]:
        case ["workload", "list"]:
            leave(output="Jobset Name\n")
        case ["workload", "delete"]:
            state["exists"] = False
            leave()
        case ["workload", "create"]:
            if state["exists"]:
                leave(1, error="already exists, XPK will not create this workload\n")
            state.update(exists=True, jobset="StartupPolicyCompleted")
            pod = WORKERS / "pod"
            shutil.rmtree(pod, ignore_errors=True)
            shutil.copytree(flag(arguments, "script-dir"), pod)
            (pod / "behaviour").write_text("0")
            environment = {}
            if any(a.startswith("--env-file=") for a in arguments):
                names = Path(flag(arguments, "env-file")).read_text().split()
                environment = {name: os.environ[name] for name in names}
            # As Kubernetes reads a container's command.
            command = re.sub(r"\$\$|\$\(\w+\)", lambda m: m[0][:1], flag(arguments, "command"))
            result = bash(f"({command})", pod, **environment)
            leave(output="" if result.returncode == 0 else result.stderr)
    leave(2, error=f"unexpected: {arguments}\n")


def kubectl(arguments: list[str]) -> None:
    if arguments[:2] == ["get", "jobset"] and state["exists"]:
        leave(output=f"{arguments[2]}:{state['jobset']}")
    leave()


# --- Slurm ---


def sbatch(arguments: list[str]) -> None:
    script = next(i for i, a in enumerate(arguments) if a.endswith(".sbatch"))
    options, rest = arguments[:script], arguments[script + 1 :]
    spool = FOLDER / "slurm_script"
    shutil.copy(arguments[script], spool)
    job = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_CPUS_ON_NODE": "24"}
    for option in options:
        name, _, value = option.removeprefix("--").partition("=")
        job |= {"nodes": {"SLURM_JOB_NUM_NODES": value}, "gpus": {"SLURM_GPUS_ON_NODE": value}}[
            name
        ]
    leave(subprocess.run(["bash", spool, *rest], env=os.environ | job).returncode)


def srun(arguments: list[str]) -> None:
    count = next(i for i, a in enumerate(arguments) if not a.startswith("--"))
    options, command = arguments[:count], arguments[count:]
    nodes, per_node = int(flag(options, "nodes")), int(flag(options, "ntasks-per-node"))
    for task in range(nodes * per_node):
        home = WORKERS / f"task-{task}"
        home.mkdir(parents=True)
        (home / "behaviour").write_text("0")
        environment = {"HOME": str(home), "SLURM_LOCALID": str(task % per_node)}
        subprocess.run(command, env=os.environ | environment, check=True)
    leave()


if __name__ == "__main__":
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    with (FOLDER / "calls.jsonl").open("a") as file:
        file.write(json.dumps([name, *arguments]) + "\n")
    plays = {"gcloud": gcloud, "xpk": xpk, "kubectl": kubectl, "sbatch": sbatch, "srun": srun}
    plays[name](arguments)
