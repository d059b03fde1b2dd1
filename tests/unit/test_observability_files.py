# SPDX-License-Identifier: Apache-2.0
"""Metrics, transcripts and the run folder: what is written, and what survives a crash."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.errors import ConfigError, OutputError
from chatlearn.observability.jsonl import JsonlFile, json_safe, read_rows
from chatlearn.observability.metrics import EpisodeMetrics, MetricStore
from chatlearn.observability.report_samples import samples_html
from chatlearn.observability.run_folder import RunFolder
from chatlearn.observability.trackers import TensorBoardTracker
from chatlearn.observability.transcripts import TranscriptLog, sample_rows


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestEpisodeMetrics:
    def test_means_are_weighted_by_samples(self):
        episode = EpisodeMetrics()
        episode.add("policy", "forward_step", {"length": 10}, samples=3)
        episode.add("policy", "forward_step", {"length": 20}, samples=1)
        assert episode.summary() == {"policy/length": 12.5}

    def test_names_choose_sum_max_and_min(self):
        episode = EpisodeMetrics()
        for value in (3, 5, 4):
            episode.add("m", "f", {"new_tokens": value, "x_max": value, "x_min": value}, 7)
        assert episode.summary() == {"m/new_tokens": 12, "m/x_max": 5, "m/x_min": 3}

    def test_extremes_may_be_negative_and_never_hide_a_nan(self):
        episode = EpisodeMetrics()
        for value in (-3, math.nan, -5):
            episode.add("m", "f", {"x_max": value, "y_max": -1.0})
        assert math.isnan(episode.summary()["m/x_max"])
        assert episode.summary()["m/y_max"] == -1

    def test_two_methods_with_one_name_are_kept_apart(self):
        episode = EpisodeMetrics()
        episode.add("m", "f", {"x": 1, "y": 1})
        episode.add("m", "g", {"x": 2})
        assert episode.summary() == {"m.f/x": 1, "m/y": 1, "m.g/x": 2}

    def test_times_add_up_and_plain_metrics_stand_as_given(self):
        episode = EpisodeMetrics()
        episode.add_time("sync", 0.5)
        episode.add_time("sync", 0.25)
        episode.put("reward", 1)
        assert episode.summary() == {"time/sync": 0.75, "reward": 1.0}

    def test_a_call_of_no_samples_does_not_divide_by_zero(self):
        episode = EpisodeMetrics()
        episode.add("m", "f", {"x": 2.0}, samples=0)
        assert episode.summary() == {"m/x": pytest.approx(2.0)}


class TestMetricStore:
    def test_rows_are_flushed_and_nonfinite_values_flagged(self, tmp_path):
        now = iter([0.0, 1.5, 3.0])
        store = MetricStore(tmp_path / "m.jsonl", clock=lambda: next(now))
        store.write(1, 4, {"loss": 0.5}, kind="train")
        store.write(2, 8, {"loss": math.nan, "kl": math.inf, "reward": 1})
        store.close()
        assert lines(tmp_path / "m.jsonl") == [
            {"episode": 1, "train_iteration": 4, "time_s": 1.5, "kind": "train", "loss": 0.5},
            {
                "episode": 2,
                "train_iteration": 8,
                "time_s": 3.0,
                "loss": None,
                "kl": None,
                "reward": 1.0,
                "nonfinite": ["loss", "kl"],
            },
        ]

    def test_restore_drops_later_episodes_and_goes_on_in_time(self, tmp_path):
        clock = [0.0]
        store = MetricStore(tmp_path / "m.jsonl", clock=lambda: clock[0])
        for episode in (1, 2, 3):
            clock[0] += 10
            store.write(episode, episode, {})
        store.close()
        clock[0] = 1000.0
        store = MetricStore(tmp_path / "m.jsonl", clock=lambda: clock[0])
        assert [row["episode"] for row in store.restore(2, None)] == [1, 2]
        clock[0] += 5
        assert store.write(3, 3, {})["time_s"] == 25.0
        store.close()
        assert [row["episode"] for row in lines(tmp_path / "m.jsonl")] == [1, 2, 3]

    def test_restore_of_nothing(self, tmp_path):
        assert MetricStore(tmp_path / "m.jsonl").restore(3, None) == []
        assert not (tmp_path / "m.jsonl").exists()


class TestJsonl:
    @pytest.mark.parametrize("rest", ['{"episode": 2, "lo', "{", '{"episode": 2}', "\x00" * 9])
    def test_a_half_written_last_line_is_forgotten(self, tmp_path, rest):
        path = tmp_path / "m.jsonl"
        path.write_text('{"episode":1}\n' + rest)
        assert read_rows(path) == [{"episode": 1}]
        append(path, {"episode": 2, "x": 1})
        assert lines(path) == [{"episode": 1}, {"episode": 2, "x": 1}]

    def test_a_file_that_is_only_a_half_line(self, tmp_path):
        path = tmp_path / "m.jsonl"
        path.write_text("x" * 200_000)
        append(path, {"episode": 1})
        assert lines(path) == [{"episode": 1}]

    def test_a_broken_line_in_the_middle_is_named(self, tmp_path):
        path = tmp_path / "m.jsonl"
        path.write_text('{"episode":1}\nbroken\n{"episode":2}\n')
        with pytest.raises(OutputError, match=r"m\.jsonl:2"):
            read_rows(path)

    def test_line_separators_and_lone_surrogates_do_not_break_lines(self, tmp_path):
        log = JsonlFile(tmp_path / "t.jsonl")
        log.append({"text": "a\nb\u2028c\u0085d\udc80é"})
        log.close()
        (row,) = read_rows(tmp_path / "t.jsonl")
        assert row["text"].startswith("a\nb\u2028c\u0085d")

    def test_json_safe(self):
        import numpy as np
        import torch

        value = {
            1: torch.tensor([1.5, math.inf]),
            "b": (np.float32(2), torch.tensor(3)),
            "c": Path("x"),
        }
        assert json_safe(value) == {"1": [1.5, None], "b": [2.0, 3], "c": "x"}

    def test_a_folder_that_is_gone_is_an_output_error(self, tmp_path):
        with pytest.raises(OutputError, match="cannot write"):
            JsonlFile(tmp_path / "no" / "m.jsonl").append({})


def append(path: Path, row: dict) -> None:
    log = JsonlFile(path)
    log.append(row)
    log.close()


def batch(n: int, start: int = 0, group: int = 2) -> dict:
    import torch

    uid = torch.arange(start, start + n)
    return {
        "uid": uid,
        "prompt_uid": uid // group,
        "prompt": [f"p{i}" for i in range(n)],
        "completion": [f"c{i}" for i in range(n)],
        "rewards": torch.arange(n) / 10,
        "rewards/format": torch.ones(n),
        "advantages": [torch.tensor([0.123456789, 1.0])] * n,
        "finish_reason": ["stop"] * n,
        "response_ids": [torch.tensor([1])] * n,
    }


class TestTranscripts:
    def test_rows_are_the_lowest_uids_of_all_batches_in_order(self):
        rows = sample_rows([batch(4, start=4), batch(4, start=0)], limit=3)
        assert [row["uid"] for row in rows] == [0, 1, 2]
        assert rows[1] == {
            "uid": 1,
            "prompt_uid": 0,
            "prompt": "p1",
            "completion": "c1",
            "rewards": 0.1,
            "advantages": [0.123457, 1.0],
            "finish_reason": "stop",
            "rewards/format": 1.0,
        }

    def test_groups_stay_together(self):
        scattered = {"uid": [0, 1, 2, 3], "prompt_uid": [7, 5, 7, 5], "completion": list("abcd")}
        assert [row["uid"] for row in sample_rows(scattered, 2)] == [1, 3]

    def test_whatever_columns_exist(self):
        assert sample_rows({"x": [1, 2]}, 2) == []
        assert sample_rows({"prompt": []}, 2) == []
        assert sample_rows([], 2) == []
        chat = [{"role": "user", "content": "hi"}]
        assert sample_rows({"prompt": [chat, chat]}, 1) == [{"prompt": chat}]

    def test_uids_need_not_be_numbers(self):
        texts = {"uid": [3, 1, 2], "prompt_uid": ["b", "a", "b"], "completion": list("xyz")}
        assert [row["uid"] for row in sample_rows(texts, 3)] == [1, 2, 3]
        mixed = {"uid": ["q", 7, (1, 2), math.nan, None], "completion": list("vwxyz")}
        assert sample_rows(mixed, 1)[0]["completion"] == "w"
        assert len(sample_rows([mixed, texts, batch(2)], 99)) == 10

    def test_nan_rewards_are_null(self):
        assert sample_rows({"completion": ["a"], "rewards": [math.nan]}, 1)[0]["rewards"] is None

    def test_log_and_rewind(self, tmp_path):
        log = TranscriptLog(tmp_path / "t.jsonl", per_episode=2)
        assert log.record(batch(8), episode=0, phase="eval") == 2
        assert log.record([batch(8)], episode=1, phase="train") == 2
        assert log.record({"x": [1]}, episode=1, phase="train") == 0
        log.rewind(0)
        log.close()
        rows = read_rows(tmp_path / "t.jsonl")
        assert [(row["episode"], row["phase"], row["uid"]) for row in rows] == [
            (0, "eval", 0),
            (0, "eval", 2),  # of the next prompt
        ]

    def test_policies_of_several_namespaces_have_samples_of_their_own(self):
        columns = {
            "prompt_uid": torch.tensor([0, 0]),
            "uid": torch.tensor([0, 1]),
            "prompt": ["p", "p"],
            "namespace": [{}, {}],  # a column of the user's own
            "solver/completion": ["a", "b"],
            "solver/rewards": torch.tensor([1.0, 0.0]),
            "proposer/prompt": ["q", "q"],
            "proposer/completion": ["c", "d"],
            "proposer/rewards/exact": [0.5, 0.5],
        }
        keys = ("namespace", "uid", "prompt", "completion", "rewards", "rewards/exact")
        rows = [tuple(row.get(key) for key in keys) for row in sample_rows(columns, 3)]
        assert rows == [
            ("solver", 0, "p", "a", 1.0, None),
            ("proposer", 0, "q", "c", None, 0.5),
            ("solver", 1, "p", "b", 0.0, None),
        ]
        spread = sample_rows(columns, 3, spread=True)
        assert [(row["namespace"], row["uid"]) for row in spread] == [
            ("solver", 0),
            ("proposer", 0),
            ("solver", 1),
        ]
        page = samples_html([{"episode": 1, "phase": "train", **row} for row in spread])
        assert "solver" in page
        assert "proposer" in page


class TestRunFolder:
    def test_writes_whole_files_and_knows_their_places(self, tmp_path):
        with RunFolder(tmp_path / "a" / "run") as folder:
            folder.write_text("flows/env.svg", "<svg/>")
            folder.write_text("config.yaml", "a: 1\n")
            folder.write_text("config.yaml", "a: 2\n")
            assert folder.config.read_text() == "a: 2\n"
            assert (folder.flows / "env.svg").read_text() == "<svg/>"
            assert sorted(p.name for p in folder.path.iterdir()) == [
                ".lock",
                "config.yaml",
                "flows",
            ]
            assert folder.moved_to is None

    def test_an_earlier_run_moves_aside_and_nothing_else_does(self, tmp_path):
        for i in range(3):
            with RunFolder(tmp_path) as folder:
                folder.write_text("config.yaml", f"run: {i}")
                folder.write_text("checkpoints/latest", "x")
            (tmp_path / "notes.txt").write_text("mine")
        assert folder.moved_to == tmp_path / "earlier" / "0002"
        assert (tmp_path / "earlier" / "0001" / "config.yaml").read_text() == "run: 0"
        assert (tmp_path / "earlier" / "0002" / "checkpoints" / "latest").exists()
        assert folder.config.read_text() == "run: 2"
        assert (tmp_path / "notes.txt").exists()

    def test_resuming_keeps_everything(self, tmp_path):
        with RunFolder(tmp_path) as folder:
            folder.write_text("config.yaml", "a")
        with RunFolder(tmp_path, resume=True) as folder:
            assert folder.config.read_text() == "a"
            assert folder.moved_to is None

    def test_files_that_no_run_wrote_are_never_touched(self, tmp_path):
        (tmp_path / "config.yaml").write_text("the user's own")
        for _ in range(2):
            with pytest.raises(OutputError, match=r"config\.yaml"):
                RunFolder(tmp_path)
        assert (tmp_path / "config.yaml").read_text() == "the user's own"

    def test_two_runs_in_one_folder(self, tmp_path):
        with RunFolder(tmp_path), pytest.raises(OutputError, match=f"process {os.getpid()}"):
            RunFolder(tmp_path)
        RunFolder(tmp_path).close()

    def test_another_process_is_named_and_its_death_frees_the_folder(self, tmp_path):
        code = (
            "import sys, time; from chatlearn.observability.run_folder import RunFolder;"
            "f = RunFolder(sys.argv[1]); print('ready', flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            other.stdout.readline()
            with pytest.raises(OutputError, match=f"process {other.pid}"):
                RunFolder(tmp_path)
            other.kill()
        RunFolder(tmp_path).close()

    def test_a_file_in_the_way_and_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/nothing/here")):
            with pytest.raises(OutputError) as error:
                RunFolder(path)
            assert "runtime.output_dir" in error.value.fix
            assert error.value.place

    def test_a_failed_write_leaves_the_old_file_and_no_rest(self, tmp_path, monkeypatch):
        with RunFolder(tmp_path) as folder:
            folder.write_text("summary.json", "old")

            def broken(_: int) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(os, "fsync", broken)
            with pytest.raises(OutputError, match="No space left"):
                folder.write_text("summary.json", "new")
            assert folder.summary.read_text() == "old"
            assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "summary.json"]


class Answers(BaseModule):
    """Names its prompts by text, as a user's module may."""

    def forward_step(self, data):
        names = [f"prompt {prompt}" for prompt in data["prompt"]]
        return {**data, "prompt_uid": names, "completion": names}


