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
        """A pair for every position."""
        done = subprocess.run(
            [program, *map(str, args)], capture_output=True, text=True, check=True, timeout=20
        )
        lines = done.stdout.splitlines()
        return [tuple(map(int, line.split())) for line in lines]

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


AHEAD = [(1, 1), (2, 1), (9, 1), (9, 4), (9, 9), (40, 7)]  # pieces, and how many of them are ahead


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("num_pieces", "ahead"), AHEAD)
def test_every_piece_is_pushed_to_each_peer_and_summed_once(order, num_ranks, num_pieces, ahead):
    """In order; and before sum u come the pushes of piece u to every peer, so that ranks in step
    find what they wait for there."""
    items = order("combine", num_ranks, num_pieces, ahead)
    sums = [piece for offset, piece in items if offset == 0]
    assert sums == list(range(num_pieces))
    pushes = [(piece, offset) for offset, piece in items if offset]
    assert pushes == [(piece, offset) for piece in sums for offset in range(1, num_ranks)]
    assert [offset for offset, _ in items].index(0) == ahead * (num_ranks - 1)
    for u in range(num_pieces):
        before = items[: items.index((0, u))]
        assert all((offset, u) in before for offset in range(1, num_ranks))


MAX_PIECES, PART = 16 * 1024, 4096  # of ffi/layout.h and row_parts.h


def pieces(order, num_tokens, row_bytes, has_few_sms):
    """First and end token, first and end byte of each."""
    lines = order("pieces", num_tokens, row_bytes, int(has_few_sms))
    return [(*tokens, *columns) for tokens, columns in zip(lines[::2], lines[1::2], strict=True)]


@pytest.mark.parametrize("has_few_sms", [False, True])
@pytest.mark.parametrize("row_bytes", [16, 4096, 4112, 14336, 28672, 200_000])
@pytest.mark.parametrize("num_tokens", [1, 2, 128, 129, 1024, 1025, 4096, 13_000, 40_000])
def test_pieces_are_all_columns_of_all_tokens_once(order, num_tokens, row_bytes, has_few_sms):
    """Each has a flag, and parts of rows are whole multiples of the least one, but the last."""
    found = pieces(order, num_tokens, row_bytes, has_few_sms)
    assert 1 <= len(found) <= MAX_PIECES
    token, end, byte = 0, 0, row_bytes  # of the piece before
    for first_token, end_token, first_byte, end_byte in found:
        new_run = byte == row_bytes
        assert first_token == (end if new_run else token)
        assert first_byte == (0 if new_run else byte)
        assert first_token < end_token <= num_tokens
        assert first_byte < end_byte <= row_bytes
        assert first_byte % PART == 0
        token, end, byte = first_token, end_token, end_byte
    assert (end, byte) == (num_tokens, row_bytes)


def test_few_sms_have_half_as_many_pieces(order):
    assert [len(pieces(order, 4096, 14336, few)) for few in (False, True)] == [8192, 4096]


@pytest.mark.parametrize(("num_tokens", "num_parts"), [(1, 4), (128, 4), (2048, 4), (4096, 2)])
def test_rows_of_short_batches_are_cut_into_parts_of_4_kb(order, num_tokens, num_parts):
    assert len(pieces(order, num_tokens, 14336, False)) == num_tokens * num_parts


class Rank:
    """Workers that claim items in order, each holding its next claims while it works, as the
    kernels' do. A push is done at once; a sum waits for all peers' pushes of its piece."""

    def __init__(self, items, num_workers, num_held):
        self.items, self.next, self.num_held = items, num_workers, num_held
        self.held = [[i] for i in range(num_workers)]  # what each works on, then what it has beside
        self.pushed = set()

    def begin(self, worker):
        while len(self.held[worker]) <= self.num_held:
            self.held[worker].append(self.next)
            self.next += 1

    def end(self, worker):
        del self.held[worker][0]
        self.begin(worker)

    def is_idle(self):
        return all(held[0] >= len(self.items) for held in self.held)


def simulate(order, num_ranks, num_pieces, ahead, num_workers, num_held, seed):
    """Runs ranks in a random order of events to the end; False when none can go on."""
    rng = np.random.default_rng(seed)
    items = order("combine", num_ranks, num_pieces, ahead)
    ranks = [Rank(items, num_workers, num_held) for _ in range(num_ranks)]
    speeds = rng.random(num_ranks) ** 3 + 0.01
    while not all(rank.is_idle() for rank in ranks):
        able = []
        for r, rank in enumerate(ranks):
            for worker in range(num_workers):
                position = rank.held[worker][0]
                if position >= len(items):
                    continue
                rank.begin(worker)
                item = items[position]
                if item[0] == 0:
                    offsets = range(1, num_ranks)
                    landed = all(
                        ((r - o) % num_ranks, o, item[1]) in ranks[(r - o) % num_ranks].pushed
                        for o in offsets
                    )
                    if not landed:
                        continue
                able.append((r, worker))
        if not able:
            return False
        weights = np.array([speeds[r] for r, _ in able])
        r, worker = able[rng.choice(len(able), p=weights / weights.sum())]
        item = items[ranks[r].held[worker][0]]
        if item[0]:
            ranks[r].pushed.add((r, *item))
        ranks[r].end(worker)
    return True


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_held", [1, 2])  # by a team, by a warp with a ring of tiles
@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize(("num_pieces", "ahead"), [(1, 1), (6, 2), (12, 4)])
def test_no_order_of_events_stops_the_ranks(
    order, num_ranks, num_held, num_workers, num_pieces, ahead
):
    """Also with one worker a rank: a push that is held behind a stuck sum is of a later piece."""
    for seed in range(6):
        assert simulate(order, num_ranks, num_pieces, ahead, num_workers, num_held, seed)


def test_the_simulation_finds_a_deadlock(order):
    """Sums before the pushes they wait for on other ranks: nobody can go on."""

    def sums_first(*args):
        return sorted(order(*args), key=lambda item: item[0] != 0)

    assert not simulate(sums_first, 2, 3, 1, 1, 1, 0)
