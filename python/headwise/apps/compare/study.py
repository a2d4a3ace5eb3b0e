"""The study: every task, seed, budget and method in order, and the results."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

import headwise as hw
from headwise.apps.compare import heads_of_kinds, measure
from headwise.apps.compare.methods import METHODS, Outcome
from headwise.apps.compare.progress import Progress
from headwise.apps.compare.records import measured
from headwise.apps.compare.repaired import measure_headroom
from headwise.apps.compare.settings import BLEU, Settings, Source
from headwise.apps.compare.training import finetune
from headwise.apps.compare.workbench import Workbench, dense_options
from headwise.apps.tasks.examples import Examples
from headwise.apps.tasks.origins import origin_of
from headwise.apps.tasks.registry import load_data, load_task
from headwise.apps.tasks.tasks import Task, split
from headwise.io.files import write_atomic
from headwise.io.fingerprint import fingerprint
from headwise.io.store import Store, short_name

DENSE = "dense"
#: Version of a run's record: runs of other versions are repeated.
RECORD = 2


@dataclass(frozen=True)
class Run:
    """One line of the study's list of work."""

    task: str
    method: str
    keep: float
    seed: int

    @property
    def name(self) -> str:
        return f"{short_name(self.task)}-{self.method}-{self.keep:g}-{self.seed}"


def runs_of(task: str, settings: Settings, seed: int) -> list[Run]:
    """The runs of a task and seed, in the order in which they are done."""
    found = [Run(task, DENSE, 1.0, seed)]
    for name in settings.methods:
        if METHODS[name].kind == "dense":
            found.append(Run(task, name, 1.0, seed))
    for keep in settings.keep:
        for name in settings.methods:
            if METHODS[name].kind != "dense":
                found.append(Run(task, name, keep, seed))
    return found