class Learner(BaseModule):
    def train_step(self, data_list):
        pass


class TestRecorder:
    def run(self, folder: Path) -> None:
        runtime = {"output_dir": folder, "num_episode": 3, "sample_per_episode": 2}
        chatlearn.init({"runtime": runtime})
        answers, learner = Answers("answers"), Learner("learner")
        engine = Engine(
            Environment(lambda data: answers.forward_step(data)),
            Trainer(lambda data: learner.train_step(data)),
            Evaluator(lambda data: answers.forward_step(data)).set_dataset([[1, 2], [3]]),
        )
        assert engine.set_dataset([[4], [5]]).learn().episodes == 3

    def test_samples_of_any_kind_become_transcripts_and_a_report(self, tmp_path, capsys):
        self.run(tmp_path)
        rows = read_rows(tmp_path / "transcripts.jsonl")
        assert {row["prompt_uid"] for row in rows} == {f"prompt [{x}]" for x in ("1, 2", 3, 4, 5)}
        assert "[1, 2]" in (tmp_path / "report.html").read_text()
        assert "missing" not in capsys.readouterr().out

    def test_a_report_that_fails_leaves_a_finished_run_finished(
        self, tmp_path, monkeypatch, capsys
    ):
        def broken(folder):
            raise ZeroDivisionError("no scale")

        monkeypatch.setattr("chatlearn.observability.recorder.write_report", broken)
        self.run(tmp_path)
        shown = capsys.readouterr().out
        assert "the report could not be written: ZeroDivisionError: no scale" in shown
        assert f"chatlearn report {tmp_path}" in shown
        assert json.loads((tmp_path / "summary.json").read_text())["complete"] is True

    def test_transcripts_that_fail_are_noted_once(self, tmp_path, monkeypatch, capsys):
        def broken(self, batches, **where):
            raise KeyError("prompt")

        monkeypatch.setattr(TranscriptLog, "record", broken)
        self.run(tmp_path)
        shown = capsys.readouterr().out
        assert shown.count("are missing in transcripts.jsonl: KeyError: 'prompt'") == 1
        assert "report: " in shown


