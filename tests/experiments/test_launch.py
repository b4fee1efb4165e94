"""The launch scripts, against stand-ins for gcloud, kubectl and srun that tell what they were told.

Flags are hard to quote here on purpose: they pass a shell, ssh's shell, or YAML, and must arrive
as they were.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
FLAGS = [
    "--config=configs/baichuan2_7b.py",
    '--config.data.sources=zh=/data/a b/*.gz,en=it\'s "$HOME" `x` \\ é 文',
    "--workdir=gs://bucket/run",
]
RUN = ["-m", "experiments.pretrain", "--coordinator=auto", *FLAGS]

# Writes a line of JSON for each call: its arguments and its input.
TELLS = """#!{python}
import json, os, sys
said = dict(arguments=sys.argv[1:], program=os.path.basename(sys.argv[0]))
said["input"] = "" if sys.stdin.isatty() else sys.stdin.read()
said["share"] = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
with open({log!r}, "a") as log:
    log.write(json.dumps(said) + "\\n")
"""

# Runs a command as Slurm does: two tasks on one node.
SLURM = """#!/usr/bin/env bash
while [ "${1#-}" != "$1" ]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
export SLURM_TOPOLOGY_ADDR=spine.leaf.localhost
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
wait $first && wait $second
"""


class Machine:
    """A PATH on which gcloud, kubectl and srun only tell what they were told."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.log = folder, folder / "log.jsonl"
        for program in ("gcloud", "kubectl", "srun", "curl"):
            self.install(program, TELLS.format(python=sys.executable, log=str(self.log)))

    def install(self, program: str, text: str) -> None:
        path = self.folder / program
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str):
        """Runs a launch script; returns it with what was told."""
        self.log.unlink(missing_ok=True)
        keep = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL") if name in os.environ}
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            cwd=ROOT,
            env=keep | {"PATH": f"{self.folder}:{os.environ['PATH']}"} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return done, [json.loads(line) for line in lines]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments_they_say_what_to_do(machine, script):
    done, told = machine.run(script.name)
    assert done.returncode == 2 and not told
    assert f"experiments/launch/{script.name}" in done.stderr and "--config=" in done.stderr
    done, told = machine.run(script.name, "--help")
    assert done.returncode == 2 and not told
    assert f"experiments/launch/{script.name}" in done.stderr and "--config=" in done.stderr


def remote(command: str, folder: pathlib.Path) -> list[str]:
    """What a worker's `python` gets when its shell runs the command that ssh brings."""
    project = folder / "home" / "baichuan_jax"
    (project / ".venv/bin").mkdir(parents=True)
    python = project / ".venv/bin/python"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=project.parent,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(done.stdout)


TPU = {"NAME": "my-run", "ZONE": "us-east5-a"}


@pytest.mark.parametrize(
    "slices, call",
    [
        ("1", "compute tpus tpu-vm ssh my-run --zone=us-east5-a --worker=all"),
        (
            "3",
            "compute tpus queued-resources ssh my-run --zone=us-east5-a --node=all --worker=all"
            " --batch-size=all",
        ),
    ],
)
def test_tpu_runs_on_all_workers(machine, tmp_path, slices, call):
    done, told = machine.run("tpu.sh", "run", *FLAGS, SLICES=slices, **TPU)
    assert done.returncode == 0, done.stderr
    (ssh,) = told
    *arguments, command = ssh["arguments"]
    assert arguments == call.split()
    assert remote(command.removeprefix("--command="), tmp_path) == RUN


def test_tpu_is_asked_for_and_given_back(machine):
    kind = {"ACCELERATOR": "v5p-256", "RUNTIME": "v2-alpha-tpuv5"}
    _, (one,) = machine.run("tpu.sh", "create", "--spot", **TPU, **kind)
    rest = "--accelerator-type=v5p-256 --runtime-version=v2-alpha-tpuv5 --spot"
    create = "compute tpus queued-resources create my-run --zone=us-east5-a"
    assert " ".join(one["arguments"]) == f"{create} --node-id=my-run {rest}"
    _, (two,) = machine.run("tpu.sh", "create", "--spot", SLICES="2", **TPU, **kind)
    nodes = "--node-count=2 --node-prefix=my-run"
    assert " ".join(two["arguments"]) == f"{create} {nodes} {rest}"
    _, (gone,) = machine.run("tpu.sh", "delete", **TPU)
    delete = "compute tpus queued-resources delete my-run --zone=us-east5-a --force"
    assert " ".join(gone["arguments"]) == delete


