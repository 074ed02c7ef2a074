"""What cannot be cut over devices is refused when the engine is made, by name."""

import jax
import numpy as np
import pytest

from slora_jax import LLM
from slora_jax.errors import AdapterLoadError, ConfigError

OPTIONS = {"load": "dummy", "progress": False, "pool_bytes": 2**22, "max_num_seqs": 2}


def mesh_of(count, *axes):
    shape = (count,) if len(axes) == 1 else (count // 2, 2)
    return jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(shape), axes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 3}, r"num_heads=8 and intermediate_size=96 .* 3"),
        ({"tensor_parallel": 9}, r"tensor_parallel=9 needs as many devices, there are 8"),
        ({"tensor_parallel": 0}, r"tensor_parallel=0 must be an integer"),
        ({"mesh": mesh_of(2, "data")}, r"has no axis 'model'"),
        ({"mesh": mesh_of(4, "data", "model")}, r"4 devices and only 2 of them along 'model'"),
        ({"mesh": "two"}, r"mesh='two' has no axis"),
        ({"mesh": mesh_of(2, "model"), "tensor_parallel": 4}, r"give one of the two"),
        ({"tensor_parallel": 2, "lora_partition": "rows"}, r"lora_partition='rows' must be one of"),
        (
            {"tensor_parallel": 2, "pool_bytes": 1000},
            r"1,000 bytes on each of 2 devices holds less",
        ),
    ],
)
def test_what_cannot_be_cut(gqa, options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(gqa.directory, **{**OPTIONS, **options})


def test_kv_heads_that_devices_can_neither_share_nor_divide(tmp_path):
    from checkpoints.synthetic import write_synthetic_llama

    write_synthetic_llama(tmp_path, num_heads=12, num_kv_heads=3, hidden_size=96, head_dim=8)
    with pytest.raises(ConfigError, match="num_kv_heads=3 cannot be cut over 2 devices"):
        LLM(tmp_path, tensor_parallel=2, **OPTIONS)


def test_a_rank_that_s_lora_does_not_take(gqa, tmp_path):
    from checkpoints.synthetic import write_synthetic_adapter

    write_synthetic_adapter(tmp_path / "wide", gqa.checkpoint.config, seed=1, rank=136)
    options = {"tensor_parallel": 2, "lora_partition": "s_lora"}
    with LLM(gqa.directory, **{**OPTIONS, **options, "pool_bytes": 2**24}) as llm:
        with pytest.raises(AdapterLoadError, match="ranks up to 128, not 136"):
            llm.load_adapter("wide", tmp_path / "wide")
        assert not llm.list_adapters()


def test_nobody_to_follow(gqa):
    with LLM(gqa.directory, **OPTIONS) as llm, pytest.raises(ConfigError, match="no process 0"):
        llm.follow()
