"""Studies and runs: validated settings, read from YAML.

A study names a dataset, the settings that its runs share and a list of runs; `Study.runs()` expands it into `Run`s, one
training each. A run's key is a hash of all that its result depends on: two runs with one key are one run.
"""

import difflib
import hashlib
import json
from collections.abc import Collection, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from mlrpl import own_code
from mlrpl.errors import StudyError
from mlrpl.networks import STRIDE
from mlrpl.rows import run_name

STUDIES = Path(__file__).parent / "studies"  # that come with the package
MOST_BYTES, MOST_VALUES, MOST_DEPTH = 1_000_000, 100_000, 50  # of a study file

Whole = Annotated[int, Field(strict=True)]  # 3.000 is no way to write three thousand
Side = Annotated[Whole, Field(gt=0, le=4096)]  # bounded, so that a slip of the finger does not ask for all memory
Sides = tuple[Side, Side, Side]
Listed = BeforeValidator(lambda value: [value] if isinstance(value, int) else value)  # one number: a list of one
Numbers = Annotated[tuple[Side, ...], Field(min_length=1), Listed]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), Listed]
SLUG = r"^[a-z0-9][a-z0-9._-]*$"
Slug = Annotated[str, Field(pattern=SLUG)]


class Model(BaseModel):
    """Unknown settings are errors: a misspelt one must not silently keep its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


M = TypeVar("M", bound=Model)


class Dataset(Model):
    """Which volumes, and how they are prepared.

    Attributes:
        name: name of the case store.
        source: a key of `mlrpl.data.SOURCES`.
        options: the source's own options.
        step: keep every `step`-th voxel (la-half: 2).
    """

    name: Slug
    source: str
    options: dict[str, Any] = {}
    step: Annotated[int, Field(ge=1)] = 1


class Settings(Model):
    """All that training depends on besides method, data, labelled cases and seed. Defaults: the paper's on LA.

    Attributes:
        patch: sides (x, y, z) of what the network sees at a time, in voxels.
        stride: from one window of a whole volume's prediction to the next, in voxels.
        augmentation: see `mlrpl.data.patches.Batches`.
        filters: of the network at full resolution; twice as many each time that the sides are halved.
        normalisation: "batch", as published, predicts with running averages over labelled and unlabelled volumes. With
            very few labelled volumes these averages can fit neither; "instance" needs none.
        head_dropout: in training, whether half of the `filters` channels before each head are dropped, as published.
            Each volume draws anew, and where a draw leaves one channel or none the losses jump.
        iterations: steps of training, one batch each.
        batch: labelled and unlabelled volumes; without unlabelled ones for methods that can do without.
        learning_rate: of stochastic gradient descent, in the first iteration.
        lr_schedule: how it falls from there, see `mlrpl.training.learning_rate`.
        momentum: of stochastic gradient descent.
        weight_decay: of stochastic gradient descent.
        beta_max: largest weight β of the loss that needs no label.
        ramp_iterations: until β is there.
        check_from: iteration from which on the published protocol measures Dice, to keep the best weights.
        check_every: iterations from one such check to the next.
        precision: of training; "auto": the fastest that this machine computes right (`mlrpl.precision`).
        threads: of a run's process.
    """

    patch: Sides = (112, 112, 80)
    stride: Sides = (18, 18, 4)
    augmentation: tuple[Literal["rot90", "flip", "mirror"], ...] = ("rot90", "flip")
    filters: Annotated[Whole, Field(gt=0, le=512)] = 16
    normalisation: Literal["batch", "instance"] = "batch"
    head_dropout: bool = True
    iterations: Annotated[Whole, Field(gt=0)] = 15_000
    batch: tuple[Side, Annotated[int, Field(ge=0, le=4096)]] = (2, 2)
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    lr_schedule: Literal["constant", "poly", "step"] = "constant"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    beta_max: Annotated[float, Field(ge=0)] = 1.0
    ramp_iterations: Annotated[Whole, Field(gt=0)] = 6_000
    check_from: Annotated[Whole, Field(gt=0)] = 800
    check_every: Annotated[Whole, Field(gt=0)] = 200
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: Annotated[Whole, Field(gt=0, le=4096)] = 1

    @field_validator("patch")
    @classmethod
    def divisible(cls, patch: Sides) -> Sides:
        """The encoder halves each side four times."""
        if any(side % STRIDE for side in patch):
            raise ValueError(f"every side of the patch must be divisible by {STRIDE}, not {patch}")
        return patch

    def is_check(self, iteration: int) -> bool:
        """Whether the published protocol measures Dice after this iteration."""
        return iteration >= self.check_from and iteration % self.check_every == 0


class RunEntry(Model):
    """A line of a study's `runs`: a method with settings of its own, at one or more numbers of labelled cases.

    Attributes:
        variant: what tells this line from others of the same method ("mlrpl", "control", …).
        method: a key of `mlrpl.methods.METHODS`, or "module:Class" for one's own.
        title: as tables and legends print it; what ends in a condition in brackets, "V-Net (instance norm)", is
            compared with the MLRPL that ends alike, where there is one.
        labelled: numbers of labelled cases.
        seeds: instead of the study's.
        settings: instead of the study's, any of `Settings`.
        options: the method's own (the keyword arguments of its class).
    """

    variant: Slug
    method: str
    title: str
    labelled: Numbers
    seeds: Seeds | None = None
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}


class PaperFigure(Model):
    """A published figure to print beside ours: Dice in percent, 95HD in voxels."""

    title: str
    labelled: int
    dice: float
    hd95: float | None = None


class Variant(Model):
    """One choice of an ablation: what it changes, and the paper's figure for it.

    Attributes:
        variant: what tells it from the ablation's others.
        title: as tables and figures print it.
        settings: see `RunEntry`.
        options: see `RunEntry`.
        paper: published Dice in percent, or what else is published, as a few words.
    """

    variant: Slug
    title: str
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    paper: float | str | None = None


class Ablation(Model):
    """Variants of MLRPL that differ in one thing; the one that changes nothing is the reference.

    Runs that coincide with others, here or among the study's `runs`, are trained once.

    Attributes:
        name: of its tables and figures.
        title: headline.
        axis: what is varied.
        about: Markdown for the reader.
        paper_on: the data of the paper's figures.
        labelled: numbers of labelled cases.
        seeds: instead of the study's.
        settings: instead of the study's, of all variants, the reference too.
        variants: in the order of tables and figures.
    """

    name: Slug
    title: str
    axis: str
    about: str = ""
    paper_on: str = ""
    labelled: Numbers
    seeds: Seeds | None = None
    settings: dict[str, Any] = {}
    variants: Annotated[tuple[Variant, ...], Field(min_length=2)]

    @field_validator("variants")
    @classmethod
    def one_reference(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        """Differences need something to differ from."""
        unchanged = [v.variant for v in variants if not v.settings and not v.options]
        if len(unchanged) != 1:
            raise ValueError(f"one variant must change nothing (no settings, no options), not {len(unchanged)}")
        return variants

    @field_validator("variants")
    @classmethod
    def told_apart(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        """By their titles, which are the rows of the ablation's table."""
        titles = [v.title for v in variants]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(f"two variants have the title {twice[0]!r}: its table could not tell them apart")
        return variants

    def entries(self) -> Iterator[RunEntry]:
        """The lines that it adds to the study's runs."""
        for v in self.variants:
            yield RunEntry(
                variant=f"{self.name}-{v.variant}",
                method="mlrpl",
                title=f"{self.title}: {v.title}",
                labelled=self.labelled,
                seeds=self.seeds,
                settings={**self.settings, **v.settings},
                options=v.options,
            )


