"""Mesh sizes: what fits, what does not, and what would."""

import json

import jax
import pytest
from jax.sharding import AxisType

from mlm.parallel.mesh import MeshConfig, describe, make_mesh


def test_the_rest_goes_to_the_axis_with_minus_one():
    assert MeshConfig().sizes(8) == {"replica": 1, "data": 8, "fsdp": 1, "expert": 1, "tensor": 1}
    assert MeshConfig(data=2, fsdp=-1, tensor=2).sizes(8)["fsdp"] == 2


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(fsdp=2, tensor=4), MeshConfig(data=1, expert=8)])
def test_mesh_has_four_auto_axes_over_all_devices(config):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.size == 8
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in jax.devices())


def test_replica_is_the_outermost_axis_when_there_is_one():
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2))
    assert mesh.axis_names == ("replica", "data", "fsdp", "expert", "tensor")
    assert mesh.devices.shape == (2, 2, 2, 1, 1)


def test_mesh_on_some_devices():
    assert make_mesh(MeshConfig(tensor=2), jax.devices()[:4]).devices.shape == (2, 1, 1, 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        # 3 does not divide 8; fsdp may be a divisor of 8, and 2, 4, 1 are nearest to 3
        ({"fsdp": 3}, r"mesh fsdp=3 does not fit 8 devices: .*product 3 must divide.* fsdp=1 or 2 or 4"),
        ({"data": 2, "tensor": 2}, r"product 4 must be the number of devices; use data=4"),
        # 3 × 2 = 6: with tensor=2, fsdp may be 1, 2 or 4; with fsdp=3 no tensor size fits
        ({"fsdp": 3, "tensor": 2}, r"fsdp=1 or 2 or 4$"),
        ({"data": -1, "fsdp": -1}, r"data and fsdp are all -1; only one"),
        ({"tensor": 0}, r"tensor=0: sizes are positive integers, or -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes).sizes(8)


def test_several_slices_need_replicas():
    assert MeshConfig(replica=4).sizes(8, slices=2)["data"] == 2
    with pytest.raises(ValueError, match="span 2 slices, but replica=1: use replica=2"):
        MeshConfig().sizes(4, slices=2)


def test_description_is_json_and_one_line():
    text = describe(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    assert json.loads(json.dumps(text)) == text
    assert text["summary"] == "8 cpu devices in 1 process: data=2 fsdp=2 expert=1 tensor=2"
    assert text["axes"] == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