class Study:
    """Does the unfinished runs; every finished run is written to a file at once.

    Args:
        source: tasks and model.
        settings: what to do.
        out: folder of results; runs that an earlier study with the same settings finished there
            are reused.
        device: the device for training and measuring.
        threads: recorded with the results.
        progress: receives every step.
        keep_models: write each trained model to ``out/models``.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        out: Path,
        *,
        device: torch.device,
        threads: int,
        progress: Progress,
        keep_models: bool = False,
    ):
        self.source = source
        self.settings = settings
        self.out = out
        self.device = device
        self.threads = threads
        self.progress = progress
        self.keep_models = keep_models
        # All invalid input is found before any training.
        self.tasks = self._load_tasks()
        self.origin = origin_of(self.tasks, source.model, settings.seeds[0])
        length = self.origin.max_length(settings.max_length)
        shapes = tuple(dict.fromkeys(self.origin.shape(shape) for shape in settings.shapes))
        self.settings = replace(settings, max_length=length, shapes=shapes)
        for task in self.tasks:
            split(task, settings.seeds[0])

    def _load_tasks(self) -> list[Task]:
        source = self.source
        if source.data is not None:
            return [load_data(source.data, source.text, source.label, source.group)]
        return [load_task(name) for name in source.tasks]

    def _key(self, task: Task) -> dict:
        """Everything that a result depends on, except the run's own method, budget and seed."""
        settings = self.settings.as_dict()
        for unrelated in ("size", "keep", "methods", "seeds"):
            settings.pop(unrelated)
        return {
            "record": RECORD,
            "split_seed": self.settings.seeds[0],
            "data": fingerprint(
                [task.inputs, task.targets or task.labels, task.groups, task.classes]
            ),
            "model": self.origin.digest,
            "settings": settings,
            "device": str(self.device),
            "threads": self.threads,
            "versions": [hw._C.__version__, torch.__version__],
        }

    def run(self) -> dict:
        """Does the missing runs and returns ``{"environment", "settings", "runs", ...}``."""
        records: list[dict] = []
        work = [
            (task, seed, runs_of(task.name, self.settings, seed), self._key(task))
            for task in self.tasks
            for seed in self.settings.seeds
        ]
        self.progress.start(sum(len(runs) for _, _, runs, _ in work))
        headroom: list[dict] = []
        attention: list[dict] = []
        for task, seed, runs, key in work:
            name = f"{short_name(task.name)}-{seed}"
            store = Store.in_folder(self.out / "runs", name, key)
            found = {run: store.get(run.name) for run in runs}
            bench: Any = None  # a Workbench, once it is needed
            # Headroom is for the first seed and the requested budgets.
            rooms = Store(None, "headroom", {})
            if seed == self.settings.seeds[0]:
                own = {**key, "keep": self.settings.keep}
                rooms = Store.in_folder(self.out / "runs", f"{name}-headroom", own)
            room = rooms.get("headroom") if rooms.path else {}
            if room is None or any(record is None for record in found.values()):
                bench = self._workbench(task, seed, key)
            if room is None:
                self.progress.stage(f"{task.name}: headroom")
                room = measure_headroom(bench)
                rooms.add("headroom", room)
            if room:
                self.progress.say(room["sentences"])
                headroom.append(room)
            for run in runs:
                if found[run] is None:
                    found[run] = self._do(bench, run)
                    store.add(run.name, found[run])
                    self.progress.finished(run.name, found[run])
                else:
                    self.progress.taken_over(run.name, found[run])
                records.append(found[run])
            if self.settings.metric == BLEU and seed == self.settings.seeds[0]:
                attention.append(self._attention(task, seed, key, name, bench))
        return {
            "environment": measure.environment(self.device, self.threads)
            | {"seeds": list(self.settings.seeds)},
            "settings": self.settings.as_dict(),
            "tasks": [self._describe(task) for task in self.tasks],
            "runs": records,
            "headroom": headroom,
            **({"attention": attention} if attention else {}),
            "model": self._describe_model(),
        }

    def _attention(self, task: Task, seed: int, key: dict, name: str, bench: Any) -> dict:
        """What each head of the dense model is worth and does, measured or from an earlier
        study."""
        store = Store.in_folder(self.out / "runs", f"{name}-attention", key)
        found = store.get("attention")
        if found is None:
            bench = bench or self._workbench(task, seed, key)
            self.progress.stage(f"{task.name}: every head alone, and all others")
            found = heads_of_kinds.measure(bench)
            store.add("attention", found)
        return found

    def _describe_model(self) -> dict:
        return {"name": self.origin.name, **self.origin.size(self.tasks[0])}

    def _parts(self, task: Task) -> tuple[Examples, Examples, Examples]:
        parts, settings = split(task, self.settings.seeds[0]), self.settings

        def examples(rows, limit: int | None) -> Examples:
            rows = rows if limit is None else _sample(rows, limit)
            return self.origin.examples(task, rows, settings.max_length)

        return (
            examples(parts.train, settings.train_limit),
            examples(parts.validation, settings.validation_limit),
            examples(parts.test, settings.test_limit),
        )

    def _describe(self, task: Task) -> dict:
        parts = split(task, self.settings.seeds[0])
        limits = (
            self.settings.train_limit,
            self.settings.validation_limit,
            self.settings.test_limit,
        )
        sizes = [
            len(rows) if limit is None else min(len(rows), limit)
            for rows, limit in zip((parts.train, parts.validation, parts.test), limits, strict=True)
        ]
        return {
            "name": task.name,
            "title": task.title,
            "examples": f"{task.example}s",
            "classes": list(task.classes),
            "train": sizes[0],
            "validation": sizes[1],
            "test": sizes[2],
        }

    def _workbench(self, task: Task, seed: int, key: dict) -> Workbench:
        self.progress.stage(f"{task.name}: reading")
        train, validation, test = self._parts(task)
        dense = self._dense(task, seed, key, train)
        self.progress.stage(f"{task.name}: asking the dense model")
        bench = Workbench(
            task.name, dense, train, validation, test, self.settings, seed, self.device, self.out
        )
        bench.step_done = self.progress.step
        return bench

    def _dense(self, task: Task, seed: int, key: dict, train: Examples) -> nn.Module:
        """The dense model, trained or from an interrupted study."""
        torch.manual_seed(seed)
        model = self.origin.model(task).to(self.device)
        path = self.out / "runs" / f"{short_name(task.name)}-{seed}-dense.safetensors"
        checked = fingerprint(key)
        with contextlib.suppress(Exception):  # if anything is wrong with it: train again
            if _metadata(path).get("key") == checked:
                model.load_state_dict(load_file(path))
                return model.eval()
        settings = self.settings
        self.progress.begin_training(f"{task.name}: dense, seed {seed}", settings.dense_steps)
        finetune(
            model,
            train.shuffled(settings.training.batch_size, seed=1000 * seed),
            settings.dense_steps,
            dense_options(settings),
            device=self.device,
            after_step=self.progress.step,
        )
        self.progress.end_training()
        # Copies: safetensors refuses tensors that share memory, such as tied embeddings.
        state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
        write_atomic(path, to_safetensors(state, metadata={"key": checked}))
        return model

    def _do(self, bench: Workbench, run: Run) -> dict:
        """Trains, chooses on validation inputs, reads the test once, measures."""
        steps = self.settings.steps
        if run.method == DENSE:
            kind, title = "dense", "dense"
            outcome, took = Outcome(bench.converted(), self.settings.dense_steps), {}
            timed = bench.dense  # the denominator of every other model's time
        else:
            method = METHODS[run.method]
            kind, title = method.kind, method.title
            torch.manual_seed(5000 + run.seed)
            label = f"{run.task}: {title}, {run.keep:.0%}, seed {run.seed}"
            self.progress.begin_training(label, steps if method.trains else 0)
            began = time.perf_counter()
            try:
                outcome = method.run(bench, run.keep, steps)
            finally:
                self.progress.end_training()
            took = {"method_seconds": time.perf_counter() - began}
            timed = outcome.model
        self.progress.stage(f"{run.name}: reading the test")
        record = {
            "task": run.task,
            "model": self.origin.name,
            "method": run.method,
            "kind": kind,
            "keep_target": run.keep,
            **measured(bench, outcome.model, timed),
            "train_steps": outcome.train_steps,
            "seed": run.seed,
            "title": title,
            **took,
            **outcome.notes,
        }
        if self.keep_models and run.method != DENSE:
            hw.save(outcome.model, self.out / "models" / run.name, tokenizer=self.origin.tokenizer)
        return record


def _sample(rows, limit: int) -> list[int]:
    """``limit`` rows, evenly spread: rows of one document are adjacent in some files."""
    rows = list(rows)
    if limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def _metadata(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
