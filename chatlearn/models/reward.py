# SPDX-License-Identifier: Apache-2.0
"""`FunctionReward`: scores completions with plain Python functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from chatlearn import columns
from chatlearn.config import ModuleConfig
from chatlearn.errors import BatchError, ChatLearnError, ConfigError, RewardError
from chatlearn.flow.declaration import Declaration, Need
from chatlearn.module import BaseModule, state_of
from chatlearn.rewards.function import ScoreFunction, Scorer, function_name, parameter_names


class FunctionReward(BaseModule):
    """Adds `rewards`, the weighted sum of what its functions return, and a column
    `rewards/<function>` for each.

    A function gets the whole batch: `completions`, `prompts`, and any other column by its
    parameter's name (`solver_rewards` for a column `solver/rewards`); it returns one number per
    sample (a list, tensor or array; booleans count as 0 and 1). A failure is an error, never a
    zero; unless `on_failure` is `stop`, samples without a finite number fail alone: `outcome` says
    so, and their rewards are NaN.

    Example:
        >>> def score(completions, answer):
        ...     return [float(c.strip() == a) for c, a in zip(completions, answer)]
        >>> reward = FunctionReward("reward", score)
        >>> reward.forward_step({"completion": ["4 ", "5"], "answer": ["4", "4"]})["rewards"]
        tensor([1., 0.])

    Several functions: `FunctionReward("reward", [score, brevity], weights=[1.0, 0.2])`, or a dict
    that names them.
    """

    writes = frozenset({columns.REWARDS, columns.OUTCOME})

    class Config(ModuleConfig):
        """Fields of `models.<name>`."""

        weights: list[float] | dict[str, float] | None = None
        """Weight of each function in `rewards`, in their order or by name; None weighs each with
        1."""

    def __init__(
        self,
        name: str,
        functions: ScoreFunction | Sequence[ScoreFunction] | Mapping[str, ScoreFunction],
        **settings: Any,
    ) -> None:
        """Take one function, a list of them, or a dict from name to function; `settings` as in
        `Config`.
        """
        super().__init__(name, **settings)
        if isinstance(functions, Mapping):
            named = list(cast("Mapping[str, ScoreFunction]", functions).items())
        elif callable(functions):
            named = [(function_name(functions), functions)]
        else:
            named = [(function_name(function), function) for function in functions]
        self._scorers = [Scorer(label, function) for label, function in named]
        self._require_usable(named)

    def check_config(self) -> list[ChatLearnError]:
        """Return what is wrong with the functions and the weights."""
        problems: list[ChatLearnError] = [
            found for scorer in self._scorers if (found := scorer.check())
        ]
        try:
            self._weights()
        except ConfigError as error:
            problems.append(error)
        return problems

    def describe_columns(self, method: str) -> Declaration | None:
        """Return what the functions' parameters ask for, and the columns that hold what they return."""
        if method not in ("forward_step", "eval_step"):
            return None
        asked = [(scorer, asked) for scorer in self._scorers for asked in scorer.asks_for()]
        parts = {f"{columns.REWARDS}/{scorer.name}": "number" for scorer in self._scorers}
        return Declaration.of(
            needs=[
                Need.of({columns.COMPLETION: "any"}, others=_is_completion),
                *(
                    Need.of(
                        dict.fromkeys(one.columns, "any"),
                        others=one.fits,
                        reader=scorer.described,
                        spelled=parameter_names,
                    )
                    for scorer, one in asked
                    if not one.is_optional
                ),
            ],
            optional={name for _, one in asked if one.is_optional for name in one.columns},
            reads_all=any(scorer.takes_all for scorer in self._scorers),
            writes=columns.kinds_of(columns.REWARDS) | parts | self._marks(),
            passes_on=True,
        )

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Add `rewards`, float32 `[B]`, and one column per function; log their means.

        Raises:
            BatchError: there is no `completion` column, in no namespace.
            RewardError: a function failed or did not return one finite number per sample.
        """
        return self._score(data)

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Do what `forward_step` does."""
        return self._score(data)

    def _score(self, data: dict[str, Any]) -> dict[str, Any]:
        import torch

        texts = [name for name in data if _is_completion(name)]
        if not texts:  # a judge of several policies may have theirs only, each in its namespace
            raise BatchError(
                f"column {columns.COMPLETION!r} is missing; there are {sorted(data)}",
                place=f"module {self.name!r}",
                fix="give it the output of PolicyInference.forward_step",
            )
        weights = self._weights()
        samples = len(data[texts[0]])
        total = torch.zeros(samples, dtype=torch.float64)
        scores: dict[str, Any] = {}
        failed: dict[int, RewardError] = {}
        stops = self.config.on_failure == "stop"
        for scorer, weight in zip(self._scorers, weights, strict=True):
            values = torch.tensor(scorer(data, None if stops else failed), dtype=torch.float64)
            total += weight * values
            scores[f"{columns.REWARDS}/{scorer.name}"] = values
        scores[columns.REWARDS] = total
        if not stops:
            self._mark(data, failed, samples)
        if samples > len(failed):
            scored = [i for i in range(samples) if i not in failed]
            self.log({name: float(values[scored].mean()) for name, values in scores.items()})
        data.update({name: values.float() for name, values in scores.items()})
        return data

    def _marks(self) -> dict[str, str]:
        """Return the kind of the column that says which samples failed, where there may be such."""
        stops = self.config.on_failure == "stop"
        return {} if stops else columns.kinds_of(columns.OUTCOME)

    def _mark(self, data: dict[str, Any], failed: dict[int, RewardError], samples: int) -> None:
        """Say in `outcome` which samples failed (in every call, so that all make the same columns), and why."""
        outcomes = list(data.get(columns.OUTCOME, [columns.OK] * samples))
        for index in failed:
            outcomes[index] = columns.FAILED
        data[columns.OUTCOME] = outcomes
        if failed:
            state_of(self).failure = str(failed[min(failed)])

    def _weights(self) -> list[float]:
        """Return one weight per function, from the configuration."""
        weights: list[float] | dict[str, float] | None = self.config.weights
        names = [scorer.name for scorer in self._scorers]
        if weights is None:
            return [1.0] * len(names)
        if isinstance(weights, dict):
            if set(weights) != set(names):
                raise self._wrong_weights(f"name {sorted(weights)}", names)
            return [weights[name] for name in names]
        if len(weights) != len(names):
            raise self._wrong_weights(f"are {len(weights)}", names)
        return list(weights)

    def _wrong_weights(self, what: str, names: list[str]) -> ConfigError:
        return ConfigError(
            f"the weights {what}, but the reward functions are {names}",
            place=f"models.{self.name}.weights",
            fix="give one weight per function",
        )

    def _require_usable(self, named: Sequence[tuple[str, Any]]) -> None:
        place = f"FunctionReward({self.name!r})"
        names = [name for name, _ in named]
        if not named:
            raise ConfigError("there is no reward function", place=place, fix="pass a function")
        for name, function in named:
            if not callable(function):
                raise ConfigError(
                    f"reward {name!r} is a {type(function).__name__}, not a function", place=place
                )
        if len(set(names)) < len(names):
            raise ConfigError(
                f"reward functions share a name: {names}",
                place=place,
                fix='pass a dict that names them: {"exact": f, "brief": g}',
            )


def _is_completion(name: str) -> bool:
    """Tell whether a column holds responses as text, of any namespace."""
    return name.rsplit("/", maxsplit=1)[-1] == columns.COMPLETION
