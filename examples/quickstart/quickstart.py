# SPDX-License-Identifier: Apache-2.0
"""Teach a small transformer to think before it answers, by GRPO, on a laptop CPU.

    python quickstart.py [runtime.seed=1] [runtime.num_episode=20] ...

The last line of the output is one JSON object. `README.md` beside this file tells the story.
"""

# ruff: noqa: E402 - the clock starts before the imports
import time

START = time.perf_counter()

import functools
import json
import sys

import torch
from base_model import warm_start
from tasks import LONGEST_COMPLETION, exact, make_all

import chatlearn
from chatlearn import Engine, Environment, Evaluator, Trainer
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer

torch.set_num_threads(1)  # matrices this small only wait for each other on more

# An episode: 32 prompts x 8 samples, learned from in two updates.
config = chatlearn.init(
    {
        "runtime": {
            "num_episode": 40,
            "sample_per_episode": 256,
            "num_inference_per_prompt": 8,
            "train_global_batch_size": 128,
            "enable_eval_before_training": True,
            "eval_episode_interval": 10,
            "output_dir": "runs/quickstart",
        }
    },
    overrides=sys.argv[1:],
)
seed, updates = config.runtime.seed, 2 * config.runtime.num_episode
problems = make_all(seed)


@functools.cache
def base_model():
    """Make the model that GRPO starts from; called when the first module is set up."""
    return warm_start(problems.supervised, seed)


policy = PolicyInference(
    "policy", model=base_model, max_new_tokens=LONGEST_COMPLETION, eval_temperature=0.0
)
reward = FunctionReward("reward", exact)
advantage = GroupAdvantage("advantage")
learner = PolicyTrainer(
    "policy_trainer",
    model=base_model,
    lr=3e-4,
    clip_high=0.28,
    betas=(0.9, 0.99),
    lr_schedule="linear",
    warmup_steps=10,
    total_steps=updates,
)


def env_flow(batch):  # who samples, who scores
    rollout = policy.forward_step(batch)
    return advantage.forward_step(reward.forward_step(rollout))


def trainer_flow(batch):  # who learns
    learner.train_step(batch)


def eval_flow(batch):  # who is measured
    return reward.eval_step(policy.eval_step(batch))


def accuracy(results, _info):
    """Give the share of held-out problems that are solved, greedily decoded."""
    return {"accuracy": torch.cat([batch["rewards"] for batch in results["reward"]]).mean().item()}


evaluator = Evaluator(eval_flow).set_dataset(problems.heldout).set_post_process_func(accuracy)
engine = (
    Engine(Environment(env_flow), Trainer(trainer_flow), evaluator)
    .set_parameter_sync(learner, policy)
    .set_dataset(problems.prompts)
)
result = engine.learn()

before, after = result.evaluations[0][1], result.evaluations[-1][1]
print(
    json.dumps(
        {
            "accuracy_before": round(before["accuracy"], 4),
            "accuracy_after": round(after["accuracy"], 4),
            "seconds": round(time.perf_counter() - START, 1),
            "episodes": result.episodes,
        }
    )
)
