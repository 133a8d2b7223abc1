"""Studies: what is wrong is named in one line, and a run's key changes when its result may."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from mlrpl.config import Run, Settings, Study, load_study, study_names
from mlrpl.errors import StudyError
from mlrpl.methods import METHODS, Method, build, find_method

STUDY = {
    "name": "small",
    "title": "A small study",
    "dataset": {"name": "drawn", "source": "phantom"},
    "settings": {"patch": [32, 32, 16], "iterations": 10},
    "runs": [
        {"variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": [2, 4]},
        {"variant": "vnet", "method": "vnet", "title": "V-Net", "labelled": 2},
    ],
}


@pytest.fixture
def written(tmp_path):
    """Write a study file, with changes, and return its path."""

    def write(text: str | None = None, **changes) -> str:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **changes}) if text is None else text, encoding="utf-8")
        return str(path)

    return write


def complaint(path: str) -> str:
    with pytest.raises(StudyError) as error:
        load_study(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", study_names())
def test_packaged_study_loads_and_its_methods_exist(name):
    study = load_study(name)
    assert study.name == name
    runs = list(study.runs())
    assert runs
    for run in runs:
        assert find_method(run.method)
        build(run.model_copy(update={"settings": Settings(filters=1)}), 1, 2)  # its options are right


def test_the_designs_studies_are_packaged():
    assert {"smoke", "phantom", "hippocampus", "la-half", "la", "pancreas", "brats"} <= set(study_names())


def test_the_papers_settings_are_the_defaults():
    """la leaves all that is published to the defaults: a default that drifts would change it unseen."""
    settings = load_study("la").settings
    assert (settings.patch, settings.stride, settings.filters) == ((112, 112, 80), (18, 18, 4), 16)
    assert (settings.iterations, settings.batch) == (15_000, (2, 2))
    assert (settings.learning_rate, settings.lr_schedule) == (0.01, "constant")
    assert (settings.momentum, settings.weight_decay) == (0.9, 1e-4)
    assert (settings.beta_max, settings.ramp_iterations) == (1, 6000)
    checks = [k for k in range(1, 15_001) if settings.is_check(k)]
    assert checks == list(range(800, 15_001, 200))
    assert settings.augmentation == ("rot90", "flip")


def test_runs_come_seed_by_seed_in_the_studys_order(written):
    study = load_study(written(seeds=[0, 1], runs=[
        *STUDY["runs"], {"variant": "upper", "method": "vnet", "title": "V-Net", "labelled": 9, "seeds": 1},
    ]))  # fmt: skip
    assert [run.name for run in study.runs()] == [
        "mlrpl-2-s0", "mlrpl-4-s0", "vnet-2-s0", "mlrpl-2-s1", "mlrpl-4-s1", "vnet-2-s1", "upper-9-s1",
    ]  # fmt: skip


def test_one_number_stands_for_a_list_of_one(written):
    variants = [{"variant": "wr", "title": "WR"}, {"variant": "all", "title": "All", "options": {"selection": "all"}}]
    ablation = {"name": "parts", "title": "Parts", "axis": "part", "labelled": 3, "seeds": 5, "variants": variants}
    study = load_study(written(seeds=2, ablations=[ablation]))
    assert study.seeds == (2,)
    assert [entry.labelled for entry in study.entries] == [(2, 4), (2,)]
    assert (study.ablations[0].labelled, study.ablations[0].seeds) == ((3,), (5,))
    assert "seeds.0: Input should be greater than or equal to 0" in complaint(written(seeds=-1))
    line = {**RUNS[0], "seeds": [0, -1]}
    assert "runs.0.seeds.1: Input should be greater than or equal to 0" in complaint(written(runs=[line]))


def test_a_lines_own_settings_replace_the_studys(written):
    entry = {"variant": "control", "method": "mlrpl", "title": "Control", "labelled": 2, "settings": {"beta_max": 0}}
    mlrpl, _, vnet, control = load_study(written(runs=[*STUDY["runs"], entry])).runs()
    assert (mlrpl.settings.beta_max, vnet.settings.beta_max, control.settings.beta_max) == (1, 1, 0)
    assert control.settings == mlrpl.settings.model_copy(update={"beta_max": 0.0})


def test_a_study_names_the_variant_that_others_are_compared_with(written):
    assert load_study(written()).reference_title == "MLRPL"
    assert load_study(written(reference="vnet")).reference_title == "V-Net"
    with pytest.raises(StudyError, match="reference: no line of runs has the variant 'vnt'"):
        load_study(written(reference="vnt"))
    other = {"variant": "vnet", "method": "vnet", "title": "V-Net, all", "labelled": 9}
    with pytest.raises(StudyError, match="reference: the lines of 'vnet' have several titles"):
        load_study(written(reference="vnet", runs=[*STUDY["runs"], other]))


def test_an_unknown_study_is_answered_with_the_known_ones():
    message = complaint("hippocampus2")
    assert "'hippocampus2'" in message
    assert all(name in message for name in study_names())
    assert "nowhere.yaml" in complaint("nowhere.yaml")


RUNS = STUDY["runs"]


@pytest.mark.parametrize(("changes", "expected"), [
    ({"settings": {"iteration": 10}}, "settings.iteration: there is no such setting, did you mean iterations?"),
    ({"settings": {"iterations": "many"}}, "settings.iterations: Input should be a valid integer"),
    ({"settings": {"iterations": 0}}, "settings.iterations: Input should be greater than 0"),
    ({"settings": {"patch": [32, 32]}}, "settings.patch"),
    ({"settings": {"patch": [32, 24, 16]}}, "settings.patch: Value error, every side of the patch must be divisible"),
    ({"settings": {"augmentation": ["zoom"]}}, "settings.augmentation.0"),
    ({"settings": {"precision": "half"}}, "settings.precision"),
    ({"settings": {"momentum": ".9x"}}, "settings.momentum"),
    ({"settings": {"momentum": 1}}, "settings.momentum: Input should be less than 1"),
    ({"settings": {"weight_decay": -1}}, "settings.weight_decay: Input should be greater than or equal to 0"),
    ({"ablations": [{"name": "a", "title": "A", "axis": "a", "labelled": 2, "variants": [
        {"variant": "a", "title": "Same"}, {"variant": "b", "title": "Same", "options": {"gamma": 1}},
    ]}]}, "ablations.0.variants: Value error, two variants have the title 'Same'"),
    ({"title": None}, "title: Input should be a valid string"),
    ({"name": "no spaces please"}, "name: String should match pattern"),
    ({"colour": "blue"}, "colour: there is no such setting"),
    ({"dataset": {"name": "drawn"}}, "dataset.source: Field required"),
    ({"dataset": {"name": "drawn", "source": "phantom", "step": 0}}, "dataset.step"),
    ({"distances": "inches"}, "distances: Input should be 'voxels' or 'mm'"),
    ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0"),
    ({"runs": []}, "runs: Tuple should have at least 1 item"),
    ({"runs": [{**RUNS[0], "labelled": []}]}, "runs.0.labelled: Tuple should have at least 1 item"),
    ({"runs": [{**RUNS[0], "labelled": 0}]}, "runs.0.labelled.0: Input should be greater than 0"),
    ({"run": []}, "run: there is no such setting, did you mean runs?"),
    ({"runs": [{**RUNS[0], "setting": {}}]}, "runs.0.setting: there is no such setting, did you mean settings, or"),
    ({"runs": [{**RUNS[0], "settings": {"beta": 1}}]}, "mlrpl: beta: there is no such setting, did you mean beta_max"),
    ({"runs": [{**RUNS[0], "weight": 1}]}, "weight_decay, or is it an option of the method? These stand under options"),
    ({"settings": {"iterations": 3.0}}, "settings.iterations: Input should be a valid integer"),
    ({"settings": {"patch": [16, 16, 16], "stride": [8, 8, 32]}}, "at a stride of (8, 8, 32) leave gaps"),
    ({"runs": [{**RUNS[0], "settings": {"patch": [20, 32, 16]}}]}, "small, mlrpl: patch: Value error, every side"),
    ({"paper": [{"title": "MLRPL", "labelled": 8}]}, "paper.0.dice: Field required"),
], ids=lambda value: None if isinstance(value, dict) else value.split(":")[0])  # fmt: skip
def test_a_wrong_setting_is_named_in_one_line(written, changes, expected):
    message = complaint(written(**changes))
    assert expected in message
    assert "small" in message


def test_the_first_of_several_problems_is_named_and_the_others_counted(written):
    message = complaint(written(settings={"iterations": "many", "filters": -1, "colour": 1}))
    assert "settings.filters" in message
    assert message.endswith("(and 2 more)")


def test_two_runs_of_one_name_are_refused(written):
    assert "two runs are named mlrpl-4-s0" in complaint(written(runs=[*RUNS, {**RUNS[0], "labelled": 4}]))
    assert "two runs are named mlrpl-2-s0" in complaint(written(runs=[{**RUNS[0], "labelled": [2, 2]}]))


@pytest.mark.parametrize("other", [{"settings": {"beta_max": 0}}, {"options": {"gamma": 1}}, {"title": "Another"}])
def test_a_variant_is_one_training_whatever_the_seed(written, other):
    """A line copied for a further seed without its settings would be averaged with what it is not."""
    first = {"variant": "mine", "method": "mlrpl", "title": "Mine", "labelled": 2}
    second = {**first, "seeds": [1]}
    assert "mine with 2 labelled stands for two trainings or titles" in complaint(
        written(runs=[first, {**second, **other}])
    )
    names = [run.name for run in load_study(written(runs=[first, second])).runs()]
    assert names == ["mine-2-s0", "mine-2-s1"]


@pytest.mark.parametrize("text", ["name: [unclosed", "a: b: c", "\tname: x", ""], ids=range(4))
def test_a_file_that_is_no_study_is_named(written, text):
    message = complaint(written(text))
    assert message.startswith("study file small.yaml: ")


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "study.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert complaint(str(tmp_path / "study.yaml")).startswith("study file study.yaml: ")


def test_a_relative_path_is_read_from_where_the_command_is_typed(written, tmp_path, monkeypatch):
    written()
    monkeypatch.chdir(tmp_path)
    assert load_study("small.yaml").title == "A small study"


# Keys.


def example(**changes) -> Run:
    settings = Settings.model_validate({"iterations": 10, **changes.pop("settings", {})})
    content = {"study": "small", "variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 2, "seed": 0}
    return Run.model_validate({**content, "settings": settings, **changes})


def key(run: Run, fingerprint: str = "0123456789abcdef", version: int = 1) -> str:
    method = find_method(run.method)
    return run.key(fingerprint, version, method.options(), method.unused_settings)


def test_a_key_is_sixteen_hexadecimal_digits_and_always_the_same():
    assert len(key(example())) == 16
    int(key(example()), 16)
    assert key(example()) == key(example())


OTHER = {
    "patch": (64, 64, 64), "stride": (9, 9, 9), "augmentation": (), "filters": 8, "normalisation": "instance",
    "head_dropout": False,
    "iterations": 11, "batch": (1, 2),
    "learning_rate": 0.1, "lr_schedule": "poly", "momentum": 0.8, "weight_decay": 0.0, "beta_max": 0.5,
    "ramp_iterations": 300, "check_from": 5, "check_every": 5, "precision": "float32", "threads": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_in_the_key(name):
    assert key(example(settings={name: OTHER[name]})) != key(example())


def test_settings_added_later_leave_the_keys_of_before_alone():
    """Committed results would otherwise not be adopted; this key was computed before any of them."""
    assert key(example()) == "0c17c412d7dd622f"


@pytest.mark.parametrize("name", METHODS)
def test_settings_that_a_method_never_reads_are_not_in_its_key(name):
    """Whether it reads them is test_training's question."""
    unused = find_method(name).unused_settings
    assert unused <= Settings.model_fields.keys()
    for setting in Settings.model_fields:
        changed = example(method=name, settings={setting: OTHER[setting]})
        assert (key(changed) == key(example(method=name))) == (setting in unused), setting


