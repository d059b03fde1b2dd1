# SPDX-License-Identifier: Apache-2.0
"""Configuration: the order of its sources, who set what, and errors that name the way out."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from chatlearn.config import (
    Config,
    ModuleConfig,
    RuntimeConfig,
    active,
    command_line,
    init,
    plain,
)
from chatlearn.config_text import to_yaml
from chatlearn.errors import ConfigError


class OptimiserConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: str = "adamw"
    betas: list[float] = [0.9, 0.99]


class PolicyConfig(ModuleConfig):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    temperature: float = Field(default=1.0, ge=0)
    learning_rate: float = 1e-3
    optimiser: OptimiserConfig = OptimiserConfig()
    reward: Callable[..., Any] | None = None
    path: Path | None = None


@pytest.fixture(autouse=True)
def fresh_session() -> Iterator[None]:
    with command_line():
        yield


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def error_of(*args: Any, **kwargs: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        init(*args, **kwargs)
    return caught.value


# Sources and their order


def test_nothing_given_means_defaults() -> None:
    assert init().runtime == RuntimeConfig()
    assert active().runtime == RuntimeConfig()


def test_active_is_what_init_returned_last() -> None:
    first = init({"runtime": {"seed": 1}})
    assert active() is first
    second = init()
    assert active() is second
    assert second.runtime.seed == 0


def test_a_failed_init_leaves_the_active_configuration() -> None:
    before = init({"runtime": {"seed": 1}})
    error_of({"runtime": {"sed": 2}})
    assert active() is before


def test_other_threads_see_the_active_configuration() -> None:
    config, seen = init({"runtime": {"seed": 5}}), []
    thread = threading.Thread(target=lambda: seen.append(active()))
    thread.start()
    thread.join()
    assert seen == [config]


def test_each_source_overrules_the_one_before(write: Callable[[str, str], Path]) -> None:
    write("base.yaml", "runtime: {seed: 1, num_episode: 1, eval_episode_interval: 9}\n")
    main = write(
        "grpo.yaml",
        "include: [base.yaml]\nruntime:\n  num_episode: 2\n  train_global_batch_size: 4\n",
    )
    with command_line(["runtime.train_global_batch_size=8"]):
        config = init(
            main, ["runtime.train_global_batch_size=6", "runtime.save_episode_interval=5"]
        )
        runtime = config.runtime
    assert (runtime.seed, runtime.num_episode, runtime.eval_episode_interval) == (1, 2, 9)
    assert runtime.train_global_batch_size == 8
    origins = {
        "seed": "base.yaml:1",
        "num_episode": "grpo.yaml:3",
        "train_global_batch_size": "command line",
        "save_episode_interval": "override",
        "output_dir": "default",
    }
    assert {key: config.provenance(f"runtime.{key}") for key in origins} == origins


def test_a_later_override_wins() -> None:
    assert init(None, ["runtime.seed=1", "runtime.seed=2"]).runtime.seed == 2


def test_includes_are_relative_to_the_including_file(write: Callable[[str, str], Path]) -> None:
    write("deep/more/base.yaml", "runtime: {seed: 7}\n")
    write("deep/mid.yaml", "include: more/base.yaml\n")
    assert init(write("top.yaml", "include: [deep/mid.yaml]\n")).runtime.seed == 7


def test_a_later_include_overrules_an_earlier_one(write: Callable[[str, str], Path]) -> None:
    write("a.yaml", "runtime: {seed: 1}\n")
    write("b.yaml", "runtime: {seed: 2}\n")
    assert init(write("top.yaml", "include: [a.yaml, b.yaml]\n")).runtime.seed == 2


def test_a_file_included_twice_is_no_cycle(write: Callable[[str, str], Path]) -> None:
    write("base.yaml", "runtime: {seed: 1}\n")
    write("a.yaml", "include: base.yaml\n")
    assert init(write("top.yaml", "include: [a.yaml, base.yaml]\n")).runtime.seed == 1


def test_include_cycles_are_refused(write: Callable[[str, str], Path]) -> None:
    write("a.yaml", "include: b.yaml\n")
    write("b.yaml", "include: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in error_of("a.yaml").cause


def test_environment_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_SEED", "12")
    monkeypatch.setenv("CL_RATIO", "[1, 3]")
    monkeypatch.delenv("CL_NAME", raising=False)
    runtime = init(
        {
            "runtime": {
                "seed": "${env:CL_SEED}",
                "data_ratio": "${env:CL_RATIO}",
                "output_dir": "runs/${env:CL_NAME,grpo}-${runtime.seed}",
            }
        }
    ).runtime
    assert (runtime.seed, runtime.data_ratio) == (12, [1, 3])
    assert runtime.output_dir == Path("runs/grpo-12")


def test_a_missing_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CL_GONE", raising=False)
    error = error_of({"runtime": {"seed": "${env:CL_GONE}"}})
    assert "CL_GONE" in error.cause
    assert error.place == "code runtime.seed"
    assert "${env:NAME,default}" in error.fix


def test_interpolation_sees_overrides() -> None:
    config = init({"runtime": {"output_dir": "runs/${runtime.seed}"}}, ["runtime.seed=3"])
    assert config.runtime.output_dir == Path("runs/3")


def test_numbers_in_yaml_may_be_written_with_an_exponent(
    write: Callable[[str, str], Path],
) -> None:
    config = init(write("a.yaml", "models: {policy: {learning_rate: 1e-5}}\n"))
    assert config.module("policy", PolicyConfig, {}).learning_rate == 1e-5


def test_the_script_of_a_recipe_is_relative_to_it(write: Callable[[str, str], Path]) -> None:
    path = write("recipes/grpo.yaml", "script: ../train.py\n")
    assert init(path).script == path.parent / "../train.py"
    assert init().script is None


def test_a_bare_init_reads_the_recipe_of_the_command_line(
    write: Callable[[str, str], Path],
) -> None:
    recipe = write("recipe.yaml", "runtime: {seed: 4, num_episode: 2}\n")
    with command_line(["runtime.num_episode=9"], recipe):
        assert (active().runtime.seed, active().runtime.num_episode) == (4, 9)
        assert init().runtime.seed == 4
        assert init({"runtime": {"seed": 6}}).runtime.seed == 6
    assert active().runtime.seed == 0


def test_an_empty_file_is_a_configuration(write: Callable[[str, str], Path]) -> None:
    assert init(write("empty.yaml", "# nothing\n")).runtime == RuntimeConfig()


# Modules


def test_a_file_overrules_the_constructor_which_overrules_the_class(
    write: Callable[[str, str], Path],
) -> None:
    config = init(write("a.yaml", "models:\n  policy:\n    temperature: 0.5\n"))
    policy = config.module("policy", PolicyConfig, {"temperature": 0.1, "num_gpu": 1})
    assert (policy.temperature, policy.num_gpu, policy.num_cpu) == (0.5, 1, 1)
    assert config.provenance("models.policy.temperature") == "a.yaml:3"
    assert config.provenance("models.policy.num_gpu") == "code"
    assert config.provenance("models.policy.num_cpu") == "default"


def test_nested_sections_merge_and_lists_are_replaced() -> None:
    config = init({"models": {"policy": {"optimiser": {"betas": [0.5]}}}})
    policy = config.module("policy", PolicyConfig, {"optimiser": {"kind": "sgd", "betas": [1, 2]}})
    assert policy.optimiser == OptimiserConfig(kind="sgd", betas=[0.5])


def test_constructor_settings_may_be_any_object() -> None:
    policy = init().module("policy", PolicyConfig, {"reward": len, "path": Path("x")})
    assert policy.reward is len
    assert policy.path == Path("x")


def test_a_dict_given_to_init_may_hold_any_object() -> None:
    config = init({"models": {"policy": {"reward": len}}})
    assert config.module("policy", PolicyConfig, {}).reward is len


def test_misspelt_module_keys_name_the_closest_and_the_line(
    write: Callable[[str, str], Path],
) -> None:
    config = init(write("grpo.yaml", "models:\n  policy:\n\n    temprature: 1\n"))
    with pytest.raises(ConfigError) as caught:
        config.module("policy", PolicyConfig, {})
    assert caught.value.cause == "unknown key 'models.policy.temprature'"
    assert caught.value.place == "grpo.yaml:4 models.policy.temprature"
    assert caught.value.fix == "did you mean 'temperature'?"


def test_misspelt_nested_keys_and_constructor_settings_are_found() -> None:
    with pytest.raises(ConfigError) as caught:
        init().module("policy", PolicyConfig, {"optimiser": {"bettas": [1]}, "num_gpus": 1})
    text = str(caught.value)
    assert "unknown key 'models.policy.optimiser.bettas'" in text
    assert "did you mean 'betas'?" in text
    assert "did you mean 'num_gpu'?" in text
    assert "at: code models.policy.num_gpus" in text


def test_sections_of_no_module_are_refused() -> None:
    config = init({"models": {"polcy": {}, "reward": {}}})
    with pytest.raises(ConfigError) as caught:
        config.check_modules(["policy", "reward"])
    assert caught.value.cause == "unknown key 'models.polcy'"
    assert caught.value.fix == "did you mean 'policy'?"
    config.check_modules(["polcy", "reward"])


# Errors


def test_all_problems_are_reported_at_once(write: Callable[[str, str], Path]) -> None:
    path = write(
        "grpo.yaml",
        "runtime:\n  sed: 1\n  num_episode: many\n  backend: locl\n  data_ratio: [1, 0]\n"
        "modles: {}\nmodels:\n  policy: 3\n",
    )
    text = str(error_of(path))
    for expected in (
        "6 problems",
        "unknown key 'runtime.sed'",
        "at: grpo.yaml:2 runtime.sed",
        "did you mean 'seed'?",
        "runtime.num_episode is 'many' (str), expected int >= 0",
        "runtime.backend is 'locl' (str), expected one of 'local', 'ray'",
        "did you mean 'local'?",
        "runtime.data_ratio[1] is 0 (int)",
        "at: grpo.yaml:5 runtime.data_ratio",
        "unknown key 'modles'",
        "did you mean 'models'?",
        "models.policy is 3 (int), expected keys and values",
        "at: grpo.yaml:8 models.policy",
    ):
        assert expected in text


def test_a_runtime_key_at_the_top_is_sent_to_its_section() -> None:
    error = error_of(None, ["num_episode=3"])
    assert error.fix == "did you mean 'runtime.num_episode'?"
    assert error.place == "override num_episode"


def test_an_unknown_key_without_a_close_one_lists_the_valid_ones() -> None:
    assert error_of({"zzz": 1}).fix == "valid keys: include, models, runtime, script"


@pytest.mark.parametrize(
    "override", ["runtime.seed", "=3", "runtime..seed=3", "runtime.seed =3", "a[0]=1", ""]
)
def test_malformed_overrides_are_refused(override: str) -> None:
    error = error_of(None, [override])
    assert repr(override) in error.cause
    assert "=" in error.fix


def test_a_string_is_no_list_of_overrides() -> None:
    assert error_of(None, "runtime.seed=3").fix == "write overrides=['runtime.seed=3']"


def test_override_values_are_yaml() -> None:
    runtime = init(None, ["runtime.data_ratio=[1,3]", "runtime.output_dir=null"]).runtime
    assert (runtime.data_ratio, runtime.output_dir) == ([1, 3], None)
    assert init(None, ["runtime.output_dir=a=b"]).runtime.output_dir == Path("a=b")


def test_an_override_that_replaces_a_section_is_refused() -> None:
    assert error_of(None, ["runtime=3"]).cause == "runtime is 3 (int), expected keys and values"


@pytest.mark.parametrize(
    ("text", "line"),
    [("runtime: [1\nseed: 2\n", 2), ("runtime:\n  seed: 1\n  seed: 2\n", 3), ("- 1\n", 1)],
    ids=["syntax", "doubled key", "no mapping"],
)
def test_broken_yaml_names_the_line(
    write: Callable[[str, str], Path], text: str, line: int
) -> None:
    assert error_of(write("bad.yaml", text)).place == f"bad.yaml:{line}"


def test_a_missing_file_is_named(write: Callable[[str, str], Path]) -> None:
    assert "nope.yaml" in error_of("nope.yaml").cause
    error = error_of(write("a.yaml", "include: gone.yaml\n"))
    assert "gone.yaml" in error.cause
    assert error.place == "include of a.yaml"


def test_init_refuses_other_types() -> None:
    assert "int" in error_of(3).cause


@pytest.mark.parametrize(
    ("runtime", "cause", "fix"),
    [
        (
            {"sample_per_episode": 510, "num_inference_per_prompt": 8},
            "sample_per_episode=510 is no multiple of num_inference_per_prompt=8",
            "use 504 or 512",
        ),
        ({"sample_per_episode": 3, "num_inference_per_prompt": 8}, "no multiple", "use 8"),
        (
            {"train_micro_batch_size": 9, "train_global_batch_size": 8},
            "larger than train_global_batch_size=8",
            "use 8 or less",
        ),
        (
            {"eval_pass_at_k": [1, 8, 4], "eval_num_inference_per_prompt": 2},
            "eval_pass_at_k has 8, more than eval_num_inference_per_prompt=2",
            "use 2 or less, or set eval_num_inference_per_prompt to 8 or more",
        ),
        ({"data_ratio": []}, "runtime.data_ratio is []", "the value should have at least 1 item"),
        ({"data_ratio": [0, 1]}, "runtime.data_ratio[0] is 0", "should be greater than 0"),
        ({"max_replay_episode": -2}, "expected int >= -1", "greater than or equal to -1"),
        (
            {"stream_data_loader_type": "relay"},
            "runtime.stream_data_loader_type is 'relay' (str), expected one of 'fixed', 'dynamic'",
            "the value should be 'fixed' or 'dynamic'",
        ),
        ({"incomplete_step": "drop"}, "incomplete_step is 'drop'", "did you mean 'drop_last'?"),
        ({"resume": "Auto"}, "neither 'auto', 'never'", "did you mean 'auto'?"),
        ({"resume": ""}, "neither 'auto', 'never'", "did you mean 'never'?"),
        ({"num_episode": -1}, "expected int >= 0", "greater than or equal to 0"),
        ({"seed": 1.5}, "runtime.seed is 1.5 (float), expected int", "fractional part"),
        (
            {"colocation": ["policy"]},
            "runtime.colocation[0]",
            "write a list, for example colocation: [[text]]",
        ),
        ({"data_ratio": 3}, "data_ratio is 3", "write a list, for example data_ratio: [8]"),
        ({"seed": "x"}, "seed is 'x'", "write a whole number, for example seed: 0"),
        ({"resume": 3}, "resume is 3", "write text, for example resume: never"),
        (
            {"data_shuffle": "perhaps"},
            "data_shuffle is 'perhaps'",
            "write true or false, for example data_shuffle: false",
        ),
        ({"trackers": ["wandbb"]}, "runtime.trackers[0] is 'wandbb'", "did you mean 'wandb'?"),
        ({"trackers": ["x"]}, "[0] is 'x' (str), expected one of 'tensorboard', 'wandb'", ""),
        (
            {"trackers": "wandb"},
            "expected a list of 'tensorboard', 'wandb'",
            "for example trackers: [tensorboard]",
        ),
    ],
)
def test_contradictions_name_the_way_out(runtime: dict[str, Any], cause: str, fix: str) -> None:
    error = error_of({"runtime": runtime})
    assert cause in error.cause
    assert fix in error.fix
    assert error.place.startswith("code runtime.")


class LearnerConfig(ModuleConfig):
    model: Any
    """Folder or hub id; a dict
    with `model_type`."""
    schedule: str = "constant"
    """What follows."""
    steps: int | None = None
    """Updates until the schedule reaches 0."""
    inner: OptimiserConfig = OptimiserConfig()
    undocumented: dict[str, float] | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    path: Path | None = None
    share: float | None = None

    @model_validator(mode="after")
    def _check(self) -> LearnerConfig:
        if self.schedule == "linear" and self.steps is None:
            raise ValueError("schedule 'linear' needs steps")
        if self.schedule == "cosine":
            raise ValueError("schedule 'cosine' and steps=3 do not fit")
        if self.schedule == "odd":
            raise ValueError("this is odd")
        return self


def learner_error(**settings: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        init().module("learner", LearnerConfig, settings)
    return caught.value


def test_a_field_that_must_be_set_says_what_it_takes() -> None:
    error = learner_error()
    assert error.cause == "models.learner.model must be set"
    assert error.fix == "give model: Folder or hub id; a dict with `model_type`."


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"undocumented": 3}, "write keys and values, for example undocumented: {name: 0.5}"),
        ({"betas": 3}, "write a list, for example betas: [0.9, 0.999]"),
        ({"betas": ["x", 1]}, "write a number, for example betas: [0.9, 0.999]"),
        ({"share": "x"}, "write a number, for example share: 0.5"),
        ({"path": 3}, "write a path, for example path: folder/name"),
        ({"steps": [3]}, "write a whole number, for example steps: 8"),
        ({"inner": 3}, "write keys and values, for example inner: {kind: adamw}"),
    ],
)
def test_a_value_of_the_wrong_type_says_what_to_write(settings: dict[str, Any], fix: str) -> None:
    assert learner_error(model="m", **settings).fix == fix


def test_values_that_do_not_fit_together_have_a_fix() -> None:
    error = learner_error(model="m", schedule="linear")
    assert error.cause == "schedule 'linear' needs steps"
    assert error.place == "code models.learner.schedule"
    assert error.fix == "give steps: Updates until the schedule reaches 0."
    error = learner_error(model="m", schedule="cosine", steps=3)
    assert error.fix == "change `schedule` or `steps`"
    error = learner_error(model="m", schedule="odd")
    assert error.cause == "this is odd"
    assert error.fix == "change the values of this section"


def test_values_that_fit_are_accepted() -> None:
    runtime = RuntimeConfig(
        sample_per_episode=512,
        num_inference_per_prompt=8,
        train_micro_batch_size=48,
        train_global_batch_size=128,
        resume=Path("runs/a/checkpoints/episode-000003"),  # type: ignore[arg-type]
        max_replay_episode=-1,
    )
    assert runtime.resume == "runs/a/checkpoints/episode-000003"


# Writing it down


def test_the_resolved_configuration_reads_back_the_same() -> None:
    config = init({"runtime": {"seed": 3, "output_dir": "runs/a"}, "models": {"policy": {}}})
    policy = config.module("policy", PolicyConfig, {"path": Path("m"), "temperature": 0.3})
    text = config.to_yaml({"policy": policy})
    import yaml

    again = init(yaml.safe_load(text))
    assert again.runtime == config.runtime
    assert again.module("policy", PolicyConfig, {}) == policy


def test_a_run_s_configuration_file_starts_the_same_run_again(
    write: Callable[[str, str], Path],
) -> None:
    import yaml

    settings = {"reward": a_reward, "temperature": 0.3, "path": Path("m")}
    config = init({"runtime": {"seed": 3, "output_dir": "runs/a"}})
    policy = config.module("policy", PolicyConfig, settings)
    text = config.to_yaml({"policy": policy})
    comment = f"# Set in code, which this file cannot hold:\n# models.policy.reward: {__name__}.a_reward\n"
    assert text.endswith(comment)
    assert "reward" not in yaml.safe_load(text)["models"]["policy"]
    again = init(write("config.yaml", text))
    assert again.runtime == config.runtime
    assert again.module("policy", PolicyConfig, settings) == policy
    assert again.module("policy", PolicyConfig, {"reward": len}).reward is len
    assert again.provenance("models.policy.temperature").startswith("config.yaml:")
    named = {"policy": policy}
    assert config.to_dict(named)["models"]["policy"]["reward"] == f"{__name__}.a_reward"
    other = config.module("policy", PolicyConfig, {**settings, "reward": len})
    assert config.digest({"policy": other}) != config.digest(named)


def test_what_yaml_cannot_hold_is_left_out_at_any_depth() -> None:
    text = to_yaml(
        {"a": {"b": {"c": len, "d": 1}, "e": [1, len], "f": object()}, "g": "two\nlines", "h": {}}
    )
    assert text.splitlines()[:5] == ["a:", "  b:", "    d: 1", "g: 'two", ""]
    assert text.splitlines()[-4:] == [
        "# Set in code, which this file cannot hold:",
        "# a.b.c: builtins.len",
        "# a.e: [1, 'builtins.len']",
        "# a.f: builtins.object",
    ]
    assert "#" not in to_yaml({"a": None})


@pytest.mark.parametrize(
    "text",
    ["1e5", "1.e-5", "-.5", "nan", "${runtime.seed}", "a\\${x}", "on", "~", "#", "a: b", "é"],
)
def test_texts_are_read_back_as_they_were(text: str, write: Callable[[str, str], Path]) -> None:
    class Texts(ModuleConfig):
        one: str
        many: list[str]

    config = init()
    texts = config.module("m", Texts, {"one": text, "many": [text]})
    again = init(write("config.yaml", config.to_yaml({"m": texts})))
    assert again.module("m", Texts, {"one": "", "many": []}) == texts


def a_reward(completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]


def test_plain_reduces_any_value_to_json() -> None:
    values = {
        "path": Path("a/b"),
        "function": a_reward,
        "partial": functools.partial(a_reward, []),
        "class": PolicyConfig,
        "instance": object(),
        "set": {2, 1},
        "tuple": (1, Path("c")),
        "config": OptimiserConfig(),
    }
    assert json.loads(json.dumps(plain(values))) == {
        "path": "a/b",
        "function": f"{__name__}.a_reward",
        "partial": f"{__name__}.a_reward",
        "class": f"{__name__}.PolicyConfig",
        "instance": "builtins.object",
        "set": [1, 2],
        "tuple": [1, "c"],
        "config": {"kind": "adamw", "betas": [0.9, 0.99]},
    }


def test_the_digest_follows_what_the_run_computes() -> None:
    def digest(runtime: dict[str, Any] | None = None, **settings: Any) -> str:
        config: Config = init({"runtime": runtime or {}})
        return config.digest({"policy": config.module("policy", PolicyConfig, settings)})

    assert digest() == digest()
    assert len(digest()) == 64
    assert digest({"seed": 1}) != digest()
    assert digest(temperature=0.5) != digest()
    assert digest({"output_dir": "a", "resume": "auto", "trackers": []}) == digest()


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        init().runtime.seed = 3  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    for model in (RuntimeConfig, ModuleConfig):
        bare = [name for name, field in model.model_fields.items() if not field.description]
        assert not bare
