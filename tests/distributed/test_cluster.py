"The templates for Slurm and Kubernetes: their syntax, and that what they call exists. No cluster is asked."
import re
import subprocess
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "cluster"


def test_the_slurm_script_is_bash():
    done = subprocess.run(["bash", "-n", DOCS / "slurm.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_slurm_script_calls_torchrun_as_it_is(tmp_path):
    "With stand-ins for Slurm's programs the command comes out that torchrun understands; a second time it resumes."
    for name, text in {"scontrol": "echo node1; echo node2", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
           "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "32"}

    def words():
        done = subprocess.run(["bash", DOCS / "slurm.sbatch", "my photos", tmp_path / "out"], env=env, capture_output=True,
                              text=True, check=True)
        return done.stdout.splitlines()
    from torch.distributed.run import parse_args
    said = words()
    assert said[0] == "torchrun" and "--resume" not in said
    asked = parse_args(said[1:])
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_endpoint) == ("2", "4", "node1:29500")
    assert asked.training_script == "sft_course" and asked.training_script_args[:2] == ["fit", "my photos"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.ckpt").touch()
    assert words()[-1] == "--resume"


def test_the_kubernetes_job_is_a_pytorchjob():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((DOCS / "pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["minReplicas"]
    pod = worker["template"]["spec"]
    container = pod["containers"][0]
    assert container["name"] == "pytorch"  # the operator looks for this name
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["volumes"]}


def test_the_kubernetes_command_is_a_shell_command():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((DOCS / "pytorchjob.yaml").read_text(encoding="utf-8"))
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    done = subprocess.run(["sh", "-n", "-c", container["args"][0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"torchrun -m sft_course fit \S+ --out \S+", container["args"][0])