REFERENCE = "MLRPL"  # the title of what all others are compared with, where a study names no other
ADDED_LATER = ("normalisation", "head_dropout")  # not in a key at their defaults: earlier results keep theirs


class Audit(Model):
    """That a study measures its pseudo-labels during training (`mlrpl.audit`).

    An audit observes only, so it is not part of a run's key: a finished run is not run again for one.

    Attributes:
        every: iterations from one audit to the next.
        variants: of the study's lines; their methods need two decoders or more.
    """

    every: Annotated[int, Field(gt=0)]
    variants: Annotated[tuple[Slug, ...], Field(min_length=1)] = ("mlrpl",)


class Run(Model):
    """One training: everything resolved.

    `audit_every` (0: never) and `ablation` (the one that it belongs to) change no result and are not part of the key.
    """

    study: str
    variant: str
    method: str
    title: str
    labelled: int
    seed: int
    settings: Settings
    options: dict[str, Any] = {}
    fold: int | None = None  # of a cross-validation; the data's fingerprint tells folds apart in the key
    audit_every: Annotated[int, Field(ge=0)] = 0
    ablation: str = ""

    @property
    def name(self) -> str:
        """See `mlrpl.rows.run_name`."""
        return run_name(self.variant, self.labelled, self.seed, self.fold)

    def key(
        self,
        fingerprint: str,
        result_version: int | str,
        defaults: dict[str, Any],
        unused: Collection[str] = (),
        unseen_classes: int = 0,
    ) -> str:
        """16 hexadecimal digits that change when, and only when, the result may.

        Args:
            fingerprint: of the data (`Store.fingerprint`).
            result_version: of the method's code.
            defaults: the method's option defaults, so that spelling a default out is no change.
            unused: settings that the method never reads.
            unseen_classes: that no label has (`Store.unseen_classes`).
        """
        usual = {name for name in ADDED_LATER if getattr(self.settings, name) == Settings.model_fields[name].default}
        settings = self.settings.model_dump(mode="json", exclude=usual | set(unused))
        content = {
            "method": self.method,
            "labelled": self.labelled,
            "seed": self.seed,
            "settings": settings,
            "options": {**defaults, **self.options},
            "data": fingerprint,
            "result_version": result_version,
            **({"unseen_classes": unseen_classes} if unseen_classes else {}),
        }
        text = json.dumps(content, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Study(Model):
    """A study file. See `mlrpl/studies/*.yaml` for examples.

    Attributes:
        name: also the name of its folder under `runs/` and `results/`.
        title: headline of its report.
        about: Markdown, what the reader of the report must know.
        dataset: the volumes.
        distances: "mm" where spacing is real, "voxels" as published.
        folds: of a cross-validation over the labelled training cases, for a data set without test cases; 0: none.
        settings: what all runs share.
        seeds: of the runs that do not name their own.
        runs: in order of importance: the first seed of all lines runs before the second of any.
        paper: published figures.
        reference: variant that the statistics compare all others with; by default what has the title "MLRPL".
        audit: which runs are audited, and how often; None for none.
        ablations: their runs come after the study's own of the same seed.
        ablations_of: a study whose committed ablations the report shows in their place.
    """

    name: Slug
    title: str
    about: str = ""
    dataset: Dataset
    distances: Literal["voxels", "mm"] = "voxels"
    folds: Literal[0] | Annotated[int, Field(ge=2)] = 0
    settings: Settings = Settings()
    seeds: Seeds = (0,)
    entries: tuple[RunEntry, ...] = Field(alias="runs", min_length=1)
    paper: tuple[PaperFigure, ...] = ()
    reference: Slug | None = None
    audit: Audit | None = None
    ablations: tuple[Ablation, ...] = ()
    ablations_of: Slug | None = None

    @model_validator(mode="after")
    def names_variants_that_it_has(self) -> "Study":
        """A misspelt variant would never be audited or compared with, and nobody would notice."""
        known = [entry.variant for entry in self.entries]
        named = [("audit", variant) for variant in (self.audit.variants if self.audit else ())]
        named += [("reference", self.reference)] if self.reference else []
        for where, variant in named:
            if variant not in known:
                raise ValueError(f"{where}: no line of runs has the variant {variant!r}: choose of {', '.join(known)}")
        if len({entry.title for entry in self.entries if entry.variant == self.reference}) > 1:
            raise ValueError(f"reference: the lines of {self.reference!r} have several titles; give them one")
        return self

    @property
    def reference_title(self) -> str:
        """The title of what all others are compared with."""
        return next((entry.title for entry in self.entries if entry.variant == self.reference), REFERENCE)

    def runs(self) -> Iterator[Run]:
        """All runs, seed by seed.

        Raises:
            StudyError: where a line's own settings are wrong.
        """
        lines = [(entry, "") for entry in self.entries]
        lines += [(entry, ablation.name) for ablation in self.ablations for entry in ablation.entries()]
        seeds = sorted({seed for entry, _ in lines for seed in entry.seeds or self.seeds})
        for seed in seeds:
            for entry, ablation in lines:
                if seed not in (entry.seeds or self.seeds):
                    continue
                settings = validated(
                    Settings, {**self.settings.model_dump(), **entry.settings}, f"study {self.name}, {entry.variant}"
                )
                if any(step > side for step, side in zip(settings.stride, settings.patch, strict=True)):
                    raise StudyError(
                        f"study {self.name}, {entry.variant}: windows of {settings.patch} voxels at a stride of "
                        f"{settings.stride} leave gaps; no side of the stride may be longer than the patch's"
                    )
                folds = range(self.folds) if self.folds else (None,)
                for labelled, fold in product(entry.labelled, folds):
                    yield Run(
                        study=self.name,
                        variant=entry.variant,
                        method=entry.method,
                        title=entry.title,
                        labelled=labelled,
                        seed=seed,
                        settings=settings,
                        options=entry.options,
                        fold=fold,
                        audit_every=self.audit.every if self.audit and entry.variant in self.audit.variants else 0,
                        ablation=ablation,
                    )


class _Loader(yaml.SafeLoader):
    """SafeLoader that takes no key twice: the first of them would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def validated(model: type[M], content: Any, where: str) -> M:
    """Settings from what was written.

    Args:
        model: what they should be.
        content: as YAML gives it.
        where: the place where it stands, for the message.

    Raises:
        StudyError: names the first setting that is wrong, and for one that does not exist the nearest that does.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first, *others = error.errors()
        place = ".".join(str(part) for part in first["loc"]) or "settings"
        said = first["msg"]
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), _names(model), 1)
            said = f"there is no such setting{f', did you mean {near[0]}?' if near else ''}"
            if model is Settings or first["loc"][0] == "runs":
                said = f"{said.removesuffix('?')}, or is it an option of the method? These stand under options"
        more = f" (and {len(others)} more)" if others else ""
        raise StudyError(f"{where}: {place}: {said}{more}") from None


