"""The settings of a study: the sizes of --quick, the default and --full."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from sys import maxsize

from headwise.apps.compare.training import TrainingOptions
from headwise.apps.energy.windows import Windows
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.own_models import OwnModel, Translator
from headwise.apps.tasks.shapes import Shape
from headwise.io.printable import quoted

ACCURACY = "accuracy"
#: What models that translate are compared by.
BLEU = "bleu"


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a study computes.

    Attributes:
        size: "quick", "default" or "full": what the rest came from.
        keep: shares of the heads, in (0, 1].
        methods: names from :data:`headwise.apps.compare.methods.METHODS`.
        seeds: one training of each method per seed; the split of the data is always that of the
            first.
        steps: training steps of every method that trains, after the dense model's.
        dense_steps: steps in which the dense model learns the task.
        train_limit: training inputs at most; None: all.
        validation_limit: validation inputs at most; None: all.
        test_limit: test inputs at most; None: all.
        score_limit: training inputs that head scores are computed on.
        max_length: tokens; longer texts are cut.
        training: of every method, after the dense model.
        dense_learning_rate: of the dense model's own training.
        from_scratch: the dense model is not pretrained.
        metric: what methods are compared by: "accuracy", or a name of
            :data:`headwise.apps.compare.metrics.METRICS`.
        shapes: for measuring latency; the first is the one in the table.
        latency_s: seconds of measuring a run and shape.
        energy: measure the energy of every run in such windows, with the first shape; None: do not.
    """

    size: str = "default"
    keep: tuple[float, ...] = (0.75, 0.5, 0.25)
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    steps: int = 160
    dense_steps: int = 300
    train_limit: int | None = None
    validation_limit: int | None = None
    test_limit: int | None = None
    score_limit: int = 512
    max_length: int = 48
    training: TrainingOptions = field(default_factory=TrainingOptions)
    dense_learning_rate: float = 8e-5
    shapes: tuple[Shape, ...] = (Shape(32), Shape(1), Shape(8, 128))
    latency_s: float = 1.0
    energy: Windows | None = None
    from_scratch: bool = False
    metric: str = ACCURACY

    def as_dict(self) -> dict:
        found = asdict(self)
        # Runs of versions without these fields stay valid.
        for name in ("energy", "from_scratch", "metric"):
            if found[name] in (None, False, ACCURACY):
                del found[name]
        return found

    def for_model(self, model: OwnModel | None) -> Settings:
        """The same with the steps and rates of a model that a task trains from nothing; None: of
        the pretrained text encoder."""
        if model is None:
            return self
        found = replace(
            self,
            dense_steps=model.dense_steps,
            dense_learning_rate=model.dense_learning_rate,
            # So small a model is slower in bfloat16.
            training=replace(self.training, learning_rate=model.learning_rate, precision="float32"),
            from_scratch=True,
        )
        if not isinstance(model, Translator):
            return found
        return replace(
            found,
            metric=BLEU,
            validation_limit=min(self.validation_limit or maxsize, model.validation_limit),
            test_limit=min(self.test_limit or maxsize, model.test_limit),
        )


def preset(size: str, seed: int) -> Settings:
    """The settings of one of the three sizes; ``methods`` is left to the caller.

    quick: one budget, within 5 minutes on 2 cores. default: three budgets, within 15 minutes.
    full: three seeds, all training data; hours on 2 cores, resumable.
    """
    settings = Settings(size=size, seeds=(seed,))
    if size == "quick":
        return replace(
            settings,
            keep=(0.5,),
            steps=80,
            dense_steps=200,
            test_limit=1200,
            validation_limit=500,
            score_limit=256,
            shapes=(Shape(32), Shape(1)),
            latency_s=0.6,
        )
    if size == "full":
        # 280 steps of 32 texts: every training text of the bundled tasks at least once.
        return replace(
            settings,
            seeds=(seed, seed + 1, seed + 2),
            steps=280,
            dense_steps=420,
            score_limit=1024,
            latency_s=1.5,
        )
    if size != "default":
        raise ValueError(f"size must be quick, default or full, got {quoted(size)}")
    return replace(
        settings, steps=80, dense_steps=200, test_limit=1500, validation_limit=500, latency_s=0.4
    )


def check_keep(keep: tuple[float, ...]) -> tuple[float, ...]:
    """``keep`` without repeats. Raises an error for values that are not shares of the heads."""
    for share in keep:
        if not 0 < share <= 1:
            raise UsageError(f"every keep must be above 0 and at most 1, got {share:g}")
    if not keep:
        raise UsageError("keep must have at least one share of the heads")
    return tuple(dict.fromkeys(keep))


@dataclass(frozen=True)
class Source:
    """Where tasks and model come from.

    Attributes:
        tasks: names of bundled tasks; empty if ``data`` is given.
        data: one's own file.
        text, label, group: its columns, of texts.
        model: folder of a transformers model; None: the bundled MiniLM.
    """

    tasks: tuple[str, ...] = ("reviews",)
    data: Path | None = None
    text: str = "text"
    label: str = "label"
    group: str | None = None
    model: Path | None = None