class TestTrackers:
    def test_tensorboard_files_read_back(self, tmp_path):
        tracker = TensorBoardTracker(tmp_path / "tb")
        tracker.go_on(3)
        tracker.log(3, {"a/loss": 0.5, "b": math.nan})
        tracker.log(4, {"a/loss": 0.25})
        tracker.close()
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        (path,) = (tmp_path / "tb").iterdir()
        found = {
            (event.step, value.tag): value.tensor.float_val[0] if value.tensor.float_val else None
            for event in EventFileLoader(str(path)).Load()
            for value in event.summary.value
        }
        assert found[(3, "a/loss")] == 0.5
        assert found[(4, "a/loss")] == 0.25
        assert (3, "b") in found

    def test_tensorboard_without_a_folder(self, tmp_path):
        (tmp_path / "tb").write_text("")
        with pytest.raises(OutputError, match="TensorBoard"):
            TensorBoardTracker(tmp_path / "tb")

    def test_tensorboard_needs_no_torch(self, tmp_path):
        code = (
            "import sys; from chatlearn.observability.trackers import TensorBoardTracker as T;"
            "T(sys.argv[1]).close(); assert 'torch' not in sys.modules"
        )
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        assert time.perf_counter() - start < 10

    def test_wandb_is_imported_late_and_used_plainly(self, tmp_path, monkeypatch):
        from types import SimpleNamespace

        from chatlearn.observability.wandb_tracker import WandbTracker

        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ConfigError, match="not installed"):
            WandbTracker("p", tmp_path, {})
        calls: list = []
        run = SimpleNamespace(
            log=lambda metrics, step: calls.append((step, metrics)),
            finish=lambda: calls.append("finish"),
        )
        fake = SimpleNamespace(init=lambda **kw: calls.append(kw) or run)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        tracker = WandbTracker("p", tmp_path, {"a": 1})
        tracker.log(2, {"loss": 1.0})
        tracker.close()
        assert calls == [
            {"project": "p", "dir": str(tmp_path), "config": {"a": 1}},
            (2, {"loss": 1.0}),
            "finish",
        ]