def _names(kind: Any) -> set[str]:
    """Names of all settings in a model, or in the models that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, Model):
        fields = kind.model_fields
        inside = (_names(field.annotation) for field in fields.values())
        return {field.alias or name for name, field in fields.items()}.union(*inside)
    return set().union(*map(_names, get_args(kind)))


def study_file(name: str) -> Path:
    """Where `load_study` looks for that study; the file need not be there."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    places = (STUDIES / f"{name}.yaml", Path(f"{name}.yaml"))
    return next((place for place in places if place.is_file()), places[0])


def is_packaged(name: str) -> bool:
    """Whether `load_study` finds that study in the package."""
    return study_file(name).resolve().parent == STUDIES.resolve()


def study_names() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def _bounded_yaml(file: Path) -> Any:
    """A file's content; a few lines with aliases of aliases can stand for more than any memory holds."""
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise StudyError(f"study file {file.name}: larger than {MOST_BYTES} bytes, so it is no study")
        content = yaml.load(text.decode("utf-8"), _Loader)
        _count(content)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # ValueError: also odd dates and bytes
        reason = " ".join(str(error).split())[:300]
        raise StudyError(f"study file {file.name}: not valid YAML: {reason}") from None
    return content


def _count(content: Any, left: int = MOST_VALUES, depth: int = 0) -> int:
    """How many values may still follow; ValueError for too many, or too deep ones."""
    if left <= 0 or depth > MOST_DEPTH:
        raise ValueError(f"more than {MOST_VALUES} values, or nested deeper than {MOST_DEPTH}")
    inner = [*content, *content.values()] if isinstance(content, dict) else content
    for value in inner if isinstance(inner, list | tuple | set) else ():
        left = _count(value, left, depth + 1)
    return left - 1