@pytest.mark.parametrize("changes", [
    {"method": "vnet"}, {"labelled": 3}, {"seed": 1}, {"options": {"gamma": 0.1}}, {"options": {"selection": "all"}},
], ids=str)  # fmt: skip
def test_what_else_a_result_depends_on_is_in_the_key(changes):
    assert key(example(**changes)) != key(example())


def test_data_and_code_version_are_in_the_key():
    assert key(example(), fingerprint="fedcba9876543210") != key(example())
    assert key(example(), version=2) != key(example())


@pytest.mark.parametrize("changes", [{"title": "Ours"}, {"variant": "ours"}, {"study": "other"}], ids=str)
def test_names_for_people_are_not_in_the_key(changes):
    assert key(example(**changes)) == key(example())


def test_a_spelled_out_default_is_no_change():
    defaults = Settings(iterations=10).model_dump()
    assert key(example(settings=defaults)) == key(example())
    assert key(example(settings={"beta_max": 1, "patch": [112, 112, 80]})) == key(example())
    options = {"gamma": 0.5, "selection": "wr", "upsamplings": ["deconv", "nearest"]}
    assert key(example(options=options)) == key(example())


def test_a_study_knows_its_settings_by_their_values():
    """The same study written twice, once with defaults spelled out, is the same runs."""
    spelled = {**STUDY, "settings": Settings.model_validate(STUDY["settings"]).model_dump(mode="json"), "seeds": [0]}
    first, second = (list(Study.model_validate(content).runs()) for content in (STUDY, spelled))
    assert first == second


