"""launch/tpu_pod.sh, gke_xpk.sh and slurm.sbatch against stand-ins for the tools that they call.

What a stand-in is told to run elsewhere is run for real, up to a Python that only pretends: flags,
files and keys are checked where gradjax.main would get them.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fake_endpoint import wait_until

ROOT = Path(__file__).parent.parent
TOKEN = "hf_never_to_be_shown"
# Everything on the machines but what is played. Nothing else is on PATH, real tools least of all.
TOOLS = (
    *("bash", "cat", "cmp", "cp", "date", "dirname", "env", "flock", "git", "grep", "gzip"),
    *("mkdir", "mv", "rm", "sed", "seq", "setsid", "sleep", "sort", "tail", "tar", "tee"),
    *("touch", "wc"),
)
PLAYED = ("gcloud", "xpk", "kubectl", "docker", "sbatch", "srun")
# Makes environments that hold only itself; as gradjax.main it leaves word of how it was called.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  "-c "* | "-m pip "*) ;;
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-P -m gradjax.main "*)
    printf '%s\0' "$PWD" "${HF_TOKEN-}" "${JAX_LOCAL_DEVICE_IDS-}" "${@:4}" >"$HOME/call"
    echo start >>"$HOME/starts"
    echo "a line of the log"
    while [[ $(cat "$HOME/behaviour") == hang ]]; do sleep 0.05; done
    if [[ $(cat "$HOME/behaviour") == killed ]]; then kill -KILL $$; fi
    exit "$(cat "$HOME/behaviour")"
    ;;
  *) echo "unexpected: $*" >&2; exit 2 ;;
esac
"""
OLD_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  "-c "*) exit 1 ;;
  "-m pip install --quiet --user uv") touch "$HOME/uv" ;;
  "-m uv python install 3.12") [[ -e $HOME/uv ]] && cp "${0%/*}/newer" "$HOME/newer" ;;
  "-m uv python find "*" 3.12") echo "$HOME/newer" ;;
  *) exit 2 ;;
