"""What the processes of a run agree on, in two gloo processes."""

import pytest
import torch

from fastsiam.errors import UserError
from fastsiam.runtime.distributed import World
from tests.support.gloo_ranks import world
from tests.support.refusals import refuses


def agreed():
    mine = world()
    return mine.share(f"from {mine.rank}"), mine.collect(10 * mine.rank), mine.largest(mine.rank, -mine.rank, 7)


def test_all_ranks_come_to_the_same_values(ranks):
    assert ranks(2, agreed) == [("from 0", [0, 10], [1, 0, 7])] * 2


def one_fails(rank):
    mine = world()
    try:
        with mine.together():
            if mine.rank == rank:
                raise UserError("no such folder", "absent")
    except UserError as error:
        return str(error), error.code
    except SystemExit as error:
        return error.code
    return "nothing"


def test_the_mistake_of_one_ends_all_and_the_first_says_it(ranks):
    assert ranks(2, one_fails, 0) == [("no such folder", "absent"), 2]
    assert ranks(2, one_fails, 1) == [("no such folder (on rank 1)", "absent"), 2]
    assert ranks(2, one_fails, None) == ["nothing", "nothing"]


def parts_and_whole(count):
    mine = world()
    rows = torch.arange(3 * count, dtype=torch.float64).view(count, 3)
    part = rows[mine.share_of(count)]
    if not len(part):
        part = torch.empty(0, dtype=torch.float64)
    return len(part), torch.equal(mine.gather(part), rows)


@pytest.mark.parametrize(("count", "parts"), [(8, [4, 4]), (5, [2, 3]), (1, [0, 1])])
def test_parts_of_all_ranks_are_the_whole_in_its_order(ranks, count, parts):
    assert ranks(2, parts_and_whole, count) == [(part, True) for part in parts]


def leave_and_find(folder):
    mine = world()
    with mine.leader_first():
        found = (folder / "left").exists()
        (folder / "left").touch()
    return found


def test_what_the_leader_leaves_the_others_find(ranks, tmp_path):
    assert ranks(2, leave_and_find, tmp_path) == [False, True]


def test_the_environment_says_who_this_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert World.of_environment() == World(0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with refuses("incomplete-torchrun"):
        World.of_environment()
    for name, value in {"LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "host", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert World.of_environment() == World(rank=3, size=4, local_rank=1, local_size=2)
