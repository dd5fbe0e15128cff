"""Rules, meshes, and eight devices against one."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from arch.errors import ConfigError
from experiments import sharding

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1}
PARAMS = {
    "embed": {"embedding": jax.ShapeDtypeStruct((11, 8), jnp.float32)},
    "blocks": {"0": {"mixer": {"qkv": {"kernel": jax.ShapeDtypeStruct((8, 24), jnp.float32)}}}},
    "head": {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)},
}


class FakeMesh:
    """A shape is all that the rules look at."""

    def __init__(self, **sizes):
        self.shape = dict.fromkeys(sharding.AXES, 1) | sizes


def test_mesh_fills_the_free_axis():
    mesh = sharding.make_mesh(SIZES)
    assert mesh.axis_names == sharding.AXES
    assert mesh.shape["data"] == jax.device_count()
    assert {t.name for t in mesh.axis_types} == {"Auto"}


@pytest.mark.parametrize(
    ("sizes", "field"),
    [({"tensor": 1000}, "mesh: "), ({"data": 1, "fsdp": 3}, "mesh: "), ({"fsdp": -1}, "mesh.fsdp: ")],
)
def test_mesh_must_fit_the_devices(sizes, field):
    with pytest.raises(ConfigError) as error:
        sharding.make_mesh({**SIZES, **sizes})
    assert str(error.value).startswith(field)


def test_first_match_wins():
    rules = (("qkv/kernel$", ("fsdp", "tensor")), ("kernel", ("tensor",)), ("bias|embed", ()))
    with pytest.raises(ConfigError, match=r"sharding\.1: 'kernel' decides no parameter"):  # hidden by the first
        sharding.parameter_specs(PARAMS, rules, FakeMesh())
    specs = sharding.parameter_specs(PARAMS, (rules[0], rules[2]), FakeMesh(fsdp=2, tensor=2))
    assert specs["blocks/0/mixer/qkv/kernel"] == P("fsdp", "tensor")
    assert specs["head/bias"] == specs["embed/embedding"] == P()


REST = (".*", ())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("kernel", ()),), "sharding: no rule matches embed/embedding"),
        ((("kernell", ()), REST), "sharding.0: 'kernell' decides no parameter"),
        ((("(", ()), REST), "sharding.0: '(' is not a regular expression"),
        ((("qkv", ("model",)), REST), "sharding.0: 'model' is not a mesh axis"),
        ((("qkv", ("fsdp", "...")), REST), "sharding.0: '...' is not a mesh axis"),
        ((("qkv", ("fsdp", "fsdp")), REST), "sharding.0: 'fsdp' is used twice"),
        ((("bias", (None, "fsdp")), REST), "sharding.0: 2 axes for head/bias"),
        (((".*", ("fsdp",)),), "sharding.0: embed/embedding (11, 8): dimension 0 does not divide over fsdp = 2"),
        (((".*embed", (("fsdp", "tensor"),)), REST), "does not divide over fsdp x tensor = 4; change mesh.fsdp"),
    ],
)
def test_mistakes_in_rules(rules, message):
    with pytest.raises(ConfigError) as error:
        sharding.parameter_specs(PARAMS, rules, FakeMesh(fsdp=2, tensor=2))
    assert message in str(error.value)


def test_axes_of_the_last_dimensions():
    """Kernels stacked by layer or expert are split as one kernel is."""
    shapes = {"kernel": (8, 24), "stacked": (3, 8, 24), "both": (2, 3, 8, 24), "vector": (4,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    rules = (("vector", ("fsdp",)), ("", ("...", "fsdp", ("tensor", "sequence"))))
    specs = sharding.parameter_specs(params, rules, FakeMesh(fsdp=2, tensor=2))
    pair = (("fsdp",), ("tensor", "sequence"))
    assert specs == {"kernel": P(*pair), "stacked": P(None, *pair), "both": P(None, None, *pair), "vector": P("fsdp")}
    with pytest.raises(ConfigError, match="2 axes for vector"):
        sharding.parameter_specs(params, rules[1:], FakeMesh())
    experts = {
        "moe": {name: {"kernel": jax.ShapeDtypeStruct((3, 8, 6), jnp.float32)} for name in ("up", "gate", "down")}
    }
    found = sharding.parameter_specs(experts, (), FakeMesh(fsdp=2, tensor=2))
    assert found["moe/up/kernel"] == found["moe/gate/kernel"] == P(None, "fsdp", "tensor")
    assert found["moe/down/kernel"] == P(None, "tensor", "fsdp")


def test_default_rules_split_what_divides_and_say_what_not(caplog):
    with caplog.at_level(logging.WARNING, "archloom"):
        specs = sharding.parameter_specs(PARAMS, (), FakeMesh(fsdp=2, tensor=2))
    assert specs["blocks/0/mixer/qkv/kernel"] == P("fsdp", "tensor")
    assert specs["embed/embedding"] == P(None, "fsdp")
    assert "embed/embedding (11, 8): dimension 0" in caplog.text


def test_optimizer_state_follows_its_parameter():
    specs = sharding.parameter_specs(PARAMS, (), FakeMesh())
    specs["blocks/0/mixer/qkv/kernel"] = P("fsdp", "tensor")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    state = {"step": jax.ShapeDtypeStruct((), jnp.int32), "params": PARAMS, "opt": jax.eval_shape(tx.init, PARAMS)}
    found = sharding.paths(sharding.state_shardings(state, specs, sharding.make_mesh(SIZES)))
    for path in ("params", "opt/1/mu", "opt/1/nu"):
        assert found[f"{path}/blocks/0/mixer/qkv/kernel"].spec == P("fsdp", "tensor")
    assert found["opt/1/count"].spec == found["step"].spec == P()


@pytest.mark.parametrize(
    ("sizes", "batch", "field"),
    [
        ({"data": 2, "fsdp": 2}, {"batch_size": 6, "length": 8}, "train.batch_size: 6"),
        ({"data": 2}, {"batch_size": 6, "length": 8, "accumulate": 2}, "train.batch_size: 6"),
        ({"sequence": 3}, {"batch_size": 6, "length": 8}, "mesh.sequence: 3"),
    ],
)
def test_batch_must_divide(sizes, batch, field):
    with pytest.raises(ConfigError, match=field):
        sharding.check_batch(FakeMesh(**sizes), **batch)
    sharding.check_batch(FakeMesh(data=2), batch_size=8, length=8, accumulate=4)


MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2, "accumulate": 2}]

# Runs in a process of its own: the number of host devices is fixed when JAX starts. Prints losses, and the shardings.
PROGRAM = """
import json, sys
import jax, numpy as np
from experiments import environment
from experiments.program import Program
from experiments.sharding import paths
from tests.experiments import tiny

