# SPDX-License-Identifier: Apache-2.0
"""`GroupAdvantage`: how much better each sample is than the other samples of its prompt."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

from pydantic import Field

from chatlearn import columns
from chatlearn.config import ModuleConfig
from chatlearn.errors import BatchError, RewardError
from chatlearn.flow.declaration import declares
from chatlearn.module import BaseModule, BatchBy


class GroupAdvantageConfig(ModuleConfig):
    """Fields of `models.<name>` for a `GroupAdvantage`."""

    normalise_std: bool = True
    """Whether to divide by the group's standard deviation (GRPO); false is Dr.GRPO."""
    leave_one_out: bool = False
    """Whether a sample is compared with the mean of its siblings only (RLOO, with normalise_std
    false)."""
    eps: float = Field(default=1e-6, ge=0)
    """Added to the standard deviation."""


class GroupAdvantage(BaseModule):
    """Adds `advantages`, `[B]`, from `rewards` and `prompt_uid`; called with whole groups.

    A group whose rewards are all equal gets 0: it teaches nothing, and `zero_std_fraction` reports
    how many do. A group of one keeps its reward as advantage.

    Example:
        >>> import torch
        >>> batch = {"prompt_uid": torch.tensor([4, 4]), "rewards": torch.tensor([1.0, 0.0])}
        >>> GroupAdvantage("advantage").forward_step(batch)["advantages"]
        tensor([ 0.7071, -0.7071])
    """

    Config: ClassVar[type[ModuleConfig]] = GroupAdvantageConfig
    batch_by: ClassVar[BatchBy] = "group"
    writes = frozenset({columns.ADVANTAGES})

    @declares(
        reads={**columns.kinds_of(columns.REWARDS), columns.PROMPT_UID: "any"},
        optional={columns.UID},
        writes=columns.kinds_of(columns.ADVANTAGES),
        passes_on=True,
    )
    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Add the `advantages` column.

        Raises:
            BatchError: `rewards` or `prompt_uid` is missing.
            RewardError: a reward is NaN or infinite.
        """
        import torch

        from chatlearn.algorithms.advantages import group_advantages

        for name, maker in (
            (
                columns.REWARDS,
                "a reward module such as FunctionReward adds it: call it before this one",
            ),
            (
                columns.PROMPT_UID,
                "the engine adds it to every prompt: keep it in what modules return",
            ),
        ):
            if name not in data:
                raise BatchError(
                    f"column {name!r} is missing; there are {sorted(data)}",
                    place=f"module {self.name!r}",
                    fix=maker,
                )
        given = data[columns.REWARDS]
        if isinstance(
            given, list
        ):  # None is no number either, and is named with those that are none
            given = [math.nan if reward is None else reward for reward in cast("list[Any]", given)]
        rewards = torch.as_tensor(given, dtype=torch.float64)
        self._require_finite(rewards, data)
        groups = self._group_numbers(data[columns.PROMPT_UID])
        result = group_advantages(
            rewards,
            groups,
            normalise_std=self.config.normalise_std,
            leave_one_out=self.config.leave_one_out,
            eps=self.config.eps,
        )
        data[columns.ADVANTAGES] = result.advantages_B.float()
        if len(rewards):
            self.log(
                reward_mean=float(rewards.mean()),
                reward_std=float(rewards.std(correction=0)),
                zero_std_fraction=result.flat_groups / result.groups,
            )
        return data

    def _require_finite(self, rewards: Any, data: dict[str, Any]) -> None:
        finite = rewards.isfinite()
        if not bool(finite.all()):
            wrong = (~finite).nonzero().flatten().tolist()
            named = data.get(columns.UID)
            uids = wrong if named is None else [_plain(named[i]) for i in wrong]
            raise RewardError(
                f"{len(wrong)} rewards are not finite: {[float(rewards[i]) for i in wrong[:8]]}",
                place=f"module {self.name!r}, sample uids {uids[:8]}",
                fix="for samples that cannot be scored set models.<name>.on_failure of the module that makes "
                "`rewards` to mask, drop_group or retry",
            )

    @staticmethod
    def _group_numbers(uids: Any) -> Any:
        """Return int64 `[B]`; uids of any hashable kind (numbers, strings) become numbers."""
        import torch

        if isinstance(uids, torch.Tensor):
            return uids
        numbers: dict[Any, int] = {}
        return torch.tensor([numbers.setdefault(_plain(uid), len(numbers)) for uid in uids])


def _plain(uid: Any) -> Any:
    return uid.item() if hasattr(uid, "item") else uid
