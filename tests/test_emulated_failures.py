"""What the kernels of a group do, on the host, when a rank is in another call or takes no part."""

import numpy as np
import oracle
import pytest
from emulation import OPS, Way, job_of_gather, job_of_rows, make_experts, ruined, run_to_the_end
from helpers import Case, assert_bitwise_equal, make_bits, make_floats, make_ids, one_process
from native_build import needs_compiler

pytestmark = [needs_compiler, one_process]

# FailureKind and Phase of layout.h.
TIMEOUT, MISMATCH, OF_PEER, READY = 1, 2, 3, 3


@pytest.mark.parametrize("num_ranks", [4, 8])
@pytest.mark.parametrize("op", [op for op in OPS if op != "plan"])
def test_a_rank_in_another_call_is_named_by_all(library, tmp_path, op, num_ranks):
    """Rank 2 has other options, and every rank needs every other one. Who finds it names it, and it
    names anybody; who stops because of an error names a rank that found it. All results are
    poisoned."""
    case, odd = Case(T=3, K=8, E=8, R=num_ranks, A=2, H=32), 2
    ids, way = make_ids("uniform", case), Way(odd=odd)
    out = ruined(case.R, case.R * case.T if op == "gather" else case.T, case.H)
    arrays = {"x": make_floats(case.R, case.T, case.H), "out": out}
    if op == "gather":
        arrays |= {"weights": arrays["x"], "dweights": out.copy()}
        job = job_of_gather(case.R, case.T, case.H, 8 * case.H, **arrays)
    else:
        y, weights = make_experts(case, oracle.plan(case, ids), np.float32)
        if op == "dispatch":
            arrays["out"] = ruined(*y.shape)
        elif op == "combine":
            arrays |= {"x": y, "weights": weights}
        else:
            dweights = ruined(case.R, case.T, case.K)
            rows = {"x": y, "out": ruined(*y.shape), "dweights": dweights}
            arrays = {"dout": arrays["x"], "weights": weights, **rows}
        job, arrays = job_of_rows(case, op, way, ids=ids, **arrays)
    after, failures = run_to_the_end(library, tmp_path, job, way, **arrays)
    assert failures[:, 2].tolist() == list(range(case.R))
    for rank, (kind, phase, _, peer) in enumerate(failures):
        if kind == MISMATCH:
            assert phase == READY
            assert (peer == odd) != (rank == odd)
            continue
        assert kind == OF_PEER
        assert failures[peer, 0] == MISMATCH
    assert_poisoned(after)


@pytest.mark.parametrize("op", ["combine", "combine_backward"])
def test_ranks_that_send_weights_otherwise_are_in_different_calls(library, tmp_path, op):
    """One without bulk copies sends few weights in a table, where the others look for words."""
    case = Case(T=6, K=2, E=8, R=2, A=4, H=64)
    ids = make_ids("uniform", case)
    y, weights = make_experts(case, oracle.plan(case, ids), np.float32)
    tokens = make_floats(case.R, case.T, case.H)
    arrays = {"x": y, "weights": weights, "out": ruined(*tokens.shape)}
    if op == "combine_backward":
        arrays |= {"dout": tokens, "out": ruined(*y.shape), "dweights": ruined(*weights.shape)}
    way = Way(vector=1)
    job, arrays = job_of_rows(case, op, way, ids=ids, **arrays)
    after, failures = run_to_the_end(library, tmp_path, job, way, **arrays)
    assert MISMATCH in failures[:, 0]
    assert set(failures[:, 0]) <= {MISMATCH, OF_PEER}
    assert_poisoned(after)


def assert_poisoned(arrays):
    for name in {"out", "dweights"} & arrays.keys():
        assert (arrays[name].view(np.uint8) == 0xFF).all(), name


def gather_with_faults(library, folder, **way):
    """Its arrays and failures, of three ranks: the calls of test_gather."""
    R, T, K = 3, 5, 3
    x = make_bits(R, T, K, dtype=np.int32)
    arrays = {"x": x, "out": ruined(R, R * T, K, dtype=np.int32)}
    job = job_of_gather(R, T, K, 4 * K, **arrays)
    return run_to_the_end(library, folder, job, Way(**way), **arrays)


def test_nobody_has_results_when_a_rank_takes_no_part(library, tmp_path):
    """Whom nobody told names the rank that it waits for, and the others name it or that rank."""
    odd = 1
    after, failures = gather_with_faults(
        library, tmp_path, timeout_s=0.5, faults=((odd, (0, 1, 0, 0)),)
    )
    assert_poisoned(after)
    others = np.delete(failures, odd, axis=0)
    assert TIMEOUT in others[:, 0]
    for kind, phase, _, peer in others:
        assert (kind, phase, peer) == (TIMEOUT, READY, odd) or (kind == OF_PEER and peer != odd)


def test_who_takes_no_part_notes_that_a_rank_gave_up(library, tmp_path):
    """Without a wait that would meet it."""
    faults = tuple((rank, (0, rank == 0, 1 + 2, 0)) for rank in range(3))
    after, failures = gather_with_faults(library, tmp_path, faults=faults)
    assert_poisoned(after)
    assert failures[:, [0, 3]].tolist() == [[OF_PEER, 2]] * 3


def test_results_are_poisoned_while_another_call_tells_of_its_failure(library, tmp_path):
    """Its word has not reached this rank, whose own wait ends."""
    late, telling = (1, (0, 1, 0, 0)), [(rank, (0, 0, 0, 1)) for rank in (0, 2)]
    after, failures = gather_with_faults(library, tmp_path, timeout_s=0.3, faults=(late, *telling))
    assert_poisoned(after)
    assert not failures.any()  # the other call's to write


def test_a_delay_before_a_call_changes_nothing(library, tmp_path):
    """Other calls of the rank could run meanwhile: it does not hold the turn."""
    fault = (1, (50_000_000, 0, 0, 0))
    after, failures = gather_with_faults(library, tmp_path, repeats=3, timeout_s=4, faults=(fault,))
    assert not failures.any()
    for call in range(3):
        want = after["x"][:, call].reshape(-1, 3)
        assert_bitwise_equal(after["out"][:, call], np.stack([want] * 3))