environment.compile_cache()
for options in json.loads(sys.argv[1]):
    accumulate = options.pop("accumulate", 1)
    sizes = {f"mesh__{axis}": options.get(axis, 1) for axis in ("data", "fsdp", "tensor", "sequence")}
    count = int(np.prod(list(sizes.values())))
    config = tiny.config(**sizes, train__batch_size=16, optimizer__accumulate=accumulate, optimizer__ema=0.9,
                         model__depth=1, model__dropout=0.0)
    program = Program(config, jax.devices()[:count])
    losses = []
    with jax.set_mesh(program.mesh):
        state, batches = program.init(), program.batches()
        for _ in range(5):
            state, values = program.train_step(state, program.put(next(batches)))
            losses.append(np.asarray(values).tolist())
        batches.close()
        scores = program.evaluate(state["ema"], "validation")
    specs = {path: str(leaf.sharding.spec) for path, leaf in paths(state).items()}
    print(json.dumps({"losses": losses, "scores": scores, "specs": specs}))
"""


def test_eight_devices_equal_one():
    """Same losses, gradient norms and evaluation; every step runs the one program that was compiled."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([{"data": 1}, *MESHES])],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = [json.loads(line) for line in done.stdout.splitlines()]
    for sizes, found in zip(MESHES, others, strict=True):
        # sums in another order: a few float32 roundings a step, grown by Adam's division
        assert jnp.allclose(jnp.array(found["losses"]), jnp.array(one["losses"]), rtol=1e-4), (sizes, found, one)
        assert found["scores"]["loss"] == pytest.approx(one["scores"]["loss"], rel=1e-4)
    specs = others[0]["specs"]
    kernel = "topology/blocks/0/mixer/qkv/kernel"
    for path in ("params", "ema", "opt/0/mu"):
        assert specs[f"{path}/{kernel}"] == str(P("fsdp", "tensor")), path
