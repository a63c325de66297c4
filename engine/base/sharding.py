"""Parameters in pieces (PyTorch's fully_shard), and whole again: a checkpoint is the same with and without."""

import math
from collections.abc import Iterable

import torch


def shard(model: torch.nn.Module, device_type: str, world_size: int) -> None:
    """PyTorch's fully_shard on each block and on the rest: parameters, gradients and optimiser state in pieces."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device_type, (world_size,))
    for block in (
        model.transformer.h
    ):  # the KL of Bayesian MLPs is taken behind the blocks, from whole parameters
        fully_shard(block, mesh=mesh, reshard_after_forward=not model.config.bayes_mlp)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "scores")


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether its parameters lie in pieces at this moment."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(value, keep: bool = True):
    """A tree of dicts and lists, its tensors copied to the CPU, shards made whole (with all processes taking part).

    keep: whether this process wants the copies; where not, None stands in their place."""
    if isinstance(value, dict):
        return {name: whole(inner, keep) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(inner, keep) for inner in value)
    if not isinstance(value, torch.Tensor):
        return value
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().to("cpu", copy=True) if keep else None


def whole_model(model: torch.nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """The model's state_dict as whole() makes it; tied weights stay one tensor."""
    state, first = model.state_dict(), {}
    same = {
        name: first.setdefault(id(p), name)
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    copies = whole(
        {name: value for name, value in state.items() if same.get(name, name) == name}, keep
    )
    return {name: copies[same.get(name, name)] for name in state}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimiser's whole state, in pieces where its parameters are sharded; its options stay as they are."""
    options = [
        {name: group[name] for name in ("weight_decay", "betas")}
        for group in optimizer.param_groups
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, of_parameter in state["state"].items():
        p = parameters[i]
        for name, value in of_parameter.items():
            if hasattr(p, "placements") and value.shape == p.shape:
                from torch.distributed.tensor import distribute_tensor

                of_parameter[name] = distribute_tensor(
                    value.to(p.device), p.device_mesh, p.placements, src_data_rank=None
                )
    optimizer.load_state_dict(state)
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update(option)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale the gradients of all processes down to max_norm (0: leave them); returns the norm that they had."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
