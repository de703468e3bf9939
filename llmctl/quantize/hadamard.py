"""Orthogonal matrices that spread outliers: randomized Hadamard transforms (Tseng et al., 2024, QuIP#).

A Hadamard matrix has entries 1 and -1 and orthogonal rows. Those of orders that are no powers of two are Paley's
(1933), over the integers modulo a prime; larger ones are Kronecker products, which are applied factor by factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WIDEST = 64  # order of a factor that is a power of two: a larger one costs more than two


@dataclass(frozen=True)
class Turn:
    """The orthogonal matrix ``M = diag(signs) @ (H1 x H2 x …) / sqrt(n)``.

    Attributes:
        signs: f32 ``[n]``, 1 or -1.
        factors: Hadamard matrices whose orders have the product n.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @classmethod
    def random(cls, order: int, generator: torch.Generator) -> Turn:
        """One of n columns with random signs.

        Raises:
            ValueError: no Hadamard matrix of that order is known here.
        """
        factors = tuple(hadamard(factor) for factor in hadamard_orders(order))
        return cls(torch.randint(0, 2, (order,), generator=generator).float().mul_(2).sub_(1), factors)

    def rows(self, values: Tensor) -> Tensor:
        """``values @ M`` of every n columns, f32 ``[..., any multiple of n]``."""
        order = len(self.signs)
        turned = (values.reshape(-1, order) * self.signs).mul_(order**-0.5)
        after = order
        for factor in self.factors:
            after //= len(factor)
            last = turned.reshape(-1, len(factor), after).transpose(1, 2)
            turned = (last.reshape(-1, len(factor)) @ factor).view(last.shape).transpose(1, 2)
        return turned.reshape(values.shape)

    def columns(self, weight: Tensor) -> Tensor:
        """``M.T @ weight`` of every n rows, f32 ``[any multiple of n, K]``."""
        return self.rows(weight.T).T.contiguous()


def hadamard_orders(order: int) -> list[int]:
    """Orders of Hadamard matrices with that product: Paley's, then powers of two.

    Raises:
        ValueError: there are none that are known here.
    """
    odd = order // (order & -order)
    first = 1
    if odd > 1:
        first = next((odd << k for k in range(2, 12) if order % (odd << k) == 0 and _paley_prime(odd << k)), 0)
        if not first:
            raise ValueError(
                f"no Hadamard matrix of order {order} is known: {odd} times a power of two is none of Paley's"
            )
    found, rest = [first] if first > 1 else [], order // first
    while rest > 1:
        found.append(min(rest, _WIDEST))
        rest //= found[-1]
    return found


def hadamard(order: int) -> Tensor:
    """The Hadamard matrix f32 ``[order, order]`` of one of ``hadamard_orders``."""
    prime = _paley_prime(order) if order & (order - 1) else 0
    if not prime:
        made = torch.ones(1, 1)
        while len(made) < order:
            made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
        return made
    index = torch.arange(prime)
    residues = torch.full((prime,), -1.0).index_fill_(0, (index * index) % prime, 1.0)
    residues[0] = 0
    core = torch.zeros(prime + 1, prime + 1)
    core[1:, 1:] = residues[(index[:, None] - index) % prime]
    core[0, 1:], core[1:, 0] = 1, 1 if prime % 4 == 1 else -1
    if order == prime + 1:
        return core + torch.eye(order)
    kept, added = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(core, kept) + torch.kron(torch.eye(prime + 1), added)


def _paley_prime(order: int) -> int:
    """The prime that Paley's first construction (q + 1) or second (2 q + 2) needs for an order; 0: there is none."""
    for prime, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        if prime % 4 == rest and prime > 2 and all(prime % n for n in range(2, int(prime**0.5) + 1)):
            return prime
    return 0
