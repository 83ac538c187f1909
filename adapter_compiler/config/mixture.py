"""The options of a mixture of experts."""

from __future__ import annotations

import dataclasses

from adapter_compiler.config.validation import assert_choice, assert_integer
from adapter_compiler.errors import ConfigError

#: The values of ``Mixture(router=...)``: which sites have the same gates.
ROUTERS = ("site", "block", "shared")

#: The values of ``Mixture(per=...)``: what has gates of its own.
ROUTED = ("token", "example")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of experts in place of one adapter: y + s Σᵢ gᵢ(x) Bᵢ Aᵢ x, for ``AdapterConfig(mixture=...)``.

    The rank of the configuration is that of all experts together, so a mixture has the size of one adapter of this
    rank, and the routers. A router is a linear layer without a bias, and a softmax.

    Attributes:
        experts: the number of experts; the rank is a multiple of it.
        top_k: how many experts a token uses; ``None`` for all of them, with the router's probabilities as gates (soft
            routing). With 1 the gate is the probability of the chosen expert (Switch Transformer, arXiv 2101.03961),
            with more they are the probabilities of the chosen ones, divided by their sum.
        per: ``"token"``, or ``"example"`` for gates from the mean over all tokens of an example, which is the first
            dimension.
        router: ``"site"`` for a router at each weight, which reads the weight's own input; ``"block"`` for one at the
            first adapted weight of each block, whose gates the other weights of the block use; ``"shared"`` for one at
            the first adapted weight of the model.

    Raises:
        ConfigError: a value cannot work.
    """

    experts: int = 4
    top_k: int | None = dataclasses.field(default=None, metadata={"example": 1})
    per: str = "token"
    router: str = "site"

    def __post_init__(self) -> None:
        assert_integer(self, "experts", least=2)
        if self.top_k is not None:
            assert_integer(self, "top_k", least=1)
            if self.top_k >= self.experts:
                raise ConfigError(
                    f"Mixture(top_k={self.top_k}): expected less than experts={self.experts}; for all of them, as in "
                    "top_k=None"
                )
        assert_choice(self, "per", ROUTED)
        assert_choice(self, "router", ROUTERS)
