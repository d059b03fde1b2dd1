# SPDX-License-Identifier: Apache-2.0
"""The quickstart's GRPO by hand: one file, no engine, the same losses. `python by_hand.py [seed]`"""

import sys

import torch
from base_model import warm_start
from tasks import LONGEST_COMPLETION, exact, make_all

from chatlearn.rollout.sampling import derive_seed, sample_keys, sample_tokens, uniforms

EPISODES, PROMPTS, SAMPLES, UPDATES = 40, 32, 8, 2
LR, WARMUP, CLIP_LOW, CLIP_HIGH, MAX_GRAD_NORM = 3e-4, 10, 0.2, 0.28, 1.0


@torch.no_grad()
def generate(model, tokenizer, prompts, temperature, keys):
    """Complete equally long prompts; return ids `[B, P + T]`, log-probs and mask `[B, T]`, texts."""
    ids = fed = tokenizer(prompts, return_tensors="pt").input_ids
    start, cache, alive = ids.shape[1], None, torch.ones(len(prompts), dtype=torch.bool)
    draws = uniforms(keys, 0, LONGEST_COMPLETION)  # as chatlearn's, so that losses can be compared
    logprobs, mask = [], []
    for step in range(LONGEST_COMPLETION):
        output = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        token, prob = sample_tokens(output.logits[:, -1], draws[step], temperature=temperature)
        token = token.where(alive, tokenizer.pad_token_id)
        logprobs.append(prob.log())
        mask.append(alive)
        alive = alive & (token != tokenizer.eos_token_id)
        fed = token[:, None]
        ids = torch.cat([ids, fed], 1)
        if not alive.any():
            break
    texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    return ids, torch.stack(logprobs, 1), torch.stack(mask, 1), texts


def loss_of(model, ids, old, mask, advantage):
    """Give the clipped policy-gradient loss, averaged over the tokens of all samples."""
    length = mask.shape[1]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -length:]
    new = logits.log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0]
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    gain = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    return -gain[mask].mean()


def learning_rate(update, total):
    """Rise linearly over the warm-up, then fall linearly to 0 at `total`."""
    return LR * min((update + 1) / (WARMUP + 1), 1, (total - update) / max(1, total - WARMUP))


def grpo(model, tokenizer, problems, seed, episodes=EPISODES):
    """Train `model` in place; yield per episode the mean reward and the loss of each update."""
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0, fused=True)
    batch, update, stream = PROMPTS * SAMPLES, 0, derive_seed(seed, "policy/train")
    for episode in range(episodes):
        chosen = [problems[(episode * PROMPTS + i) % len(problems)] for i in range(PROMPTS)]
        chosen = [problem for problem in chosen for _ in range(SAMPLES)]
        keys = sample_keys(stream, range(episode * batch, (episode + 1) * batch), [0] * batch)
        prompts = [problem["prompt"] for problem in chosen]
        ids, old, mask, texts = generate(model, tokenizer, prompts, 1.0, keys)
        rewards = torch.tensor(exact(texts, [problem["answer"] for problem in chosen]))
        groups = rewards.view(PROMPTS, SAMPLES)
        centred, spread = groups - groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
        advantage = (centred / (spread + 1e-6)).flatten()
        losses = []
        for rows in torch.arange(batch).chunk(UPDATES):
            adam.param_groups[0]["lr"] = learning_rate(update, episodes * UPDATES)
            loss = loss_of(model, ids[rows], old[rows], mask[rows], advantage[rows])
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            adam.step()
            losses.append(loss.item())
            update += 1
        yield rewards.mean().item(), losses


def main(seed):
    """Warm start, measure, train, measure."""
    torch.set_num_threads(1)
    problems = make_all(seed)
    model, tokenizer = warm_start(problems.supervised, seed)
    asked, answers = (
        [p["prompt"] for p in problems.heldout],
        [p["answer"] for p in problems.heldout],
    )
    greedy = (model, tokenizer, asked, 0.0, sample_keys(0, range(512), [0] * 512))
    print("accuracy before:", sum(exact(generate(*greedy)[3], answers)) / len(answers))
    for number, (reward, losses) in enumerate(grpo(model, tokenizer, problems.prompts, seed), 1):
        print(f"episode {number}/{EPISODES}  reward {reward:.3f}  losses {losses}")
    print("accuracy after:", sum(exact(generate(*greedy)[3], answers)) / len(answers))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