# Methods by name.


@pytest.mark.parametrize(("name", "expected"), [
    ("unet", "no method 'unet': choose one of vnet, "),
    ("nowhere_to_be_found:Mine", "method 'nowhere_to_be_found:Mine': No module named"),
    ("entropy.py:Mine", "; write entropy:Mine"),
    ("mlrpl.config:Nothing", "method 'mlrpl.config:Nothing'"),
    ("mlrpl.config:Settings", "method 'mlrpl.config:Settings': Settings is no class that extends mlrpl.methods.Method"),
    ("mlrpl.methods", "no method 'mlrpl.methods'"),
])  # fmt: skip
def test_an_unknown_method_is_answered_in_one_line(name, expected):
    with pytest.raises(StudyError) as error:
        find_method(name)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_method_of_ones_own_is_found_beside_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path(tmp_path / "beside_the_study.py").write_text(
        "from mlrpl.methods.vnet import SupervisedVNet as Mine\n", encoding="utf-8"
    )
    own = {"variant": "mine", "method": "beside_the_study:Mine", "title": "Mine", "labelled": 1}
    Path(tmp_path / "own.yaml").write_text(json.dumps({**STUDY, "runs": [own]}), encoding="utf-8")
    (run, *_) = load_study(str(tmp_path / "own.yaml")).runs()
    assert find_method(run.method) is METHODS["vnet"]


