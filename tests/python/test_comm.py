"""`deepspeed.comm` and `init_distributed`: every operation on two ranks, and who a process thinks it is."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from deepspeed import _native
from harness import run_command, run_outcomes, run_ranks

# What a process that no launcher started finds.
NO_LAUNCHER = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"), "")


def every_operation() -> dict[str, object]:
    import deepspeed
    from deepspeed import comm as dist

    assert not dist.is_initialized()
    deepspeed.init_distributed(verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = torch.full((2,), float(rank + 1))
    out: dict[str, object] = {"backend": dist.get_backend(), "explicit": dist.explicit_backend()}

    def fresh() -> torch.Tensor:
        return mine.clone()

    value = fresh()
    assert dist.all_reduce(value) is None
    out["all_reduce"] = value.tolist()
    value = fresh()
    dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True).wait()
    out["all_reduce max"] = value.tolist()
    value = fresh()
    dist.inference_all_reduce(value)
    out["inference_all_reduce"] = value.tolist()
    pair = [fresh(), torch.ones(1)]
    dist.all_reduce_coalesced(pair, async_op=True).wait()
    out["all_reduce_coalesced"] = [t.tolist() for t in pair]
    value = fresh()
    dist.broadcast(value, src=1)
    out["broadcast"] = value.tolist()
    objects: list[object] = [rank, "x"]
    dist.broadcast_object_list(objects, src=1)
    out["broadcast_object_list"] = objects
    parts = [torch.empty(2) for _ in range(world)]
    dist.all_gather(parts, mine)
    out["all_gather"] = [t.tolist() for t in parts]
    flat = torch.empty(4)
    dist.all_gather_into_tensor(flat, mine)
    out["all_gather_into_tensor"] = flat.tolist()
    dist.allgather_fn(flat, mine)
    outs = [torch.empty(4), torch.empty(2)]
    dist.all_gather_coalesced(outs, [mine, mine[:1]])
    out["all_gather_coalesced"] = [t.tolist() for t in outs]
    gathered: list[object] = [None] * world
    dist.all_gather_object(gathered, {"rank": rank})
    out["all_gather_object"] = gathered
    value = torch.empty(1)
    dist.reduce_scatter(value, [mine[:1] * 1, mine[:1] * 10])
    out["reduce_scatter"] = value.tolist()
    value = torch.empty(1)
    dist.reduce_scatter_tensor(value, mine * torch.tensor([1.0, 10.0]))
    out["reduce_scatter_tensor"] = value.tolist()
    dist.reduce_scatter_fn(value, mine)
    value = torch.empty(2)
    dist.all_to_all_single(value, mine * torch.tensor([1.0, 10.0]))
    out["all_to_all_single"] = value.tolist()
    if rank == 0:
        dist.send(mine, dst=1, tag=3)
        dist.isend(mine * 2, dst=1).wait()
    else:
        value = torch.empty(2)
        assert dist.recv(value, src=0, tag=3) == 0
        second = torch.empty(2)
        dist.irecv(second, src=0).wait()
        out["recv"] = [value.tolist(), second.tolist()]
    other = torch.empty(2)
    pending = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
    for work in dist.batch_isend_irecv(pending):
        work.wait()
    out["batch_isend_irecv"] = other.tolist()
    parts = [torch.empty(2) for _ in range(world)] if rank == 0 else None
    dist.gather(mine, parts, dst=0)
    out["gather"] = [t.tolist() for t in parts or []]
    value = torch.empty(2)
    dist.scatter(value, [torch.zeros(2), torch.ones(2)] if rank == 0 else None, src=0)
    out["scatter"] = value.tolist()
    value = fresh()
    dist.reduce(value, dst=0)
    out["reduce"] = value.tolist() if rank == 0 else None
    dist.barrier()
    dist.monitored_barrier(timeout=timedelta(seconds=30))
    alone = dist.new_group([1])
    out["groups"] = [
        dist.get_world_size(alone),
        dist.get_all_ranks_from_group(dist.get_world_group()),
        dist.get_global_rank(alone, 0) if rank == 1 else None,
        dist.get_local_rank(),
    ]
    mesh = dist.initialize_mesh_device((2,), ("data_parallel",))
    out["mesh"] = mesh.mesh_dim_names
    dist.configure()
    with pytest.raises(RuntimeError, match="communication logger is off"):
        dist.log_summary()
    dist.configure(enabled=True, prof_all=False, prof_ops=["all_reduce"])
    for _ in range(2):
        dist.all_reduce(fresh())
    dist.barrier()
    counted = dist.log_summary(show_straggler=True, return_dict=True)
    out["counted"] = {name: {size: calls[0] for size, calls in sizes.items()} for name, sizes in counted.items()}
    dist.reset_log()
    out["reset"] = dist.log_summary(return_dict=True)
    dist.configure(enabled=False)
    deepspeed.init_distributed()  # adopts
    dist.barrier()
    dist.destroy_process_group()
    assert not dist.is_initialized()
    return out


def test_every_operation_on_two_ranks() -> None:
    zero, one = run_ranks(every_operation, 2)
    for out in (zero, one):
        assert out["backend"] == "gloo"
        assert out["explicit"] is None
        assert out["all_reduce"] == out["inference_all_reduce"] == [3, 3]
        assert out["all_reduce max"] == [2, 2]
        assert out["all_reduce_coalesced"] == [[3, 3], [2]]
        assert out["broadcast"] == [2, 2]
        assert out["broadcast_object_list"] == [1, "x"]
        assert out["all_gather"] == [[1, 1], [2, 2]]
        assert out["all_gather_into_tensor"] == [1, 1, 2, 2]
        assert out["all_gather_coalesced"] == [[1, 1, 2, 2], [1, 2]]
        assert out["all_gather_object"] == [{"rank": 0}, {"rank": 1}]
        assert out["mesh"] == ("data_parallel",)
    assert (zero["reduce_scatter"], one["reduce_scatter"]) == ([3], [30])
    assert (zero["reduce_scatter_tensor"], one["reduce_scatter_tensor"]) == ([3], [30])
    assert (zero["all_to_all_single"], one["all_to_all_single"]) == ([1, 2], [10, 20])
    assert one["recv"] == [[1, 1], [2, 2]]
    assert (zero["batch_isend_irecv"], one["batch_isend_irecv"]) == ([2, 2], [1, 1])
    assert zero["gather"] == [[1, 1], [2, 2]]
    assert (zero["scatter"], one["scatter"]) == ([0, 0], [1, 1])
    assert zero["reduce"] == [3, 3]
    assert zero["groups"] == [-1, [0, 1], None, 0]
    assert one["groups"] == [1, [0, 1], 1, 1]
    assert zero["counted"] == {"all_reduce": {8: 2}} and zero["reset"] == {}


def adopt_a_group(named: str) -> tuple[int, str | None]:
    import deepspeed

    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend=named, dist_init_required=False)
    deepspeed.comm.barrier()  # rank 0 has the store: it stays until all have met
    return deepspeed.comm.get_world_size(), deepspeed.comm.explicit_backend()


def test_an_existing_group_is_adopted() -> None:
    # Naming what would be used anyway asks for nothing: accelerate and Lightning always do.
    assert run_ranks(adopt_a_group, 2, "gloo") == [(2, None)] * 2
    assert run_ranks(adopt_a_group, 2, "cpu:gloo") == [(2, "cpu:gloo")] * 2


def world_of_one() -> tuple[int, float, str, str]:
    import deepspeed

    deepspeed.init_distributed()
    value = torch.ones(1)
    deepspeed.comm.all_reduce(value)
    return deepspeed.comm.get_world_size(), value.item(), os.environ["RANK"], os.environ["LOCAL_RANK"]


def test_no_launcher_is_a_world_of_one() -> None:
    assert run_ranks(world_of_one, 1, env=NO_LAUNCHER) == [(1, 1.0, "0", "0")]


def not_required() -> None:
    import deepspeed

    deepspeed.init_distributed(dist_init_required=False)


def test_dist_init_required_false_asserts() -> None:
    (outcome,) = run_outcomes(not_required, 1)
    assert (outcome.status, outcome.error_type) == ("raised", "AssertionError")
    assert "dist_init_required" in outcome.error


def with_rank_and_store(path: str) -> int:
    import deepspeed

    rank = int(os.environ.pop("RANK"))
    deepspeed.init_distributed("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    deepspeed.comm.barrier()
    return deepspeed.comm.get_rank()


def test_rank_world_size_and_init_method(tmp_path: Path) -> None:
    assert run_ranks(with_rank_and_store, 2, f"{tmp_path}/store") == [0, 1]


def just_init() -> None:
    import deepspeed

    deepspeed.init_distributed()


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = run_outcomes(just_init, 2, env={"MASTER_PORT": str(port)}, grace=0.1)[0]
    assert outcome.status == "raised", outcome.describe()
    assert f"port {port} on 127.0.0.1 is in use" in outcome.error
    assert "--master_port" in outcome.error


def timeout_in_minutes() -> float:
    import deepspeed

    deepspeed.init_distributed()
    return (
        torch.distributed.distributed_c10d._get_default_group()
        ._get_backend(torch.device("cpu"))
        .options._timeout.total_seconds()
    )


def test_timeout_from_the_environment() -> None:
    assert run_ranks(timeout_in_minutes, 1, env={"DEEPSPEED_TIMEOUT": "2.5"}) == [150]
    (outcome,) = run_outcomes(just_init, 1, env={"DEEPSPEED_TIMEOUT": "soon"})
    assert "DEEPSPEED_TIMEOUT is 'soon'" in outcome.error


def discover(**environment: str) -> dict[str, str] | None:
    found = _native.discover_rendezvous(environment, 29500, True)
    return None if found is None else {"source": found.source, **found.environment()}


def test_discovery_order_and_values() -> None:
    open_mpi = {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    assert discover() is None
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
    assert discover(**launcher, **open_mpi) == {"source": "the launcher's variables", **launcher}
    assert discover(**open_mpi, MASTER_ADDR="h") == {
        "source": "Open MPI",
        **place,
        "MASTER_ADDR": "h",
        "MASTER_PORT": "29500",
    }
    assert discover(**open_mpi, AZUREML_EXPERIMENT_ID="e", AZ_BATCH_MASTER_NODE="m:6000") == {
        "source": "AzureML",
        **place,
        "MASTER_ADDR": "m",
        "MASTER_PORT": "6000",
        "NCCL_SOCKET_IFNAME": "^docker0,lo",
    }
    one_node = {**open_mpi, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    found = discover(**one_node, AZUREML_EXPERIMENT_ID="e", AZ_BATCHAI_MPI_MASTER_NODE="m")
    assert found is not None
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("m", "54965")
    found = discover(**open_mpi, SM_TRAINING_ENV="{}", MASTER_ADDR="algo-1", MASTER_PORT="7777")
    assert found is not None
    assert (found["source"], found["MASTER_PORT"]) == ("SageMaker", "7777")
    found = discover(**one_node)
    assert found is not None
    assert found["MASTER_ADDR"] == "127.0.0.1"
    found = discover(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")
    assert found is not None
    assert (found["source"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("PMI", "1", "127.0.0.1")
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert discover(**slurm, SLURM_NODELIST="n[1-2]") is None, "a batch script is no task"
    for nodes, first in [("n[03-07,12],x1", "n03"), ("a,b", "a"), ("solo", "solo"), ("r[1,3]-ib", "r1-ib")]:
        found = discover(**slurm, SLURM_STEP_ID="0", SLURM_STEP_NODELIST=nodes)
        assert found is not None
        assert (found["source"], found["MASTER_ADDR"], found["RANK"]) == ("Slurm", first, "5")


def test_contradictions_in_the_environment_are_named() -> None:
    with pytest.raises(ValueError, match="WORLD_SIZE is 4, but RANK and MASTER_ADDR are not set"):
        discover(WORLD_SIZE="4")
    with pytest.raises(ValueError, match="RANK is 2 and WORLD_SIZE is 2"):
        discover(RANK="2", WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="1")
    with pytest.raises(ValueError, match='MASTER_PORT is "x"'):
        discover(RANK="0", WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="x")
    with pytest.raises(ValueError, match='RANK is "one"'):
        discover(RANK="one", WORLD_SIZE="2")
    found = _native.discover_rendezvous({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, 1, True)
    with pytest.raises(RuntimeError, match="set MASTER_ADDR"):
        found.require_master()


def test_local_ranks_from_host_names() -> None:
    found = _native.Rendezvous.from_hosts(3, ["a", "b", "a", "b"], "10.0.0.1", 5)
    assert found.environment() == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "5",
    }
    assert _native.Rendezvous.from_hosts(0, ["a", "a"], "10.0.0.1", 5).master_addr == "127.0.0.1"


_MPI4PY = """
class COMM_WORLD:
    Get_rank = staticmethod(lambda: 1)
    allgather = staticmethod(lambda host: ["first", host, host])
    bcast = staticmethod(lambda address, root: "10.0.0.1")
Get_processor_name = lambda: "second"
"""


def test_mpi4py_is_asked_last(tmp_path: Path) -> None:
    package = tmp_path / "mpi4py"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "MPI.py").write_text(_MPI4PY)
    program = (
        f"import os, sys; sys.path.insert(0, {str(tmp_path)!r}); import deepspeed; deepspeed.comm.mpi_discovery(7777)\n"
        "print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')))"
    )
    done = run_command([sys.executable, "-c", program], env=NO_LAUNCHER).check()
    assert done.stdout.split() == ["1", "3", "0", "10.0.0.1", "7777"]


def test_a_plain_script_runs_without_a_launcher() -> None:
    program = "import deepspeed; deepspeed.init_distributed(); print(deepspeed.comm.get_world_size())"
    assert run_command([sys.executable, "-c", program], env=NO_LAUNCHER).check().stdout.strip() == "1"
