"""How the environment says how many processes there are."""

import pytest

from mlm.parallel.distributed import detect, initialize_distributed, preempted

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_STEP_NUM_NODES": "4", "SLURM_NTASKS": "4"}


def test_an_ordinary_machine_is_one_process(monkeypatch):
    assert detect({}).arguments is None
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert initialize_distributed().arguments is None
    assert preempted(3) is False


def test_explicit_variables():
    start = detect({"MLM_COORDINATOR": "n1:8476", "MLM_PROCESS_COUNT": "4", "MLM_PROCESS_ID": "3", **SLURM})
    assert start.how == "MLM_COORDINATOR"
    assert start.arguments == {
        "coordinator_address": "n1:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    alone = detect({"MLM_COORDINATOR": "n1:8476", "MLM_PROCESS_COUNT": "1", "MLM_PROCESS_ID": "0"})
    assert alone.arguments is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MLM_COORDINATOR": "n1:1"}, "MLM_COORDINATOR set, but not MLM_PROCESS_COUNT, MLM_PROCESS_ID"),
        ({"MLM_COORDINATOR": "n1:1", "MLM_PROCESS_COUNT": "2", "MLM_PROCESS_ID": "2"}, "need 0 <= id < count"),
        ({"MLM_COORDINATOR": "n1", "MLM_PROCESS_COUNT": "2", "MLM_PROCESS_ID": "1"}, "need host:port"),
    ],
)
def test_contradictions_are_errors(environment, message):
    with pytest.raises(ValueError, match=message):
        detect(environment)


def test_slurm_step_with_one_task_per_node_sees_all_gpus():
    assert detect({**SLURM, "SLURM_GPUS_ON_NODE": "8"}).arguments["local_device_ids"] == list(range(8))
    eight_tasks = {**SLURM, "SLURM_NTASKS": "8", "SLURM_GPUS_ON_NODE": "2"}
    assert "local_device_ids" not in detect(eight_tasks).arguments  # JAX gives each task its own GPU
    assert detect(SLURM).how == "SLURM"


def test_slurm_without_several_tasks_is_one_process():
    assert detect({**SLURM, "SLURM_NTASKS": "1"}).arguments is None
    batch_script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert detect(batch_script).arguments is None  # not started by srun


def test_tpu():
    assert detect({}, tpu=True).arguments == {}