def test_a_method_of_ones_own_is_found_by_module_and_class(tmp_path, monkeypatch):
    Path(tmp_path / "my_own_method.py").write_text(
        "from mlrpl.methods import Method\nclass Mine(Method):\n    result_version = 7\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = find_method("my_own_method:Mine")
    assert issubclass(found, Method)
    assert found.result_version == 7


@pytest.mark.parametrize(("options", "expected"), [
    ({"gama": 0.3}, "run mlrpl-2-s0: mlrpl has no option 'gama' (it has: gamma, selection"),
    ({"upsamplings": ["deconv", "cubic"]}, "run mlrpl-2-s0: unknown up-sampling 'cubic'"),
    ({"selection": "best"}, "run mlrpl-2-s0: unknown selection 'best'"),
    ({"weighting": "best"}, "run mlrpl-2-s0: unknown weighting 'best'"),
    ({"selection": "threshold"}, "run mlrpl-2-s0: selection \"threshold\" needs a threshold"),
    ({"threshold": 0.9}, "run mlrpl-2-s0: threshold is read by selection \"threshold\" alone, not by \"wr\""),
    ({"upsamplings": []}, "run mlrpl-2-s0: upsamplings must name a decoder"),
    ({"gamma": "0.5"}, "run mlrpl-2-s0: gamma of mlrpl must be a number, not '0.5'"),
    ({"gamma": True}, "run mlrpl-2-s0: gamma of mlrpl must be a number, not True"),
    ({"weighting": 1}, "run mlrpl-2-s0: weighting of mlrpl must be text, not 1"),
])  # fmt: skip
def test_a_wrong_option_is_named_before_anything_is_trained(options, expected):
    with pytest.raises(StudyError) as error:
        build(example(options=options, settings={"filters": 1}), 1, 2)
    assert expected in str(error.value)


def test_one_decoder_offers_neither_a_mean_nor_a_disagreement():
    one = build(example(options={"upsamplings": ["deconv"]}, settings={"filters": 1}), 1, 2)
    two = build(example(settings={"filters": 1}), 1, 2)
    assert (one.outputs, two.outputs) == (("decoder1",), ("decoder1", "mean"))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "s.yaml").write_text("name: s\ntitle: S\nsettings: {filters: 2, filters: 4}\n")
    with pytest.raises(StudyError, match="not valid YAML: filters stands twice"):
        load_study(str(tmp_path / "s.yaml"))