esac
"""
# Flags that quoting spoils easily, and the files that they name.
DIFFICULT = [
    *("--model=org/name", "--data=good=rows of mine/high 'quality'.jsonl"),
    '--layers= a  b\t$(HOME) $HOME $$ `id` \\ "quoted" * ? {x,y} é 数 !',
    *("--prompt_format=first\nsecond=third", "--flagfile=my.flags", "--limit", "7", ""),
]
FILES = {
    "low.jsonl": "another row",
    "my.flags": "# mine\n  --data=low=low.jsonl\n--dtype=float32\n",
    "rows of mine/high 'quality'.jsonl": "a row",
}
TPU = ("--zone=us-west4-a", "--project=p", "--type=v5litepod-16")
GKE = ("--cluster=c", *TPU)
BUCKET = "--output_dir=gs://bucket/a run"
AUTO = "--coordinator_address=auto"
CREATE, DELETE = "gcloud queued-resources create", "gcloud queued-resources delete"


def write_executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Lab:
    """A repository, a directory to call from, and the machines that are played."""

    def __init__(self, folder: Path, repository: Path):
        self.folder, self.repository = folder, shutil.copytree(repository, folder / "a repository")
        names = ("here", "played", "tools", "worker")
        self.here, self.played, self.tools, self.worker = (folder / name for name in names)
        for directory in (self.here / "rows of mine", self.played, self.tools, self.worker):
            directory.mkdir(parents=True)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.tools / tool).symlink_to(found)
        program = f"#!{sys.executable} -IS\n" + (ROOT / "tests" / "stand_ins.py").read_text()
        for name in PLAYED:
            write_executable(self.played / name, program)
        write_executable(self.worker / "python3.11", FAKE_PYTHON)
        write_executable(self.worker / "hostname", '#!/usr/bin/env bash\necho "${HOME##*/}"\n')
        for name, text in FILES.items():
            (self.here / name).write_text(text)
        self.all_tools = f"{self.played}:{self.worker}:{self.tools}"  # where this is a worker too
        self.environment = {
            "PATH": f"{self.played}:{self.tools}",
            "WORKER_PATH": f"{self.worker}:{self.tools}",
            "STAND_INS": str(folder),
            "HOME": str(folder),
            "HF_TOKEN": TOKEN,
            "POLL_SECONDS": "0.05",
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_GLOBAL": os.devnull,
        }

    def world(self, **values: Any) -> None:
        """Changes how the world is and will behave; see stand_ins.py."""
        file = self.folder / "world.json"
        world = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(world | values))

    def calls(self, word: str = "") -> list[list[str]]:
        """What was called, with its arguments; with a word, only the calls that have it."""
        file = self.folder / "calls.jsonl"
        calls = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
        return [call for call in calls if not word or word in call]

    def verbs(self) -> list[str]:
        """What was asked of gcloud, xpk and so on, without looks at how things are."""
        verbs = []
        for name, *arguments in self.calls():
            command = next((a for a in arguments if a.startswith("--command=")), "")
            words = command.partition("tpu_worker.sh ")[2].split()
            verb = " ".join([name, *(a for a in arguments[:4] if a[0] != "-" and "://" not in a)])
            verbs.append(words[0] if name == "gcloud" and words else verb)
        looks = ("status", "gcloud compute tpus tpu-vm ssh")
        verbs = [v for v in verbs if "describe" not in v and not v.startswith(looks)]
        return [verb.replace("compute tpus ", "") for verb in verbs]

    def call(
        self, *command: str | Path, status: int = 0, cwd: Path | None = None, **environment: str
    ) -> SimpleNamespace:
        """Runs a command and checks its exit status, and that the key stayed hidden."""
        result = subprocess.run(
            command,
            cwd=cwd or self.here,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=40,
        )
        assert result.returncode == status, result.stdout + result.stderr
        assert TOKEN not in result.stdout + result.stderr + json.dumps(self.calls())
        return SimpleNamespace(out=result.stdout, err=result.stderr)

    def launch(self, script: str, *arguments: str, **options: Any) -> SimpleNamespace:
        return self.call("bash", self.repository / "launch" / script, *arguments, **options)

    def tpu(self, command: str, *flags: str, status: int = 0) -> SimpleNamespace:
        given = [command, *TPU, "--spot", "--", *(flags or ("--model=demo",)), BUCKET]
        return self.launch("tpu_pod.sh", *given, status=status)

    def gke(self, command: str, *flags: str) -> SimpleNamespace:
        given = [command, *GKE, "--num_slices=2", "--", *(flags or ("--model=demo",)), BUCKET]
        return self.launch("gke_xpk.sh", *given)

    def homes(self, wait: bool = False) -> list[Path]:
        """The workers' home directories; perhaps once gradjax.main has been started on each."""
        homes = sorted((self.folder / "workers").glob("*"))
        if wait:
            wait_until(lambda: all((home / "starts").exists() for home in homes))
        return homes

    def runs(self, wait: bool = False) -> list[SimpleNamespace]:
        """How gradjax.main was called, worker by worker."""
        runs = []
        for home in self.homes(wait):
            directory, token, devices, *argv, _ = (home / "call").read_text().split("\0")
            assert token == TOKEN
            runs.append(SimpleNamespace(directory=Path(directory), devices=devices, argv=argv))
        return runs

    def kill(self, home: Path) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.killpg(int((home / "gradjax" / "pid").read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository with what is launched, all of it committed."""
    folder = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=ignore)
    for file in (ROOT / "pyproject.toml", *ROOT.glob("requirements*.txt")):
        shutil.copy(file, folder)
    (folder / ".gitignore").write_text("build/\n.venv/\n")
    who = ["-c", "user.name=name", "-c", "user.email=a@b"]
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
    for command in ("init --quiet", "add .", "commit --quiet --message=all"):
        subprocess.run(["git", *who, *command.split()], cwd=folder, env=environment, check=True)
    return folder


@pytest.fixture
def lab(tmp_path, repository):
    lab = Lab(tmp_path, repository)
    yield lab
    for home in lab.homes():
        lab.kill(home)


# --- All of them ---


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke_xpk.sh", "slurm.sbatch"])
def test_help_shows_an_example_and_calls_nothing(lab: Lab, script: str):
    for given in (["--help"], ["--help"] if script == "slurm.sbatch" else ["run", "--help"]):
        shown = lab.launch(script, *given, PATH=str(lab.tools)).out
        for word in (f"launch/{script}", "--model=qwen2.5_7b", "--dry_run"):
            assert word in shown
    assert lab.calls() == []


@pytest.mark.parametrize(
    ("command", "settings", "expected"),
    [
        ("tpu_pod.sh all", TPU, "create,scp,install,start,rsync,delete,ssh"),
        ("tpu_pod.sh up", TPU, "create"),
        ("tpu_pod.sh run", TPU, "scp,install,start"),
        ("tpu_pod.sh status", TPU, "describe,status"),
        ("tpu_pod.sh logs", TPU, "log"),
        ("tpu_pod.sh stop", TPU, "stop"),
        ("tpu_pod.sh collect", TPU, "storage rsync"),
        ("tpu_pod.sh delete", TPU, "delete"),
        ("gke_xpk.sh run", GKE, "git,tar,workload create"),
        ("gke_xpk.sh status", GKE, "workload list,kubectl get pods"),
        ("gke_xpk.sh logs", GKE, "kubectl logs"),
        ("gke_xpk.sh delete", GKE, "workload delete"),
        ("slurm.sbatch", ("--per=gpu",), "sbatch,ensure_environment,srun"),
    ],
)
def test_dry_run_shows_commands_and_runs_none(lab: Lab, command, settings, expected):
    before = sorted(lab.folder.rglob("*"))
    script, *verb = command.split()
    given = [*verb, *settings, "--dry_run", *(["--"] if verb else []), *DIFFICULT, BUCKET]
    result = lab.launch(script, *given, PATH=str(lab.tools))
    assert result.err == ""
    assert [words for words in expected.split(",") if words not in result.out] == []
    subprocess.run(["bash", "-n"], input=result.out, text=True, check=True)
    assert lab.calls() == []
    assert sorted(lab.folder.rglob("*")) == before


def refusal(lab: Lab, arguments: list[str]) -> str:
    """The one sentence with which a script ends before it calls anything."""
    said = lab.launch(*arguments, status=1).err
    assert said.startswith("gradjax: ")
    assert said.count("\n") == 1
    assert lab.calls() == []
    return said


RUN_TPU, RUN_GKE = ("tpu_pod.sh", "run", *TPU, "--"), ("gke_xpk.sh", "run", *GKE)
NO_FILE, LOST = "there is no file no.jsonl here", "the workers' disks are lost"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpu_pod.sh", "up"], "--zone is not given; name the one"),
        (["tpu_pod.sh", "up", "--zone=z"], "--project is not given; name the one"),
        (["tpu_pod.sh", "up", *TPU[:2]], "--type is not given; name the accelerator"),
        (["tpu_pod.sh", "up", *TPU[:2], "--type=h100"], "--type=h100: expected a type like v5lite"),
        (["tpu_pod.sh", "up", *TPU, "--model=demo"], "--model=demo is not a setting of this"),
        (["tpu_pod.sh", "up", *TPU, "--zone"], "--zone: expected --zone=VALUE"),
        (["tpu_pod.sh", "up", *TPU, "--spot=yes"], "--spot=yes: expected --spot alone"),
        (["tpu_pod.sh", "up", *TPU, "--name=A/../b"], "--name=A/../b: expected up to 50 lower"),
        (["tpu_pod.sh", "fly", *TPU], "fly: expected all, up, run"),
        ([*RUN_TPU], f"--output_dir=: {LOST}"),
        ([*RUN_TPU, "--output_dir=runs/x"], f"--output_dir=runs/x: {LOST}"),
        ([*RUN_TPU, BUCKET, "--overwrite"], "--overwrite would throw finished rows"),
        ([*RUN_TPU, BUCKET, "--data=no.jsonl"], NO_FILE),
        ([*RUN_TPU, BUCKET, "--flagfile=no"], "--flagfile=no: there is no such file"),
        ([*RUN_TPU, BUCKET, "--data=a=../here/low.jsonl"], "call it from a directory"),
        ([*RUN_TPU, BUCKET, "--model", "rows of mine"], "a directory of this machine"),
        (["gke_xpk.sh", "run"], "--cluster is not given; name a cluster"),
        (["gke_xpk.sh", "run", *GKE[:1]], "--zone is not given; name the cluster's"),
        (["gke_xpk.sh", "run", *GKE[:3]], "--type is not given; name the accelerator"),
        ([*RUN_GKE, "--spot"], "--spot is not a setting of this script"),
        ([*RUN_GKE], f"--output_dir=: {LOST}"),
        (["gke_xpk.sh", "all", *GKE], "all: expected run, status, logs or delete"),
        (["slurm.sbatch", "--model=demo", "--overwrite"], "--overwrite would throw finished rows"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_anything_is_asked(lab: Lab, arguments, message):
    assert message in refusal(lab, arguments)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("gcloud", ["tpu_pod.sh", "up", *TPU]),
        ("gcloud", [*RUN_TPU, BUCKET]),
        ("docker", [*RUN_GKE, "--", BUCKET]),
        ("xpk", [*RUN_GKE, "--", BUCKET]),
        ("kubectl", ["gke_xpk.sh", "logs", *GKE]),
        ("sbatch", ["slurm.sbatch", "--model=demo"]),
    ],
)
def test_a_missing_tool_is_named(lab: Lab, tool, arguments):
    (lab.played / tool).unlink()
    assert refusal(lab, arguments).startswith(f"gradjax: there is no {tool} on PATH; ")


# --- TPU pods ---


def test_all_goes_from_the_request_to_the_end(lab: Lab):
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    lab.world(lives=[states], mains=["hang"], finish_after=3)
    result = lab.tpu("all")
    scp = "gcloud tpu-vm scp"
    rsync = "gcloud storage rsync"
    assert lab.verbs() == [CREATE, scp, "install", "start", rsync, scp, scp, DELETE]
    (create,) = lab.calls("create")
    assert create[5:] == [
        *("gradjax", "--zone=us-west4-a", "--project=p", "--node-id=gradjax"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    ]
    assert "gradjax: WAITING_FOR_RESOURCES\ngradjax: gradjax: PROVISIONING" in result.err
    assert (lab.here / "runs" / "gradjax" / "run.json").exists()
    for index in range(2):
        log = (lab.here / "runs" / "gradjax-logs" / f"worker-{index}.log").read_text()
        assert "a line of the log\ngradjax: exited with status 0" in log
    assert not lab.homes()


def test_flags_files_and_the_key_arrive_unharmed_on_a_pod(lab: Lab):
    lab.world(workers=3, mains=["hang"])
    lab.tpu("up")
    lab.tpu("run", *DIFFICULT)
    for home, run in zip(lab.homes(), lab.runs(wait=True), strict=True):
        assert run.argv == [AUTO, *DIFFICULT, BUCKET]
        directory = home / "gradjax"
        assert (directory.stat().st_mode | (directory / "environment").stat().st_mode) & 0o077 == 0
        assert run.directory == directory / "files"
        sent = [path for path in run.directory.rglob("*") if path.is_file()]
        assert {str(path.relative_to(run.directory)): path.read_text() for path in sent} == FILES
    assert not list(lab.repository.rglob("environment"))


def test_an_old_python_is_replaced_and_a_coordinator_that_is_given_is_kept(lab: Lab):
    (lab.worker / "python3.11").rename(lab.worker / "newer")
    write_executable(lab.worker / "python3", OLD_PYTHON)
    lab.tpu("up")
    flags = ["--coordinator_address=a:1", "--num_processes=2"]
    lab.tpu("run", *flags)
    assert [run.argv for run in lab.runs(wait=True)] == [[*flags, BUCKET]] * 2
    assert all((home / "uv").exists() for home in lab.homes())


# Preempted while its run goes on, by the state of the request or of the machines.
@pytest.mark.parametrize(
    ("first", "node", "starts"),
    [(["ACTIVE"] * 3 + ["SUSPENDING", "SUSPENDED"], "READY", 2), (["ACTIVE"], "PREEMPTED", 1)],
)
def test_preempted_machines_are_asked_for_again_and_the_run_goes_on(lab, first, node, starts):
    # The next ones are preempted while they are waited for.
    lives = [first, ["PROVISIONING", "SUSPENDED"], ["ACTIVE"]]
    lab.world(lives=lives, mains=["hang", 0, 0], node=node)
    result = lab.tpu("all")
    verbs = lab.verbs()
    assert [verbs.count(verb) for verb in (CREATE, DELETE, "start")] == [3, 3, starts]
    assert result.err.count("was preempted") == 2
    assert (lab.here / "runs" / "gradjax" / "run.json").exists()


def test_a_request_that_fails_ends_with_what_gcloud_knows_and_is_made_anew_later(lab: Lab):
    lab.world(workers=1, lives=[["PROVISIONING", "FAILED"], ["ACTIVE"]])
    result = lab.tpu("all", status=1)
    assert "gradjax failed; what gcloud knows: no capacity" in result.err
    assert lab.verbs() == [CREATE]
    lab.tpu("up")
    assert lab.verbs() == [CREATE, DELETE, CREATE]
    lab.tpu("up")
    assert len(lab.verbs()) == 3
    lab.world(unseen=1)  # as if somebody else made it in between
    assert "ALREADY_EXISTS" in lab.tpu("up").err
    assert lab.verbs()[3:] == [CREATE]


def test_a_request_that_gcloud_refuses_or_knows_nothing_of_ends(lab: Lab):
    lab.world(refuse="ERROR: Quota limit 'TPUV5sLitepod' has been exceeded\n")
    result = lab.tpu("all", status=1)
    assert "Quota limit" in result.err
    assert "gcloud refused v5litepod-16 in us-west4-a" in result.err
    write_executable(lab.played / "gcloud", "#!/bin/bash\necho no network >&2\nexit 1\n")
    assert lab.tpu("up", status=1).err.count("no network") == 5


def test_a_run_that_goes_on_is_not_started_again(lab: Lab):
    lab.world(mains=["hang"])
    lab.tpu("up")
    lab.tpu("run")
    homes = lab.homes(wait=True)
    assert "going on already" in lab.tpu("run").err
    other = lab.tpu("run", "--model=demo", "--limit=2", status=1)
    assert "a run with other flags is going on" in other.err
    assert lab.verbs().count("start") == 1
    assert lab.tpu("status").out == "gradjax: ACTIVE\nw-0 running\nw-1 running\n"
    assert "w-1: a line of the log" in lab.tpu("logs").out

    # Even if it is asked directly.
    for home in homes:
        worker = home / "gradjax" / "code" / "launch" / "tpu_worker.sh"
        path = lab.environment["WORKER_PATH"]
        result = lab.call("bash", worker, "start", "--model=demo", HOME=str(home), PATH=path)
        assert result.out == f"{home.name} is running already\n"
        assert (home / "starts").read_text() == "start\n"

    lab.tpu("stop")
    assert "w-1 not running" in lab.tpu("status").out
    lab.tpu("run", "--model=demo", "--limit=2")
    assert "w-1 running" in lab.tpu("status").out
    assert lab.verbs().count("start") == 2


def test_a_worker_that_is_lost_takes_the_others_along_to_a_new_start(lab: Lab):
    lab.world(mains=["hang"], finish_after=6)
    lab.tpu("up")
    lab.tpu("run")
    lab.kill(lab.homes()[1])
    lab.tpu("all")
    assert [v for v in lab.verbs() if v in ("start", "stop")] == ["start", "stop", "start"]


def test_a_run_that_fails_says_so_and_keeps_the_machines(lab: Lab):
    lab.world(mains=[3])
    result = lab.tpu("all", status=1)
    assert "w-1: gradjax: exited with status 3" in result.out
    assert "a worker ended with an error" in result.err
    assert "w-0 exited 3" in lab.tpu("status").out
    assert DELETE not in lab.verbs()
    for home in lab.homes():
        (home / "behaviour").write_text("0")
    lab.tpu("all")
    assert lab.verbs()[-1] == DELETE
    assert lab.verbs().count("start") == 2


@pytest.mark.parametrize("keep", [[], ["--keep_on_error"]])
def test_machines_are_given_back_whatever_the_copy_does(lab: Lab, keep: list[str]):
    lab.world(copy=1)
    given = ["tpu_pod.sh", "all", *TPU, *keep, "--", "--model=demo", BUCKET]
    result = lab.launch(*given, status=1)
    assert "the results were not copied from gs://bucket/a run to runs/gradjax" in result.err
    assert "no such bucket" in result.err
    assert (lab.verbs()[-1] == DELETE) == (not keep)
    assert ("the machines are kept, as --keep_on_error says" in result.err) == bool(keep)
    for index in range(2):  # go with the machines
        log = (lab.here / "runs" / "gradjax-logs" / f"worker-{index}.log").read_text()
        assert "exited with status 0" in log
    lab.world(copy=0)
    assert "the store is in runs/gradjax" in lab.tpu("collect").err


def test_a_run_has_ended_when_every_worker_says_so(lab: Lab):
    lab.world(unheard=4)
    result = lab.tpu("all")
    assert "gradjax: 1 of 2 workers say that the run has ended" in result.err
    assert lab.verbs()[-1] == DELETE


def test_a_worker_that_is_never_heard_has_not_ended(lab: Lab):
    lab.world(unheard=99)
    result = lab.tpu("all", status=1)
    assert "the workers of gradjax cannot all be reached or started" in result.err
    assert DELETE not in lab.verbs()
    assert "gcloud storage rsync" not in lab.verbs()


def test_without_machines_delete_does_nothing_and_status_says_so(lab: Lab):
    assert "there is no gradjax" in lab.tpu("delete").err
    assert lab.verbs() == []
    variables = {"CLOUDSDK_COMPUTE_ZONE": "z", "CLOUDSDK_CORE_PROJECT": "q"}  # gcloud's own
    assert lab.launch("tpu_pod.sh", "status", **variables).out == "gradjax: ABSENT\n"
    assert {"--zone=z", "--project=q"} <= set(lab.calls()[-1])


# --- A cluster of Kubernetes ---


@pytest.mark.parametrize("way", ["run", "what dry_run shows"])
def test_flags_files_and_the_key_arrive_unharmed_in_a_cluster(lab: Lab, way):
    if way == "run":
        assert lab.gke("run", *DIFFICULT).out == "Jobset Name\n"
        (create,) = lab.calls("create")
        assert create[:9] == [
            *("xpk", "workload", "create", "--cluster=c", "--zone=us-west4-a", "--project=p"),
            *("--workload=gradjax", "--tpu-type=v5litepod-16", "--num-slices=2"),
        ]
    else:
        shown = lab.launch(*RUN_GKE, "--dry_run", "--", *DIFFICULT, BUCKET).out
        lab.call("bash", "-ec", shown)
    (run,) = lab.runs()
    assert run.argv == [AUTO, *DIFFICULT, BUCKET]
    assert (run.directory / "low.jsonl").read_text() == "another row"
    built = [path.read_bytes() for path in lab.repository.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in text for text in built)


def test_a_run_in_the_cluster_is_left_alone_and_an_ended_one_goes_on(lab: Lab):
    lab.gke("run")
    assert "in the cluster already" in lab.gke("run").err
    assert lab.verbs().count("xpk workload create") == 1
    for ended in ("Failed", "Completed"):
        lab.world(jobset=ended)
        lab.gke("run")
        assert lab.verbs()[-2:] == ["xpk workload delete", "xpk workload create"]
    ways = {"status": "kubectl get pods", "logs": "kubectl logs", "delete": "xpk workload delete"}
    for command, last in ways.items():
        lab.gke(command)
        assert lab.verbs()[-1] == last
    assert "there is no gradjax in c" in lab.gke("delete").err


@pytest.mark.parametrize(
    ("main", "starts", "state"),
    [(143, 21, "Failed"), ("killed", 1, "Failed"), (3, 1, "Failed"), (0, 1, "")],
)
def test_a_pod_is_started_20_times_again_at_most_and_not_if_memory_was_short(
    lab: Lab, main, starts, state
):
    lab.world(mains=[main])
    said = lab.gke("run").out
    (home,) = lab.homes()
    assert (home / "starts").read_text() == "start\n" * starts
    assert ("killed, as the kernel does where memory is short" in said) == (main == "killed")
    if state:
        lab.gke("run")  # goes on
        assert lab.verbs()[-2:] == ["xpk workload delete", "xpk workload create"]


# --- Slurm ---

SLURM = (*DIFFICULT, "--output_dir=runs/a run")


def submit(lab: Lab, *arguments: str, **where: Any) -> str:
    """What a job says that is submitted in the repository, or in another `cwd`."""
    shutil.copy(lab.here / "my.flags", lab.repository)
    where = {"cwd": lab.repository, "PATH": lab.all_tools} | where
    return lab.call(lab.played / "sbatch", *arguments, **where).err


PER_NODE = "--nodes=3 --ntasks=3 --ntasks-per-node=1 --cpus-per-task=24 --label"
PER_GPU = "--nodes=2 --ntasks=6 --ntasks-per-node=3 --cpus-per-task=8 --gpus-per-task=1"


@pytest.mark.parametrize(
    ("options", "per", "tasks", "expected", "devices"),
    [
        ("--nodes=3 --gpus=4", [], 3, PER_NODE, "0,1,2,3"),
        ("--nodes=2 --gpus=3", ["--per=gpu"], 6, PER_GPU, "0"),
        ("--nodes=1", [], 1, "--nodes=1 --ntasks=1 --ntasks-per-node=1", ""),
    ],
)
def test_a_process_has_all_gpus_of_its_node_or_one(lab, options, per, tasks, expected, devices):
    submit(lab, *options.split(), "launch/slurm.sbatch", *per, *SLURM)
    (srun,) = [call for call in lab.calls() if call[0] == "srun"]
    assert set(expected.split()) <= set(srun)
    assert [(run.argv, run.devices) for run in lab.runs()] == [([AUTO, *SLURM], devices)] * tasks
    needed = "requirements-cuda.txt" if devices else "requirements.txt"
    assert (lab.repository / ".venv" / f"installed-{needed}").exists()


def test_bash_submits_from_anywhere(lab: Lab):
    lab.launch("slurm.sbatch", *SLURM, PATH=lab.all_tools)
    assert [call[0] for call in lab.calls()] == ["sbatch", "srun"]
    (run,) = lab.runs()
    assert (run.argv, run.directory) == ([AUTO, *SLURM], lab.here)


def test_what_dry_run_shows_does_the_same(lab: Lab):
    shown = lab.launch("slurm.sbatch", "--dry_run", "--per=gpu", *SLURM).out
    submitted, _, job = shown.partition("# The job then runs, on one node with one GPU:\n")
    assert shlex.split(submitted)[-1] == SLURM[-1]
    lab.call("bash", "-ec", job, PATH=lab.all_tools)
    (run,) = lab.runs()
    assert (run.argv, run.devices) == ([AUTO, *SLURM], "0")


def test_a_job_says_what_it_needs_and_is_queued_again(lab: Lab):
    script = "launch/slurm.sbatch"
    assert "there are no GPUs in this job" in submit(lab, script, "--per=gpu", status=1)
    elsewhere = lab.repository / script
    assert "submit the job in the root" in submit(lab, str(elsewhere), status=1, cwd=lab.here)
    assert "\n#SBATCH --requeue\n" in (ROOT / "launch" / "slurm.sbatch").read_text()
