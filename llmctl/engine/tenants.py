"""Who requests are of, and how much each has been served: the counters of fair queueing."""

from __future__ import annotations

from dataclasses import dataclass

INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""What a computed prompt token and a generated one count for, as in Sheng et al. 2024 (see ``waiting_queue``)."""
MAX_IDLE_ACCOUNTS = 4096


@dataclass(slots=True, eq=False)
class Account:
    """What one tenant has been served.

    Attributes:
        tenant: its name. served: weighted tokens; never falls, and is raised when the tenant comes back to the queue.
        live: requests in the scheduler. waiting: those of them that never ran.
    """

    tenant: str = ""
    served: int = 0
    live: int = 0
    waiting: int = 0

    def charge_prompt(self, tokens: int) -> None:
        """Prompt tokens that had to be computed; at least one counts."""
        self.served += INPUT_WEIGHT * max(1, tokens)

    def charge_output(self, tokens: int = 1) -> None:
        """Generated tokens."""
        self.served += OUTPUT_WEIGHT * tokens


class Accounts:
    """The accounts of all tenants with requests, and of the last ``MAX_IDLE_ACCOUNTS`` without.

    Forgetting an idle one costs nothing: who comes back is raised to what those who wait have been served.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._idle: dict[str, None] = {}  # in the order in which they became idle

    def open(self, tenant: str) -> Account:
        """The account of a tenant that has one request more."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(tenant)
        self._idle.pop(tenant, None)
        account.live += 1
        return account

    def close(self, account: Account) -> None:
        """One of its requests has ended."""
        account.live -= 1
        if account.live:
            return
        self._idle[account.tenant] = None
        if len(self._idle) > MAX_IDLE_ACCOUNTS:
            oldest = next(iter(self._idle))
            del self._idle[oldest], self._accounts[oldest]
