"""CUDA C++ kernels; see csrc/cuda/module.cpp. Tensors are passed as addresses."""

Description = tuple[int, int, int, list[bool], bool, bool, float, float]
DescribedSet = tuple[int, int, int]

def table_size(network: Description) -> int: ...
def plan(network: Description, backward: bool) -> tuple[int, int]: ...
def conv_kernel(
    network: Description,
    x: DescribedSet,
    y: DescribedSet,
    symmetric: bool,
    out: int,
    memory: int,
    how: tuple[int, int],
    stream: int,
) -> None: ...
def conv_kernel_bwd(
    network: Description,
    x: DescribedSet,
    y: DescribedSet,
    symmetric: bool,
    grad: int,
    chunks: int,
    out: int,
    memory: int,
    how: tuple[int, int],
    stream: int,
) -> None: ...