def load_study(name: str) -> Study:
    """Read a study by name (the package's, else <name>.yaml of the working folder), or from a path that ends in .yaml.

    Modules beside such a file can be imported from then on: methods of one's own may lie there.

    Raises:
        StudyError: for an unknown name, a file that is no YAML, or settings that are wrong.
    """
    file = study_file(name)
    if not file.is_file():
        raise StudyError(
            f"no study {name!r}: choose one of {', '.join(study_names())}, or give the path of a .yaml file"
        )
    own_code.look_in(file.resolve().parent)
    content = _bounded_yaml(file)
    study = validated(Study, content, f"study file {file.name}")
    names = [run.name for run in study.runs()]
    if twice := {n for n in names if names.count(n) > 1}:
        raise StudyError(f"study {study.name}: two runs are named {sorted(twice)[0]}: give them different variants")
    titles: dict[tuple[str, int], str] = {}
    variants: dict[tuple[str, int], tuple[Any, ...]] = {}
    for run in study.runs():
        trained = (run.method, run.options, run.settings, run.title)
        if variants.setdefault((run.variant, run.labelled), trained) != trained:
            raise StudyError(
                f"study {study.name}: {run.variant} with {run.labelled} labelled stands for two trainings or titles, "
                "which tables would take for seeds of one: give them different variants"
            )
        if not run.ablation and titles.setdefault((run.title, run.labelled), run.variant) != run.variant:
            raise StudyError(
                f"study {study.name}: {run.variant} and {titles[run.title, run.labelled]} have one title, "
                f"{run.title!r}: tables could not tell them apart"
            )
    return study
