"""Parameter groups for fine-tuning: one rate for the head, and rates that fall from the last block to the stem."""

from torch import nn


def blocks_of(encoder: nn.Module) -> list[str]:
    """Names of an encoder's blocks, the first one first: numbered modules with layers of their own, the outermost ones.

    The residual blocks of ResNets (`layer1.0`; `blocks.0` of those for CIFAR), the blocks of vision transformers, the
    stages of ConvNeXts. A numbered layer (`conv1.0` of a deep stem) is no block.
    """
    found: list[str] = []
    for name, module in encoder.named_modules():
        is_inside = bool(found) and name.startswith(f"{found[-1]}.")
        has_layers = any(True for _ in module.children()) and any(True for _ in module.parameters())
        if name.rpartition(".")[2].isdigit() and has_layers and not is_inside:
            found.append(name)
    return found


def depths(encoder: nn.Module) -> dict[str, int]:
    """Depth of each parameter by its name: 0 in front of the blocks, n in the n-th block and in what follows it."""
    blocks = blocks_of(encoder)
    number = {block: depth for depth, block in enumerate(blocks, 1)}
    found, deepest = {}, 0
    # Modules in their order; parameters that belong to no child (a class token) come first.
    for name, _ in encoder.named_parameters():
        inside = next((number[part] for part in _beginnings(name) if part in number), None)
        deepest = max(deepest, inside or 0)
        found[name] = deepest if inside is None else inside
    return found


def _beginnings(name):
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def layerwise_groups(
    encoder: nn.Module, head: nn.Module, *, rate: float, head_rate: float, decay: float = 1.0
) -> list[dict]:
    """Groups of an optimizer: the encoder's by depth, each `decay` times the rate of the next, then the head's.

    The last block has `rate`, as in timm the layer-wise rates count residual blocks, not stages.
    """
    depth_of = depths(encoder)
    last = max(depth_of.values())
    groups: dict[int, dict] = {}
    for name, parameter in encoder.named_parameters():
        depth = depth_of[name] if decay != 1 else last
        scaled = rate * decay ** (last - depth)
        groups.setdefault(depth, {"params": [], "lr": scaled})["params"].append(parameter)
    return [*(groups[depth] for depth in sorted(groups)), {"params": list(head.parameters()), "lr": head_rate}]
