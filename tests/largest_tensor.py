"""Proof that something large never exists: watches over what every operation of torch returns."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, (tuple, list)) else (returned,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return returned


class HeldMemory(TorchDispatchMode):
    """Keeps the most bytes that tensors made in here held at one time; views of one memory count once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.users: dict[int, list[int]] = {}  # address of a storage → how many tensors use it, and its bytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, (tuple, list)) else (returned,):
            if isinstance(value, Tensor):
                self._count(value)
        return returned

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.users:
            self.users[address] = [0, size]
            self.held += size
            self.most = max(self.most, self.held)
        self.users[address][0] += 1
        weakref.finalize(tensor, self._discount, address)

    def _discount(self, address: int) -> None:
        self.users[address][0] -= 1
        if self.users[address][0] == 0:
            self.held -= self.users.pop(address)[1]