def test_tpu_workers_get_the_last_commit(machine, tmp_path):
    machine.install(
        "git",
        "#!/usr/bin/env bash\n"
        '[ "$1" = diff ] && exit 1\n'  # something is not committed
        'echo "git $*"\n',
    )
    done, (scp, ssh) = machine.run("tpu.sh", "install", **TPU)
    assert done.returncode == 0 and "not committed" in done.stderr
    archive = done.stdout.split("--output=")[1].split()[0]
    assert done.stdout.startswith("git archive --format=tar.gz") and "HEAD" in done.stdout
    assert scp["arguments"] == [
        *("compute", "tpus", "tpu-vm", "scp", archive, "my-run:baichuan_jax.tar.gz"),
        *("--zone=us-east5-a", "--worker=all"),
    ]
    assert not pathlib.Path(archive).exists()
    command = ssh["arguments"][-1].removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    assert ".[tpu]" in command and "baichuan_jax.tar.gz" in command


def test_tpu_stop_does_not_kill_the_shell_that_stops(machine):
    _, (ssh,) = machine.run("tpu.sh", "stop", **TPU)
    command = ssh["arguments"][-1].removeprefix("--command=")
    machine.install("pkill", '#!/usr/bin/env bash\necho "$@" | grep -q "^-f \\[e\\]"\n')
    done = subprocess.run(
        ["bash", "-c", f"{command} && echo alive"],
        env={"PATH": f"{machine.folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "alive\n"


@pytest.mark.parametrize("missing", ["NAME", "ZONE"])
def test_tpu_names_what_is_not_set(machine, missing):
    rest = {name: value for name, value in TPU.items() if name != missing}
    done, told = machine.run("tpu.sh", "run", *FLAGS, **rest)
    assert done.returncode and not told and f"export {missing}=" in done.stderr


GKE = {"NAME": "my-run", "IMAGE": "registry/image:tag"}


def test_gke_on_two_slices(machine):
    labels = {"ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "4x4x8", "SLICES": "2"}
    done, told = machine.run("gke.sh", "tpu", *FLAGS, **GKE, **labels)
    assert done.returncode == 0, done.stderr
    (call,) = told
    assert call["arguments"] == ["apply", "-f", "-"]
    manifest = yaml.safe_load(call["input"])
    assert manifest["kind"] == "JobSet" and manifest["metadata"]["name"] == "my-run"
    (job,) = manifest["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]
    assert (job["replicas"], hosts["parallelism"], hosts["completions"]) == (2, 32, 32)
    pod = hosts["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
    }
    (container,) = pod["containers"]
    assert container["command"] + container["args"] == ["python", *RUN]
    assert container["image"] == "registry/image:tag"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_gke_on_nodes_of_gpus(machine):
    labels = {"ACCELERATOR": "nvidia-h200-141gb", "NODES": "16"}
    done, (call,) = machine.run("gke.sh", "gpu", *FLAGS, **GKE, **labels)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(call["input"])
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 1 and job["template"]["spec"]["parallelism"] == 16
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    # The first pod of the first job, as JobSet calls it.
    host = f"{manifest['metadata']['name']}-{job['name']}-0-0.{manifest['metadata']['name']}"
    flags = [f"--coordinator={host}:12345", "--num_processes=16", "--process_id=$(PROCESS)"]
    command = container["command"] + container["args"]
    assert command == ["python", "-m", "experiments.pretrain", *flags, *FLAGS]
    environment = {entry["name"]: entry for entry in container["env"]}
    index = environment["PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]["value"] == "0.93"


def test_gke_shows_the_manifest(machine):
    labels = {"ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "2x4", "CHIPS": "8", "RESTARTS": "3"}
    done, told = machine.run("gke.sh", "tpu", *FLAGS, SHOW="1", **GKE, **labels)
    manifest = yaml.safe_load(done.stdout)
    assert not told and manifest["spec"]["failurePolicy"] == {"maxRestarts": 3}
    assert manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == 1


@pytest.mark.parametrize(
    "kind, given, said",
    [
        ("tpu", {"TOPOLOGY": "4x4"}, "ACCELERATOR"),
        ("tpu", {"ACCELERATOR": "tpu-v6e-slice"}, "TOPOLOGY"),
        ("tpu", {"ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "1x1"}, "fewer chips than CHIPS=4"),
        ("gpu", {"ACCELERATOR": "nvidia-h100-80gb"}, "NODES"),
        ("cpu", {}, "experiments/launch/gke.sh"),
    ],
)
def test_gke_names_what_is_not_right(machine, kind, given, said):
    done, told = machine.run("gke.sh", kind, *FLAGS, **GKE, **given)
    assert done.returncode and not told and said in done.stderr


def test_manifests_tell_what_they_want():
    """Each is YAML before anything is filled in, too, and its head names what is."""
    for path in LAUNCH.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert yaml.safe_load(text)["kind"] == "JobSet"
        head, _, body = text.partition("apiVersion")
        wanted = set(re.findall(r"\$([A-Z]+)", body))
        assert len(wanted) > 5 and wanted <= set(re.findall(r"[A-Z]{4,}", head))


def test_slurm_starts_a_process_for_each_gpu(machine):
    done, (call,) = machine.run("slurm.sh", *FLAGS, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="16")
    assert done.returncode == 0, done.stderr
    flags = ["--kill-on-bad-exit=1", "--label", "--cpus-per-task=16"]
    assert call["arguments"] == [*flags, "python", *RUN]
    assert call["share"] == "0.93"
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in text.splitlines()
        if line.startswith("#SBATCH") and "=" in line
    )
    assert options["gpus-per-node"] == options["ntasks-per-node"] == "8"
    # sbatch reads what stands before the first command.
    assert text.index("#SBATCH") < text.rindex("#SBATCH") < text.index("set -e")


def test_the_share_of_gpu_memory_is_what_the_planner_counts_on():
    from baichuan_jax.parallel.chips import GPU_MEMORY_FRACTION

    for name in ("slurm.sh", "gke_gpu.yaml"):
        assert f"{GPU_MEMORY_FRACTION}" in (LAUNCH / name).read_text()


def test_outside_of_a_cluster_auto_says_what_to_do(tmp_path):
    call = ["--config=configs/quickstart.py", f"--workdir={tmp_path}", "--coordinator=auto"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.pretrain", *call],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--coordinator=auto: JAX detects no cluster here" in done.stderr
    assert "--coordinator=HOST:PORT, --num_processes=N and --process_id=I" in done.stderr


@pytest.mark.slow
def test_slurm_trains_with_two_processes(machine, tmp_path):
    """As Slurm would start them; JAX finds the other process by itself."""
    machine.install("srun", SLURM)
    source = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{i} and {i + 1} make {2 * i + 1}. " * 8}) for i in range(400)]
    source.write_text("\n".join(lines) + "\n")
    trainer = [sys.executable, "-m", "experiments.train_tokenizer", f"--sources={source}"]
    model = tmp_path / "my.model"
    subprocess.run([*trainer, "--vocab_size=416", f"--out={model}"], cwd=ROOT, check=True)
    done, _ = machine.run(
        "slurm.sh",
        *("--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"),
        *(f"--config.data.sources={source}", f"--config.data.tokenizer={model}"),
        *("--config.model.vocab_size=416", "--config.data.sequence_length=64"),
        *("--config.mesh.replica=2", "--config.training.num_steps=3"),
        *("--config.optimizer.warmup_steps=1", "--config.training.batch_size=4"),
        **{"SLURM_JOB_ID": str(os.getpid()), "PYTHON": sys.executable},
        **{"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in metrics if '"train"' in line]
    assert steps == [1, 2, 3]
