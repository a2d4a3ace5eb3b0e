"""Two processes train one model: their gates choose the same heads."""

import pytest
import torch
import torch.multiprocessing as mp
from support.distributed_gates import GATES, run


@pytest.mark.parametrize("how", ["fsdp2", "by hand"])
def test_two_processes_choose_the_same_heads(tmp_path, how):
    mp.start_processes(run, (str(tmp_path), how), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{how}.{rank}") for rank in range(2))
    assert sorted(first) == sorted(second) and set(GATES) <= set(first)
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
