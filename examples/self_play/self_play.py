# SPDX-License-Identifier: Apache-2.0
"""Two policies train each other: one writes problems, the other solves them.

    python self_play.py [--frozen-proposer] [runtime.seed=1] [runtime.num_episode=50] ...

The last line of the output is one JSON object. `README.md` beside this file tells the story.
"""

# ruff: noqa: E402 - the clock starts before the imports
import time

BEGUN = time.perf_counter()

import json
import sys

import school
import torch
from game import PROBLEMS, START, GroupReward, Referee, answer, hard, parse, right

import chatlearn
from chatlearn import Engine, Environment, Evaluator, Trainer
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer

torch.set_num_threads(1)  # matrices this small only wait for each other on more
arguments = sys.argv[1:]
is_control = "--frozen-proposer" in arguments  # who learns what, if the proposer stays as it is?

# An episode: 256 problems in 4 groups, one answer to each; two updates of both players.
config = chatlearn.init(
    {
        "runtime": {
            "num_episode": 200,
            "sample_per_episode": 256,
            "num_inference_per_prompt": 64,
            "train_global_batch_size": 128,
            "enable_eval_before_training": True,
            "eval_episode_interval": 10,
            "save_episode_interval": 50,
            "output_dir": "runs/self_play" + ("_control" if is_control else ""),
        },
        # The proposer moves slower: its sampler gets the weights of its trainer every other episode.
        "models": {"proposer": {"sync_frequency": 2}},
    },
    overrides=[argument for argument in arguments if argument != "--frozen-proposer"],
)
seed, episodes = config.runtime.seed, config.runtime.num_episode


def proposer_model():
    return school.proposer(seed)


def solver_model():
    return school.solver(seed)


# Every module of a player has the player's namespace: its columns are proposer/... and solver/...
proposer = PolicyInference("proposer", namespace="proposer", model=proposer_model, max_new_tokens=4)
proposer_reward = GroupReward("proposer_reward", hard, namespace="proposer")
proposer_advantage = GroupAdvantage("proposer_advantage", namespace="proposer")
proposer_trainer = PolicyTrainer(
    "proposer_trainer",
    namespace="proposer",
    model=proposer_model,
    lr=3e-4,
    entropy_coef=0.02,
)

solver = PolicyInference(
    "solver", namespace="solver", model=solver_model, max_new_tokens=2, eval_temperature=0.0
)
solver_reward = FunctionReward("solver_reward", right, namespace="solver")
solver_advantage = GroupAdvantage("solver_advantage", namespace="solver")
solver_trainer = PolicyTrainer(
    "solver_trainer",
    namespace="solver",
    model=solver_model,
    lr=1e-3,
    lr_schedule="linear",
    warmup_steps=10,
    total_steps=2 * episodes,
    entropy_coef=0.08,  # who is sure of a wrong digit never tries the right one
)
referee = Referee("referee")


def env_flow(batch):  # one writes, the other solves; each is paid by what the other does
    problem = referee.forward_step(proposer.forward_step(batch))
    solved = solver_reward.forward_step(solver.forward_step(problem))
    scored = proposer_reward.forward_step(solved)
    return solver_advantage.forward_step(solved), proposer_advantage.forward_step(scored)


def trainer_flow(batch):  # both learn
    solver_trainer.train_step(batch)
    if not is_control:
        proposer_trainer.train_step(batch)


def eval_flow(batch):  # each by a measure of its own
    return proposer.eval_step(batch), solver.eval_step(batch)


def measures(results, _info):
    """Give the share of problems solved, and of proposals that are well-formed and no repetition."""
    proposals = [text for batch in results["proposer"] for text in batch["proposer/completion"]]
    answers = [text for batch in results["solver"] for text in batch["solver/completion"]]
    wanted = [text for batch in results["solver"] for text in batch["answer"]]
    well_formed = [text for text in proposals if parse(text)]
    return {
        "accuracy": sum(map(str.__eq__, answers, wanted)) / len(wanted),
        "well_formed": len(well_formed) / len(proposals),
        "distinct": len(set(well_formed)) / len(proposals),
    }


# All 100 problems for the solver, and as many requests to the proposer.
exam = [{"prompt": START, "solver/prompt": f"{p}=", "answer": answer(p)} for p in PROBLEMS]
evaluator = Evaluator(eval_flow).set_dataset(exam).set_post_process_func(measures)
engine = Engine(Environment(env_flow), Trainer(trainer_flow), evaluator).set_dataset([START])
engine.set_parameter_sync(solver_trainer, solver)
if not is_control:
    engine.set_parameter_sync(proposer_trainer, proposer)
result = engine.learn()

before, after = result.evaluations[0][1], result.evaluations[-1][1]
names = ("accuracy", "well_formed", "distinct")
print(
    json.dumps(
        {f"{name}_before": round(before[name], 4) for name in names}
        | {f"{name}_after": round(after[name], 4) for name in names}
        | {"seconds": round(time.perf_counter() - BEGUN, 1), "episodes": result.episodes}
    )
)
