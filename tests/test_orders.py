"""In which order ranks take their work: all of it once, and no order of events stops them.

The orders are those of ffi/order.h, printed by native/orders.cc. Needs g++ and CUDA's headers, no
GPU.
"""

import subprocess

import numpy as np
import pytest
from native_build import NATIVE, build, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    program = build(tmp_path_factory.mktemp("orders"), NATIVE / "orders.cc")

    def run(*args):
        """A pair for every position, None where there is nothing."""
        done = subprocess.run(
            [program, *map(str, args)], capture_output=True, text=True, check=True, timeout=20
        )
        lines = done.stdout.splitlines()
        return [None if line == "-" else tuple(map(int, line.split())) for line in lines]

    return run


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("num_tokens", "lead"), [(1, 1), (5, 5), (7, 3), (20, 1), (20, 16)])
def test_every_token_is_pulled_once(order, num_ranks, num_tokens, lead):
    """Own ones first; then each rank's in turn, from the next rank on, each in order."""
    everything = {(source, t) for source in range(num_ranks) for t in range(num_tokens)}
    for rank in range(num_ranks):
        taken = order("pulls", num_ranks, rank, num_tokens, lead)
        assert len(taken) == len(everything)
        assert set(taken) == everything
        assert taken[:lead] == [(rank, t) for t in range(lead)]
        of_peers = [source for source, _ in taken if source != rank]
        turn = [(rank + offset) % num_ranks for offset in range(1, num_ranks)]
        assert of_peers == turn * num_tokens
        for source in range(num_ranks):
            assert [t for s, t in taken if s == source] == list(range(num_tokens))


AHEAD = [(1, 1), (2, 1), (9, 1), (9, 4), (9, 9), (40, 7)]  # runs, and how many of them are ahead


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("num_runs", "runs_ahead"), AHEAD)
def test_every_run_is_pushed_to_each_peer_and_summed_once(order, num_ranks, num_runs, runs_ahead):
    """In order; and before sum u come the pushes of run u to every peer, so that ranks in step find
    what they wait for there."""
    num_peers = num_ranks - 1
    items = [item for item in order("combine", num_ranks, num_runs, runs_ahead * num_peers) if item]
    sums = [run for offset, run in items if offset == 0]
    assert sums == list(range(num_runs))
    pushes = [(run, offset) for offset, run in items if offset]
    assert pushes == [(run, offset) for run in range(num_runs) for offset in range(1, num_ranks)]
    for u in range(num_runs):
        before = items[: items.index((0, u))]
        assert all((offset, u) in before for offset in range(1, num_ranks))


class Rank:
    """Teams that claim items in order, each holding its next claim while it works, as the kernel's
    do. A push is done at once; a sum waits for all peers' pushes of its run."""

    def __init__(self, items, num_teams):
        self.items, self.next = items, num_teams
        self.held = list(range(num_teams))  # what each team works on
        self.then = [None] * num_teams  # what it has claimed beside
        self.pushed = set()

    def begin(self, team):
        if self.then[team] is None:
            self.then[team], self.next = self.next, self.next + 1

    def end(self, team):
        self.held[team], self.then[team] = self.then[team], None

    def is_idle(self):
        return all(position >= len(self.items) for position in self.held)


def simulate(order, num_ranks, num_runs, ahead, num_teams, seed):
    """Runs ranks in a random order of events to the end; False when none can go on."""
    rng = np.random.default_rng(seed)
    items = order("combine", num_ranks, num_runs, ahead)
    ranks = [Rank(items, num_teams) for _ in range(num_ranks)]
    speeds = rng.random(num_ranks) ** 3 + 0.01
    while not all(rank.is_idle() for rank in ranks):
        able = []
        for r, rank in enumerate(ranks):
            for team in range(num_teams):
                position = rank.held[team]
                if position >= len(items):
                    continue
                rank.begin(team)
                item = items[position]
                if item and item[0] == 0:
                    offsets = range(1, num_ranks)
                    landed = all(
                        ((r - o) % num_ranks, o, item[1]) in ranks[(r - o) % num_ranks].pushed
                        for o in offsets
                    )
                    if not landed:
                        continue
                able.append((r, team))
        if not able:
            return False
        weights = np.array([speeds[r] for r, _ in able])
        r, team = able[rng.choice(len(able), p=weights / weights.sum())]
        item = items[ranks[r].held[team]]
        if item and item[0]:
            ranks[r].pushed.add((r, *item))
        ranks[r].end(team)
    return True


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_teams", [1, 2, 5])
@pytest.mark.parametrize(("num_runs", "runs_ahead"), [(1, 1), (6, 2), (12, 4)])
def test_no_order_of_events_stops_the_ranks(order, num_ranks, num_teams, num_runs, runs_ahead):
    """Also with one team a rank: a push that is held behind a stuck sum belongs to a later run."""
    for seed in range(6):
        ahead = runs_ahead * (num_ranks - 1)
        assert simulate(order, num_ranks, num_runs, ahead, num_teams, seed)


def test_the_simulation_finds_a_deadlock(order):
    """Sums before the pushes they wait for on other ranks: nobody can go on."""

    def sums_first(*args):
        return sorted(order(*args), key=lambda item: item is None or item[0] != 0)

    assert not simulate(sums_first, 2, 3, 1, 1, 0)
