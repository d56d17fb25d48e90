"""The examples run as they stand, each in a process of its own, and do what they say."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT_S = 600  # a hang is a failure; an idle machine with two cores needs a tenth of it


def run_example(name: str, *options: object, fails: bool = False, **env: str) -> str:
    """What the example prints, on the GPUs if there are any."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, options)]
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The tests' own process has taken its share of a GPU's memory already.
    settings = {"PYTHONPATH": os.pathsep.join(paths), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | settings | {"COLUMNS": "80"} | env,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def table_rows(out: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip().strip("│").split("│")]
        for line in out.splitlines()
        if "│" in line
    ]


def test_01_shows_every_assignment_in_one_row() -> None:
    """Rank r owns experts 2r and 2r + 1; token t of rank s holds 3s + t + 1; one id is -1."""
    out = run_example("01_dispatch_combine.py", "--implementation", "reference")
    num_ranks = int(re.search(r"tokens on (\d+) ranks came back as expected", out)[1])
    seen, sizes = set(), {}
    for rank, table in enumerate(out.split("receives")[1:]):
        rows = table_rows(table)
        assert rows[-1][2] == "tail"
        assert rows[-1][-1] == "0"
        for row, (number, expert, source, token, k, x) in enumerate(rows[:-1]):
            assert int(number) == row
            assert int(expert) // 2 == rank
            sizes[expert] = sizes.get(expert, 0) + 1
            if source == "padding":
                assert x == "0"
            else:
                assert int(x) == 3 * int(source) + int(token) + 1
                seen.add((int(source), int(token), int(k)))
    assignments = {(s, t, k) for s in range(num_ranks) for t in range(3) for k in range(2)}
    assert seen == assignments - {(0, 1, 1)}
    assert all(size % 2 == 0 for size in sizes.values())  # aligned to 2


def test_02_gradients_agree_with_the_dense_layer() -> None:
    """Within 1e-5 of the largest gradient; a plan has 9 arrays, made again if not saved."""
    out = run_example("02_gradients.py", "--implementation", "reference")
    assert "agree; the saved plan was not made again" in out
    rows = {label: values for label, *values in table_rows(out)}
    largest = [float(value) for value in rows.pop("(largest gradient)")[:3]]
    assert {label: values[3] for label, values in rows.items()} == {
        "all saved": "9",
        "ep_plan saved": "9",
        "nothing saved": "18",
    }
    for *differences, _ in rows.values():
        assert all(float(d) < 1e-5 * g for d, g in zip(differences, largest, strict=True))


# The language model.


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that half of the demo's steps leave behind."""
    out = tmp_path_factory.mktemp("demo")
    options = ("--small", "--steps", 150, "--implementation", "reference", "--out", out)
    run_example("03_flax_moe_lm.py", *options)
    return out


@pytest.fixture(scope="module")
def summary(demo: Path) -> dict[str, Any]:
    return json.loads((demo / "summary.json").read_text())


def test_03_learns_more_than_byte_frequencies(summary: dict[str, Any]) -> None:
    assert summary["held_out_loss_before"] > math.log(256)  # nothing known yet
    assert summary["held_out_loss"] < summary["unigram_entropy"] - 0.4


def test_03_depends_on_the_routing(summary: dict[str, Any]) -> None:
    assert summary["held_out_loss_shuffled_routing"] > summary["held_out_loss"] + 0.1


def test_03_drops_nothing(summary: dict[str, Any]) -> None:
    assert summary["num_dropped"] == 0


def test_03_summary_tells_what_ran(summary: dict[str, Any]) -> None:
    assert len(summary["loss"]) == summary["train"]["steps"] == 150
    assert np.isfinite(summary["loss"]).all()
    tokens_a_step = summary["train"]["batch"] * summary["model"]["seq"]
    assert summary["tokens_per_s"] == pytest.approx(summary["steps_per_s"] * tokens_a_step)
    assert summary["steps_per_s"] > 0
    assert set(summary["mesh"]) == {"data", "expert"}
    assert summary["implementation"] == "reference"
    assert {"python", "jax", "flax", "jax_moe_ep"} <= set(summary["versions"])


@pytest.mark.parametrize("name", ["loss.png", "expert_load.png"])
def test_03_plots_are_not_blank(demo: Path, name: str) -> None:
    from matplotlib import image

    pixels = image.imread(demo / name)[..., :3]
    assert min(pixels.shape[:2]) >= 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


# The same tiny run in several ways, on CPU devices: there, sums have a fixed order.

TINY = ("--small", "--layers", 1, "--width", 32, "--seq", 32, "--batch", 4, "--steps", 6)


def tiny_run(
    out: Path, text: Path, *options: object, fails: bool = False, num_processes: int = 1
) -> str:
    shared = (*TINY, "--implementation", "reference", "--files", text, "--out", out)
    name, launched = "03_flax_moe_lm.py", ()
    if num_processes > 1:
        launched = ("--num-processes", num_processes, EXAMPLES / name)
        name = "multiprocess/run.py"
    return run_example(name, *launched, *shared, *options, fails=fails, JAX_PLATFORMS="cpu")


