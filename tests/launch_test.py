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
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TOKEN = "hf_never_to_be_shown"
# Everything on the machines but what is played. Nothing else is on PATH, real tools least of all.
TOOLS = (
    *(
        "bash",
        "cat",
        "cmp",
        "cp",
        "date",
        "dirname",
        "env",
        "flock",
        "git",
        "grep",
        "gzip",
        "mkdir",
    ),
    *("mv", "rm", "sed", "seq", "setsid", "sleep", "sort", "tail", "tar", "tee", "touch", "wc"),
)
PLAYED = ("gcloud", "xpk", "kubectl", "docker", "sbatch", "srun")
# Makes environments that hold only itself; as gradjax.main it leaves word of how it was called.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  "-c "* | "-m pip "*) ;;
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-P -m gradjax.main "*)
    shift 3
    printf '%s\0' "$@" >"$HOME/argv"
    printf %s "${HF_TOKEN-}" >"$HOME/token"
    printf %s "$PWD" >"$HOME/directory"
    printf %s "${JAX_LOCAL_DEVICE_IDS-}" >"$HOME/devices"
    echo start >>"$HOME/starts"
    echo "a line of the log"
    while [[ $(cat "$HOME/behaviour") == hang ]]; do sleep 0.05; done
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
DIFFICULT = [
    "--model=org/name",
    "--data=good=rows of mine/high 'quality'.jsonl",
    '--layers= a  b\t$(HOME) $HOME $$ `id` \\ "quoted" * ? {x,y} é 数 !',
    "--prompt_format=first\nsecond=third",
    "--flagfile=my.flags",
    "--limit",
    "7",
    "",
]
TPU = ("--zone=us-west4-a", "--project=p", "--type=v5litepod-16")
GKE = ("--cluster=c", "--zone=us-west4-a", "--project=p", "--type=v5litepod-16")
BUCKET = "--output_dir=gs://bucket/a run"


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Lab:
    """A repository, a directory to call from, and the machines that are played."""

    def __init__(self, folder: Path, repository: Path):
        self.folder = folder
        self.repository = folder / "a repository"
        self.here = folder / "here"
        self.played = folder / "played"
        tools, worker = folder / "tools", folder / "worker"
        for directory in (self.here, self.played, tools, worker, self.here / "rows of mine"):
            directory.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (tools / tool).symlink_to(found)
        program = f"#!{sys.executable} -IS\n" + (ROOT / "tests" / "stand_ins.py").read_text()
        for name in PLAYED:
            executable(self.played / name, program)
        executable(worker / "python3.11", FAKE_PYTHON)
        executable(worker / "hostname", '#!/usr/bin/env bash\necho "${HOME##*/}"\n')
        (self.here / DIFFICULT[1].partition("good=")[2]).write_text("a row")
        (self.here / "my.flags").write_text("# mine\n  --data=low=low.jsonl\n--dtype=float32\n")
        (self.here / "low.jsonl").write_text("another row")
        self.plan(workers=2, lives=[["ACTIVE"]], mains=[0])
        self.tools = tools
        self.environment = {
            "PATH": f"{self.played}:{tools}",
            "WORKER_PATH": f"{worker}:{tools}",
            "STAND_INS": str(folder),
            "HOME": str(folder),
            "HF_TOKEN": TOKEN,
            "POLL_SECONDS": "0.05",
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        shutil.copytree(repository, self.repository)

    def plan(self, **plan: Any) -> None:
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self) -> list[str]:
        """What was asked of gcloud, xpk and so on, without looks at how things are."""
        verbs = []
        for name, *arguments in self.calls():
            command = next((a for a in arguments if a.startswith("--command=")), "")
            verb = " ".join(a for a in arguments[:4] if a[0] != "-" and "://" not in a)
            words = command.partition("tpu_worker.sh ")[2].split()
            verb = f"{words[0]}" if name == "gcloud" and words else f"{name} {verb}"
            if not verb.startswith(("status", "gcloud compute tpus tpu-vm ssh")):
                verbs.append(verb.replace("compute tpus ", ""))
        return [verb for verb in verbs if "describe" not in verb]

    def launch(
        self, script: str, *arguments: str, status: int = 0, **environment: str
    ) -> SimpleNamespace:
        """Runs a script of launch/ and checks its exit status, and that the key stayed hidden."""
        result = subprocess.run(
            ["bash", self.repository / "launch" / script, *arguments],
            cwd=self.here,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=40,
        )
        assert result.returncode == status, result.stdout + result.stderr
        assert TOKEN not in result.stdout + result.stderr + json.dumps(self.calls())
        return SimpleNamespace(out=result.stdout, err=result.stderr)

    def homes(self) -> list[Path]:
        return sorted((self.folder / "workers").glob("*"))

    def argv(self, home: Path) -> list[str]:
        return (home / "argv").read_text().split("\0")[:-1]

    def close(self) -> None:
        for file in self.folder.glob("workers/*/gradjax/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def lab(tmp_path: Path, repository: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, repository)
    yield lab
    lab.close()


def test_shellcheck_finds_nothing():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "install requirements-test.txt"
    names = ("cluster.sh", "tpu_pod.sh", "tpu_worker.sh", "gke_xpk.sh", "slurm.sbatch")
    scripts = [f"launch/{name}" for name in names]
    subprocess.run([found, "--external-sources", *scripts], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke_xpk.sh", "slurm.sbatch"])
def test_help_shows_an_example_and_calls_nothing(lab: Lab, script: str):
    arguments = ["--help"] if script == "slurm.sbatch" else ["run", "--help"]
    for given in (["--help"], arguments):
        shown = lab.launch(script, *given, PATH=str(lab.tools)).out
        assert f"launch/{script}" in shown
        assert "--model=qwen2.5_7b" in shown
        assert "--dry_run" in shown
    assert lab.calls() == []


DRY_RUNS = [
    ("tpu_pod.sh all", TPU, ["create", "scp", "install", "start", "rsync", "delete", "ssh"]),
    ("tpu_pod.sh up", TPU, ["create"]),
    ("tpu_pod.sh run", TPU, ["scp", "install", "start"]),
    ("tpu_pod.sh status", TPU, ["describe", "status"]),
    ("tpu_pod.sh logs", TPU, ["log"]),
    ("tpu_pod.sh stop", TPU, ["stop"]),
    ("tpu_pod.sh collect", TPU, ["storage rsync"]),
    ("tpu_pod.sh delete", TPU, ["delete"]),
    ("gke_xpk.sh run", GKE, ["git", "tar", "workload create"]),
    ("gke_xpk.sh status", GKE, ["workload list", "kubectl get pods"]),
    ("gke_xpk.sh logs", GKE, ["kubectl logs"]),
    ("gke_xpk.sh delete", GKE, ["workload delete"]),
    ("slurm.sbatch", ("--per=gpu",), ["sbatch", "ensure_environment", "srun"]),
]


@pytest.mark.parametrize(("command", "settings", "expected"), DRY_RUNS)
def test_dry_run_shows_commands_and_runs_none(
    lab: Lab, command: str, settings: tuple[str, ...], expected: list[str]
):
    before = sorted(lab.folder.rglob("*"))
    script, *verb = command.split()
    separator = [] if script == "slurm.sbatch" else ["--"]
    given = [*verb, *settings, "--dry_run", *separator, *DIFFICULT, BUCKET]
    result = lab.launch(script, *given, PATH=str(lab.tools))
    assert result.err == ""
    for word in expected:
        assert word in result.out
    subprocess.run(["bash", "-n"], input=result.out, text=True, check=True)
    assert lab.calls() == []
    assert sorted(lab.folder.rglob("*")) == before


class TestTpuPod:
    def launch(self, lab: Lab, command: str, *flags: str, **options: Any) -> SimpleNamespace:
        given = [command, *TPU, "--spot", "--", *(flags or ("--model=demo",)), BUCKET]
        return lab.launch("tpu_pod.sh", *given, **options)

    def test_all_goes_from_the_request_to_the_end(self, lab: Lab):
        states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
        lab.plan(workers=2, lives=[states], mains=["hang"], finish_after=3)
        result = self.launch(lab, "all")
        assert lab.verbs() == [
            "gcloud queued-resources create",
            "gcloud tpu-vm scp",
            "install",
            "start",
            "gcloud storage rsync",
            "gcloud tpu-vm scp",
            "gcloud tpu-vm scp",
            "gcloud queued-resources delete",
        ]
        (create,) = [call for call in lab.calls() if "create" in call]
        assert create[5:] == [
            *("gradjax", "--zone=us-west4-a", "--project=p", "--node-id=gradjax"),
            *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
            "--spot",
        ]
        assert "gradjax: WAITING_FOR_RESOURCES\ngradjax: gradjax: PROVISIONING" in result.err
        results = lab.here / "runs"
        assert (results / "gradjax" / "run.json").exists()
        for index in range(2):
            log = (results / "gradjax-logs" / f"worker-{index}.log").read_text()
            assert "a line of the log\ngradjax: exited with status 0" in log
        assert not lab.homes()

    def test_flags_files_and_the_key_arrive_unharmed(self, lab: Lab):
        lab.plan(workers=3, lives=[["ACTIVE"]], mains=["hang"])
        self.launch(lab, "up")
        self.launch(lab, "run", *DIFFICULT)
        for home in lab.homes():
            self.wait_for(home / "devices")
            assert lab.argv(home) == ["--coordinator_address=auto", *DIFFICULT, BUCKET]
            assert (home / "token").read_text() == TOKEN
            environment = home / "gradjax" / "environment"
            assert environment.stat().st_mode & 0o077 == 0
            files = home / "gradjax" / "files"
            assert (home / "directory").read_text() == str(files)
            sent = [path for path in files.rglob("*") if path.is_file()]
            names = ["low.jsonl", "my.flags", DIFFICULT[1].partition("good=")[2]]
            assert sorted(str(path.relative_to(files)) for path in sent) == names
            for name in names:
                assert (files / name).read_text() == (lab.here / name).read_text()
        assert not list(lab.repository.rglob("environment"))

    def wait_for(self, file: Path) -> None:
        subprocess.run(
            ["bash", "-c", "until [[ -e $1 ]]; do sleep 0.02; done", "bash", file],
            check=True,
            timeout=30,
        )

    def test_machines_with_an_old_python_get_a_newer_one(self, lab: Lab):
        worker = lab.folder / "worker"
        (worker / "python3.11").rename(worker / "newer")
        executable(worker / "python3", OLD_PYTHON)
        self.launch(lab, "up")
        self.launch(lab, "run")
        for home in lab.homes():
            self.wait_for(home / "devices")
            assert (home / "uv").exists()

    def test_a_coordinator_that_is_given_is_kept(self, lab: Lab):
        self.launch(lab, "up")
        flags = ["--coordinator_address=a:1", "--num_processes=2"]
        self.launch(lab, "run", *flags)
        for home in lab.homes():
            self.wait_for(home / "devices")
            assert lab.argv(home) == [*flags, BUCKET]

    @pytest.mark.parametrize("sign", ["of the request", "of the machines"])
    def test_preempted_machines_are_asked_for_again_and_the_run_goes_on(self, lab: Lab, sign: str):
        if sign == "of the request":
            # Preempted while its run goes on, and the next ones while they are waited for.
            first, node = ["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], "READY"
        else:
            first, node = ["ACTIVE"], "PREEMPTED"
        lives = [first, ["PROVISIONING", "SUSPENDED"], ["ACTIVE"]]
        lab.plan(workers=2, lives=lives, mains=["hang", 0, 0], node=node)
        result = self.launch(lab, "all", "--model=demo")
        verbs = lab.verbs()
        assert verbs.count("gcloud queued-resources create") == 3
        assert verbs.count("gcloud queued-resources delete") == 3
        assert verbs.count("start") == (2 if node == "READY" else 1)
        assert result.err.count("was preempted") == 2
        assert (lab.here / "runs" / "gradjax" / "run.json").exists()

    def test_a_request_that_fails_ends_with_what_gcloud_knows_and_is_made_anew_later(
        self, lab: Lab
    ):
        lab.plan(workers=1, lives=[["PROVISIONING", "FAILED"], ["ACTIVE"]], mains=[0])
        result = self.launch(lab, "all", status=1)
        assert "gradjax failed; what gcloud knows: no capacity" in result.err
        assert lab.verbs() == ["gcloud queued-resources create"]
        self.launch(lab, "up")
        assert lab.verbs()[1:] == [
            "gcloud queued-resources delete",
            "gcloud queued-resources create",
        ]
        self.launch(lab, "up")
        assert len(lab.verbs()) == 3

    def test_a_refused_request_ends_with_gclouds_message(self, lab: Lab):
        lab.plan(workers=1, refuse="ERROR: Quota limit 'TPUV5sLitepod' has been exceeded\n")
        result = self.launch(lab, "all", status=1)
        assert "Quota limit" in result.err
        assert "gcloud refused v5litepod-16 in us-west4-a" in result.err

    def test_a_request_that_somebody_else_made_is_taken(self, lab: Lab):
        self.launch(lab, "up")
        (lab.folder / "state.json").write_text('{"exists": true, "life": 0, "unseen": 1}')
        assert "ALREADY_EXISTS" in self.launch(lab, "up").err
        assert lab.verbs() == ["gcloud queued-resources create"] * 2

    def test_a_run_that_goes_on_is_not_started_again(self, lab: Lab):
        lab.plan(workers=2, lives=[["ACTIVE"]], mains=["hang"])
        self.launch(lab, "up")
        self.launch(lab, "run")
        for home in lab.homes():
            self.wait_for(home / "starts")
        assert "going on already" in self.launch(lab, "run").err
        other = self.launch(lab, "run", "--model=demo", "--limit=2", status=1)
        assert "a run with other flags is going on" in other.err
        assert lab.verbs().count("start") == 1
        assert self.launch(lab, "status").out.splitlines() == [
            *("gradjax: ACTIVE", "w-0 running", "w-1 running")
        ]
        assert "w-1: a line of the log" in self.launch(lab, "logs").out

        # Even if it is asked directly, at the same time.
        for home in lab.homes():
            worker = home / "gradjax" / "code" / "launch" / "tpu_worker.sh"
            environment = {"HOME": str(home), "PATH": lab.environment["WORKER_PATH"]}
            result = subprocess.run(
                ["bash", worker, "start", "--model=demo"],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            assert result.stdout == f"{home.name} is running already\n"
            assert (home / "starts").read_text() == "start\n"

        self.launch(lab, "stop")
        assert "w-1 not running" in self.launch(lab, "status").out
        self.launch(lab, "run", "--model=demo", "--limit=2")
        assert "w-1 running" in self.launch(lab, "status").out
        assert lab.verbs().count("start") == 2

    def test_a_worker_that_is_lost_takes_the_others_along_to_a_new_start(self, lab: Lab):
        lab.plan(workers=2, lives=[["ACTIVE"]], mains=["hang"], finish_after=6)
        self.launch(lab, "up")
        self.launch(lab, "run")
        lost = lab.homes()[1] / "gradjax" / "pid"
        os.killpg(int(lost.read_text()), signal.SIGKILL)
        self.launch(lab, "all")
        assert [v for v in lab.verbs() if v in ("start", "stop")] == ["start", "stop", "start"]

    def test_a_run_that_fails_says_so_and_keeps_the_machines(self, lab: Lab):
        lab.plan(workers=2, lives=[["ACTIVE"]], mains=[3])
        result = self.launch(lab, "all", status=1)
        assert "w-1: gradjax: exited with status 3" in result.out
        assert "a worker ended with an error" in result.err
        assert "w-0 exited 3" in self.launch(lab, "status").out
        assert "gcloud queued-resources delete" not in lab.verbs()

        for home in lab.homes():
            (home / "behaviour").write_text("0")
        self.launch(lab, "all")
        assert lab.verbs()[-1] == "gcloud queued-resources delete"
        assert lab.verbs().count("start") == 2

    def test_delete_without_machines_does_nothing(self, lab: Lab):
        assert "there is no gradjax" in self.launch(lab, "delete").err
        assert lab.verbs() == []
        assert self.launch(lab, "status").out == "gradjax: ABSENT\n"

    def test_gcloud_that_knows_nothing_is_asked_again_then_given_up(self, lab: Lab):
        executable(lab.played / "gcloud", "#!/usr/bin/env bash\necho no network >&2\nexit 1\n")
        result = self.launch(lab, "up", status=1)
        assert result.err.count("no network") == 5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["up"], "--zone is not given; name the one"),
            (["up", "--zone=z"], "--project is not given; name the one"),
            (["up", "--zone=z", "--project=p"], "--type is not given; name the accelerator"),
            (["up", *TPU[:2], "--type=h100"], "--type=h100: expected a type like v5litepod-16"),
            (["up", *TPU, "--model=demo"], "--model=demo is not a setting of this script"),
            (["up", *TPU, "--zone"], "--zone: expected --zone=VALUE"),
            (["up", *TPU, "--spot=yes"], "--spot=yes: expected --spot alone"),
            (["up", *TPU, "--name=A/../b"], "--name=A/../b: expected up to 50 lower-case letters"),
            (["fly", *TPU], "fly: expected all, up, run"),
            (["run", *TPU], "--output_dir=: the workers' disks are lost"),
            (["run", *TPU, "--", "--output_dir=runs/x"], "--output_dir=runs/x: the workers'"),
            (["run", *TPU, "--", BUCKET, "--overwrite"], "--overwrite would throw finished rows"),
            (["run", *TPU, "--", BUCKET, "--data=no.jsonl"], "there is no file no.jsonl here"),
            (["run", *TPU, "--", BUCKET, "--flagfile=no"], "--flagfile=no: there is no such file"),
            (["run", *TPU, "--", BUCKET, "--data=a=../here/low.jsonl"], "call it from a directory"),
            (["run", *TPU, "--", BUCKET, "--model", "rows of mine"], "a directory of this machine"),
        ],
    )
    def test_what_cannot_work_is_said_in_one_sentence_before_anything_is_asked(
        self, lab: Lab, arguments: list[str], message: str
    ):
        result = lab.launch("tpu_pod.sh", *arguments, status=1)
        assert result.err.startswith("gradjax: ")
        assert message in result.err
        assert result.err.count("\n") == 1
        assert lab.calls() == []

    def test_zone_and_project_may_be_gclouds_variables(self, lab: Lab):
        variables: dict[str, Any] = {"CLOUDSDK_COMPUTE_ZONE": "z", "CLOUDSDK_CORE_PROJECT": "q"}
        lab.launch("tpu_pod.sh", "status", **variables)
        assert {"--zone=z", "--project=q"} <= set(lab.calls()[0])


class TestGke:
    def launch(self, lab: Lab, command: str, *flags: str, **options: Any) -> SimpleNamespace:
        given = [command, *GKE, "--num_slices=2", "--", *(flags or ("--model=demo",)), BUCKET]
        return lab.launch("gke_xpk.sh", *given, **options)

    def test_flags_files_and_the_key_arrive_unharmed(self, lab: Lab):
        assert self.launch(lab, "run", *DIFFICULT).out == "Jobset Name\n"
        (create,) = [call for call in lab.calls() if "create" in call]
        assert create[:9] == [
            *("xpk", "workload", "create", "--cluster=c", "--zone=us-west4-a", "--project=p"),
            *("--workload=gradjax", "--tpu-type=v5litepod-16", "--num-slices=2"),
        ]
        (pod,) = lab.homes()
        assert lab.argv(pod) == ["--coordinator_address=auto", *DIFFICULT, BUCKET]
        assert (pod / "token").read_text() == TOKEN
        assert (pod / "files" / "low.jsonl").read_text() == "another row"
        built = [path.read_bytes() for path in lab.repository.rglob("*") if path.is_file()]
        assert not any(TOKEN.encode() in text for text in built)

    def test_a_run_in_the_cluster_is_left_alone_and_an_ended_one_goes_on(self, lab: Lab):
        self.launch(lab, "run")
        assert "in the cluster already" in self.launch(lab, "run").err
        assert lab.verbs().count("xpk workload create") == 1
        for ended in ("Failed", "Completed"):
            state = json.loads((lab.folder / "state.json").read_text())
            (lab.folder / "state.json").write_text(json.dumps(state | {"jobset": ended}))
            self.launch(lab, "run")
            assert lab.verbs()[-2:] == ["xpk workload delete", "xpk workload create"]

    def test_status_logs_and_delete(self, lab: Lab):
        self.launch(lab, "run")
        for command, last in (
            ("status", "kubectl get pods"),
            ("logs", "kubectl logs"),
            ("delete", "xpk workload delete"),
        ):
            self.launch(lab, command)
            assert lab.verbs()[-1] == last
        assert "there is no gradjax in c" in self.launch(lab, "delete").err

    def test_what_dry_run_shows_does_the_same(self, lab: Lab):
        given = ["run", *GKE, "--dry_run", "--", *DIFFICULT, BUCKET]
        shown = lab.launch("gke_xpk.sh", *given).out
        subprocess.run(["bash", "-ec", shown], cwd=lab.here, env=lab.environment, check=True)
        (pod,) = lab.homes()
        assert lab.argv(pod) == ["--coordinator_address=auto", *DIFFICULT, BUCKET]
        assert (pod / "token").read_text() == TOKEN

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["run"], "--cluster is not given; name a cluster"),
            (["run", *GKE[:1]], "--zone is not given; name the cluster's"),
            (["run", *GKE[:3]], "--type is not given; name the accelerator"),
            (["run", *GKE, "--spot"], "--spot is not a setting of this script"),
            (["run", *GKE], "--output_dir=: the workers' disks are lost"),
            (["all", *GKE], "all: expected run, status, logs or delete"),
        ],
    )
    def test_what_cannot_work_is_said_in_one_sentence(
        self, lab: Lab, arguments: list[str], message: str
    ):
        result = lab.launch("gke_xpk.sh", *arguments, status=1)
        assert message in result.err
        assert result.err.count("\n") == 1
        assert lab.calls() == []


