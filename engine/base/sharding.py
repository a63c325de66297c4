"""Sharded training (PyTorch's fully_shard), and full copies of the state for checkpoints.

The helpers of torch.distributed.checkpoint.state_dict do not fit. On a CPU they return the live
tensors, not copies. When they gather shards, tied weights become two tensors. They call step() on
an optimizer that has not stepped yet. Importing them takes a second.
"""

import math
import os
from collections.abc import Iterable

import torch


def shard(model: torch.nn.Module, device_type: str, world_size: int, dtype: torch.dtype) -> None:
    """Shard parameters, gradients and optimizer state, block by block, over the processes of a
    machine. Each machine has a copy.

    dtype: in which processes send each other the blocks' weights. Gradients are averaged in
    float32; embeddings, the head and the residual stream stay float32, too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    shape, names = (world_size,), ("shard",)
    if n_local < world_size:
        shape, names = (world_size // n_local, n_local), ("copy", "shard")
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    # the KL of Bayesian MLPs reads the blocks' parameters after the forward pass, in float32
    is_bayes = model.config.bayes_mlp
    policy = MixedPrecisionPolicy(
        None if is_bayes else dtype, torch.float32, cast_forward_inputs=False
    )
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=not is_bayes, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "scores")


def full_copy(state: dict, keep: bool = True) -> dict:
    """Copy every tensor of a nested dict to the CPU, and gather sharded ones from all processes.

    A tensor that occurs twice (tied weights) is copied once. keep=False: gather without copying.
    """
    copies = {}

    def copy(value):
        if isinstance(value, dict):
            return {name: copy(inner) for name, inner in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in copies:
            full = value.detach()
            if hasattr(full, "full_tensor"):
                full = full.full_tensor()
            copies[id(value)] = full.to("cpu", copy=True) if keep else None
        return copies[id(value)]

    return copy(state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state, sharded like the parameters. Its options do not change."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        if hasattr(parameters[i], "full_tensor"):
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = _shard_like(parameters[i], moments[name])
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def _shard_like(parameter, full):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        full.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,  # each process has the full tensor
    )


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the gradients' norm to max_norm (0: do not clip). Returns the norm before that, a scalar
    on the device: reading it here would wait for the device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