def losses(out: Path) -> list[float]:
    return json.loads((out / "summary.json").read_text())["loss"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough bytes for six batches and a held-out part, some more likely than others."""
    path = tmp_path_factory.mktemp("text") / "text.bin"
    path.write_bytes(np.random.default_rng(0).geometric(0.05, 100_000).astype(np.uint8).tobytes())
    return path


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Six steps on EP 4 x DP 1."""
    out = tmp_path_factory.mktemp("straight")
    tiny_run(out, text, "--ep", 4, "--dp", 1)
    return out


def test_03_resumes_exactly(tmp_path: Path, text: Path, straight: Path) -> None:
    """Three steps and three after a restart have the losses of six, to the last bit."""
    mesh = ("--ep", 4, "--dp", 1)
    assert "stopped after step 3" in tiny_run(tmp_path, text, *mesh, "--stop-at", 3)
    assert "has an unfinished run" in tiny_run(tmp_path, text, *mesh, fails=True)
    other_seed = tiny_run(tmp_path, text, *mesh, "--resume", "--seed", 1, fails=True)
    assert "seed 0 -> 1" in " ".join(other_seed.split())
    assert "resumed after step 3" in tiny_run(tmp_path, text, *mesh, "--resume")
    assert losses(tmp_path) == losses(straight)
    assert len(set(losses(tmp_path))) == 6


def test_03_learns_the_same_on_another_mesh(tmp_path: Path, text: Path, straight: Path) -> None:
    """Only the order of sums differs: 1e-4 is many roundings of a loss of 5 in float32."""
    tiny_run(tmp_path, text, "--ep", 2, "--dp", 2)
    np.testing.assert_allclose(losses(tmp_path), losses(straight), atol=1e-4)


def test_03_learns_the_same_in_two_processes(tmp_path: Path, text: Path, straight: Path) -> None:
    """Two devices each, one EP group over both processes, three steps and three after a restart.

    Only the order of a few sums differs: 1e-5 is some roundings of a loss of 5. Process 1 prints
    nothing and process 0 all once.
    """
    two = {"num_processes": 2}
    mesh = ("--ep", 4, "--dp", 1)
    out = tiny_run(tmp_path, text, *mesh, "--stop-at", 3, **two)
    assert out.count("mesh {'data': 1, 'expert': 4}") == out.count("stopped after step 3") == 1
    out = tiny_run(tmp_path, text, *mesh, "--resume", **two)
    assert out.count("resumed after step 3") == out.count("written: ") == 1
    np.testing.assert_allclose(losses(tmp_path), losses(straight), rtol=0, atol=1e-5)


def test_03_needs_all_processes(tmp_path: Path, text: Path) -> None:
    """A mesh of one device, and two processes with one each: the other would have nothing to do."""
    out = tiny_run(tmp_path, text, "--ep", 1, "--dp", 1, fails=True, num_processes=2)
    message = "ep=1 times dp=1 leaves devices of some of the 2 processes out: all 2 must take part"
    assert message in " ".join(re.sub("[│╭╮╰╯─]", "", out).split())


# Its data.


@pytest.fixture
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moe_lm_data", EXAMPLES / "moe_lm" / "data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_data_holds_one_block_in_ten_out(data: ModuleType, tmp_path: Path) -> None:
    """Block b of the text is all b: the held-out bytes are 9 and 19, and those of training none."""
    (tmp_path / "a").write_bytes(np.repeat(np.arange(13), data.BLOCK_BYTES).astype(np.uint8))
    (tmp_path / "b").write_bytes(np.repeat(np.arange(13, 20), data.BLOCK_BYTES).astype(np.uint8))
    text = data.load_text([tmp_path / "a", tmp_path / "b"])
    assert np.unique(text.held_out).tolist() == [9, 19]
    assert np.unique(text.train).tolist() == [*range(9), *range(10, 19)]
    assert len(text.train) == 18 * data.BLOCK_BYTES


def test_data_goes_through_all_windows_each_epoch(data: ModuleType) -> None:
    """Of 2 * 8 + 1 bytes, four windows of four targets, in another order the second time."""
    windows = data.TrainingWindows(np.arange(17, dtype=np.uint8), seq=4, batch=2, seed=0)
    batches = np.stack([next(windows) for _ in range(20)])
    assert (batches[..., 1:] - batches[..., :-1] == 1).all()
    epochs = batches[..., 0].reshape(10, 4)
    assert (np.sort(epochs, axis=1) == [0, 4, 8, 12]).all()
    assert len(np.unique(epochs, axis=0)) > 1


def test_data_goes_on_from_a_position(data: ModuleType) -> None:
    text = np.arange(100, dtype=np.uint8)
    windows = data.TrainingWindows(text, seq=4, batch=5, seed=3)
    batches = [next(windows) for _ in range(12)]
    resumed = data.TrainingWindows(text, seq=4, batch=5, seed=3, position=7)
    for batch in batches[7:]:
        np.testing.assert_array_equal(next(resumed), batch)


def test_data_unigram_entropy(data: ModuleType) -> None:
    """Bytes 0 and 1 once each, add one: 2 of 258 for each, so a target of 1 costs log(129)."""
    windows = np.array([[7, 1, 1], [7, 1, 1]])
    train = np.array([0, 1], np.uint8)
    assert data.unigram_entropy(train, windows) == pytest.approx(math.log(129))