class TestSlurm:
    flags = (*DIFFICULT, "--output_dir=runs/a run")

    def sbatch(self, lab: Lab, options: list[str], *arguments: str, cwd: Path | None = None) -> str:
        path = f"{lab.environment['PATH']}:{lab.environment['WORKER_PATH']}"
        result = subprocess.run(
            [lab.played / "sbatch", *options, "launch/slurm.sbatch", *arguments],
            cwd=cwd or lab.repository,
            env=lab.environment | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert TOKEN not in result.stdout + result.stderr
        return result.stderr

    @pytest.fixture(autouse=True)
    def flagfile(self, lab: Lab):
        shutil.copy(lab.here / "my.flags", lab.repository)

    def test_a_process_per_node_uses_all_gpus_of_its_node(self, lab: Lab):
        self.sbatch(lab, ["--nodes=3", "--gpus=4"], *self.flags)
        (srun,) = [call for call in lab.calls() if call[0] == "srun"]
        expected = [
            "--nodes=3",
            "--ntasks=3",
            "--ntasks-per-node=1",
            "--cpus-per-task=24",
            "--label",
        ]
        assert srun[1:6] == expected
        assert len(lab.homes()) == 3
        for home in lab.homes():
            assert lab.argv(home) == ["--coordinator_address=auto", *self.flags]
            assert (home / "devices").read_text() == "0,1,2,3"
            assert (home / "token").read_text() == TOKEN
        assert (lab.repository / ".venv" / "installed-requirements-cuda.txt").exists()

    def test_a_process_per_gpu_sees_only_its_own(self, lab: Lab):
        self.sbatch(lab, ["--nodes=2", "--gpus=3"], "--per=gpu", *self.flags)
        (srun,) = [call for call in lab.calls() if call[0] == "srun"]
        assert {"--ntasks=6", "--ntasks-per-node=3", "--cpus-per-task=8"} <= set(srun)
        assert "--gpus-per-task=1" in srun
        assert [(home / "devices").read_text() for home in lab.homes()] == ["0"] * 6

    def test_nodes_without_gpus_do_with_the_plain_requirements(self, lab: Lab):
        self.sbatch(lab, ["--nodes=1"], *self.flags)
        (home,) = lab.homes()
        assert (home / "devices").read_text() == ""
        assert (lab.repository / ".venv" / "installed-requirements.txt").exists()
        assert "there are no GPUs in this job" in self.sbatch(lab, [], "--per=gpu")

    def test_bash_submits_from_anywhere(self, lab: Lab):
        path = f"{lab.environment['PATH']}:{lab.environment['WORKER_PATH']}"
        lab.launch("slurm.sbatch", *self.flags, PATH=path)
        assert [call[0] for call in lab.calls()] == ["sbatch", "srun"]
        (home,) = lab.homes()
        assert lab.argv(home) == ["--coordinator_address=auto", *self.flags]
        assert (home / "directory").read_text() == str(lab.here)

    def test_what_dry_run_shows_does_the_same(self, lab: Lab):
        shown = lab.launch("slurm.sbatch", "--dry_run", "--per=gpu", *self.flags).out
        submit, _, job = shown.partition("# The job then runs, on one node with one GPU:\n")
        path = f"{lab.environment['PATH']}:{lab.environment['WORKER_PATH']}"
        assert shlex.split(submit)[-1] == self.flags[-1]
        environment = lab.environment | {"PATH": path}
        subprocess.run(["bash", "-ec", job], cwd=lab.here, env=environment, check=True)
        (home,) = lab.homes()
        assert lab.argv(home) == ["--coordinator_address=auto", *self.flags]
        assert (home / "devices").read_text() == "0"

    def test_sbatch_outside_the_repository_says_what_to_do(self, lab: Lab):
        (lab.here / "launch").mkdir()
        shutil.copy(lab.repository / "launch" / "slurm.sbatch", lab.here / "launch")
        assert "submit the job in the root" in self.sbatch(lab, [], cwd=lab.here)

    def test_it_is_queued_again_and_never_overwrites(self, lab: Lab):
        assert "\n#SBATCH --requeue\n" in (ROOT / "launch" / "slurm.sbatch").read_text()
        result = lab.launch("slurm.sbatch", "--model=demo", "--overwrite", status=1)
        assert "--overwrite would throw finished rows away" in result.err
        assert lab.calls() == []


@pytest.mark.parametrize(
    ("arguments", "tool"),
    [
        (["tpu_pod.sh", "up", *TPU], "gcloud"),
        (["tpu_pod.sh", "run", *TPU, "--", BUCKET], "gcloud"),
        (["gke_xpk.sh", "run", *GKE, "--", BUCKET], "docker"),
        (["gke_xpk.sh", "run", *GKE, "--", BUCKET], "xpk"),
        (["gke_xpk.sh", "logs", *GKE], "kubectl"),
        (["slurm.sbatch", "--model=demo"], "sbatch"),
    ],
)
def test_a_missing_tool_is_named(lab: Lab, arguments: list[str], tool: str):
    (lab.played / tool).unlink()
    result = lab.launch(*arguments, status=1)
    assert result.err.startswith(f"gradjax: there is no {tool} on PATH; ")
    assert result.err.count("\n") == 1
    assert lab.calls() == []
