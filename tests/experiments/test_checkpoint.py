"""Checkpoints: what was saved comes back, or is known to be damaged."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from experiments.checkpoint import Checkpoints, Damaged, param_hash

# Orbax's event loop is closed before its last callback when a read fails; it says so when it is collected.
quiet_uvloop = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(value: float = 1.0):
    params = {"head": {"kernel": jnp.full((4, 3), value), "bias": jnp.arange(3.0)}, "embed": jnp.ones((5, 4)) * value}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    return {
        "step": jnp.int32(7),
        "rng": jax.random.key_data(jax.random.key(3)),
        "params": params,
        "opt": tx.init(params),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(checkpoints, step, state, **notes):
    checkpoints.save(step, state, notes)
    checkpoints.wait()
    failure = checkpoints.poll()
    assert failure is None, failure


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def damage(folder, step):
    """Flips one bit in the middle of every data file of a step."""
    for file in (folder / f"{step:08d}").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))


def test_returns_what_was_saved(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), make_state()
    save(checkpoints, 7, state, best={"step": 7}, seconds=1.5)
    step, loaded, notes = Checkpoints(tmp_path).load(abstract(state))
    assert (step, notes) == (7, {"best": {"step": 7}, "seconds": 1.5})
    assert same(loaded, state)
    params = Checkpoints(tmp_path).load({"params": abstract(state)["params"]})[1]["params"]
    assert param_hash(params) == param_hash(state["params"]) != param_hash(make_state(2.0)["params"])


def test_holds_plain_nested_dicts_only(tmp_path):
    save(Checkpoints(tmp_path), 1, make_state())

    def plain(tree):
        return (
            all(plain(v) for v in tree.values()) if isinstance(tree, dict) else isinstance(tree, jax.Array | np.ndarray)
        )

    assert plain(ocp.load(tmp_path / "00000001"))


def test_state_and_notes_may_change_once_save_returns(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), make_state()
    want = jax.tree.map(np.array, state)
    shapes = abstract(state)
    notes = {"window": {"loss": 1.0}}
    checkpoints.save(1, state, notes)
    notes["window"]["loss"] = 2.0
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0 - 1 if x.dtype == jnp.float32 else x, s), donate_argnums=0
    )
    jax.block_until_ready(overwrite(state))
    checkpoints.wait()
    _, loaded, notes = checkpoints.load(shapes)
    assert same(jax.tree.map(np.asarray, loaded), want)
    assert notes == {"window": {"loss": 1.0}}


@quiet_uvloop
@pytest.mark.parametrize("fault", ["bit", "truncated", "missing", "manifest bit", "manifest cut"])
def test_damaged_step_is_passed_over(tmp_path, caplog, fault):
    checkpoints, state = Checkpoints(tmp_path, keep=3), make_state()
    for step in (1, 2):
        save(checkpoints, step, make_state(float(step)))
    files = list((tmp_path / "00000002").rglob("d/*"))
    manifest = tmp_path / "00000002.json"
    if fault == "bit":
        damage(tmp_path, 2)
    elif fault == "truncated":
        for file in files:
            file.write_bytes(file.read_bytes()[:10])
    elif fault == "missing":
        for file in files:
            file.unlink()
    elif fault == "manifest bit":
        manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    else:
        manifest.write_text(manifest.read_text()[:50])
    with caplog.at_level(logging.WARNING, "archloom"):
        step, loaded, _ = checkpoints.load(abstract(state))
    assert step == 1
    assert same(loaded, make_state(1.0))
    assert "checkpoint 2 passed over" in caplog.text
    with pytest.raises(Damaged):
        checkpoints.load_step(2, abstract(state))


def test_every_leaf_is_checked(tmp_path):
    """A leaf that Orbax reads without complaint but that is not the one hashed."""
    checkpoints, state = Checkpoints(tmp_path), make_state()
    save(checkpoints, 1, state)
    other = {**state, "rng": state["rng"] + 1}
    leaves = json.loads((tmp_path / "00000001.json").read_text())["body"]["leaves"]
    assert {"rng", "step", "params/embed", "opt/1/mu/head/kernel", "opt/1/count"} <= set(leaves)
    ocp.save(
        tmp_path / "00000001",
        {**jax.tree.map(np.array, other), "opt": {"1": other["opt"][1]._asdict()}},
        overwrite=True,
    )
    with pytest.raises(Damaged, match="rng"):
        checkpoints.load_step(1, abstract(state))


def test_failed_save_is_told_and_never_latest(tmp_path):
    calls = []

    def write(path, tree, **options):
        calls.append(path)
        if len(calls) == 2:
            path.mkdir(parents=True)
            raise OSError("No space left on device")
        ocp.save(path, tree, **options)

    checkpoints, state = Checkpoints(tmp_path, write=write), make_state()
    save(checkpoints, 1, state)
    checkpoints.save(2, state, {})
    checkpoints.wait()
    step, error = checkpoints.poll()
    assert step == 2
    assert "No space left" in str(error)
    assert checkpoints.poll() is None
    assert checkpoints.latest() == 1
    assert checkpoints.load(abstract(state))[0] == 1
    checkpoints.sweep()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "00000001.json"]
    save(checkpoints, 3, state)
    assert checkpoints.latest() == 3


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, keep=2), make_state()
    for step in (10, 20, 30, 40):
        save(checkpoints, step, state, best={"step": min(step, 20)})
    assert checkpoints.steps() == [20, 30, 40]
    assert checkpoints.best() == 20
    assert checkpoints.latest() == 40
    save(checkpoints, 50, state, best={"step": 50})
    assert checkpoints.steps() == [40, 50]


def test_nothing_to_load(tmp_path):
    assert Checkpoints(tmp_path / "none").load(abstract(make_state())) is None
    assert Checkpoints(tmp_path / "none").best() is None
