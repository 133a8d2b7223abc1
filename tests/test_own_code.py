"""Methods of one's own: which file is found, what of it the key holds, and what is said of what is wrong with it."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mlrpl import own_code
from mlrpl.config import Run, Settings, load_study
from mlrpl.data import Batch
from mlrpl.errors import StudyError
from mlrpl.execution import own_line
from mlrpl.methods import METHODS, Method, Step, build, find_method, result_version
from mlrpl.methods.mlrpl import MLRPL
from mlrpl.optimisation import make_optimizer, optimise
from mlrpl.precision import Precision, worst_layer

HEAD = "from mlrpl.methods.mlrpl import MLRPL\n"
CPU = torch.device("cpu")
PATCH = (32, 16, 16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a study's file; modules, paths and folders are as before afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(own_code, "folders", [])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    own_code._text.cache_clear()
    own_code.look_in(tmp_path)
    return tmp_path


def write(folder: Path, module: str, text: str) -> None:
    (folder / f"{module}.py").write_text(text, encoding="utf-8")


def version_of(folder: Path, text: str, module: str = "mine") -> object:
    """The version of class Mine as another process would find it."""
    sys.modules.pop(module, None)
    own_code._text.cache_clear()
    write(folder, module, text)
    return result_version(find_method(f"{module}:Mine"))


def run_of(method: str, **settings: object) -> Run:
    chosen = Settings(**{"patch": PATCH, "filters": 2, "iterations": 10, **settings})
    return Run(study="t", variant="t", method=method, title="t", labelled=1, seed=0, settings=chosen)


# Which file


def test_the_module_beside_the_study_comes_before_any_other_of_its_name(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("working")
    write(other, "meth", HEAD + "class Mine(MLRPL):\n    where = 'working folder'\n")
    write(folder, "meth", HEAD + "class Mine(MLRPL):\n    where = 'beside the study'\n")
    monkeypatch.syspath_prepend(other)  # as `python -m mlrpl` does
    assert find_method("meth:Mine").where == "beside the study"


def test_a_name_that_a_library_has_does_not_hide_ones_own_module(folder):
    write(folder, "copy", HEAD + "class Mine(MLRPL):\n    pass\n")
    assert find_method("copy:Mine").__mro__[1] is MLRPL
    assert find_method("copy:Mine") is find_method("copy:Mine")
    assert sys.modules["copy"] is copy


def test_a_package_beside_the_study_is_found_too(folder):
    (folder / "ours").mkdir()
    write(folder / "ours", "meth", HEAD + "class Mine(MLRPL):\n    pass\n")
    assert find_method("ours.meth:Mine").__mro__[1] is MLRPL


# What of it the key holds


def test_an_edited_method_has_another_version_and_a_comment_is_no_edit(folder):
    text = HEAD + "class Mine(MLRPL):\n    factor = 1.0\n"
    first = version_of(folder, text)
    assert version_of(folder, text) == first
    assert version_of(folder, HEAD + "\n# why\nclass Mine(MLRPL):  # ours\n\n    factor = 1.0\n") == first
    assert version_of(folder, text.replace("1.0", "1.5")) != first
    assert version_of(folder, text.replace("1.0", "'1.0 # no comment'")) != first
    odd = HEAD + "class Mine(MLRPL):\n    s = 'a\x0cb'\n    factor = 1\n    # a comment\n"
    assert version_of(folder, odd) != version_of(folder, odd.replace("factor = 1", "factor = 2"))


@pytest.mark.parametrize("imports", [
    "from helper import FACTOR",
    "import helper",
    "import sub.helper",
    "from sub import helper",
    "from sub.deeper.helper import FACTOR",
    "def late():\n    from helper import FACTOR\n",
])  # fmt: skip
def test_what_a_method_imports_from_beside_the_study_counts_too(folder, imports):
    text = f"{HEAD}{imports}\nclass Mine(MLRPL):\n    pass\n"
    versions = []
    for factor in (1, 2):
        for place in (folder, folder / "sub", folder / "sub/deeper"):
            place.mkdir(exist_ok=True)
            write(place, "helper", f"FACTOR = {factor}\n")
        for module in [name for name in sys.modules if name.partition(".")[0] in ("helper", "sub")]:
            del sys.modules[module]
        versions.append(version_of(folder, text))
    assert versions[0] != versions[1]


def test_a_helper_beside_the_study_comes_before_another_of_its_name(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("working")
    write(other, "helper", "WHERE = 'working folder'\n")
    write(folder, "helper", "WHERE = 'beside the study'\n")
    write(folder, "mine", HEAD + "from helper import WHERE\nclass Mine(MLRPL):\n    where = WHERE\n")
    monkeypatch.syspath_prepend(other)  # as `python -m mlrpl` does
    own_code.look_in(folder)  # when the study is read
    assert find_method("mine:Mine").where == "beside the study"


def test_the_code_is_told_as_it_was_imported(folder):
    text = HEAD + "import helper\nclass Mine(MLRPL):\n    pass\n"
    write(folder, "helper", "x = 1\n")
    write(folder, "mine", text)
    method = find_method("mine:Mine")
    first = result_version(method)
    write(folder, "mine", "")
    (folder / "helper.py").unlink()
    assert own_code.texts(method) == {Path("helper.py"): "x = 1\n", Path("mine.py"): text}
    assert result_version(method) == first


def test_a_new_version_of_the_method_that_it_extends_counts_too(folder, monkeypatch):
    text = HEAD + "class Mine(MLRPL):\n    pass\n"
    first = version_of(folder, text)
    monkeypatch.setattr(MLRPL, "result_version", 99)
    assert version_of(folder, text) != first


def test_the_packages_methods_and_those_that_say_so_have_their_own_number(folder):
    assert {name: result_version(method) for name, method in METHODS.items()} == dict.fromkeys(METHODS, 1)
    assert version_of(folder, HEAD + "class Mine(MLRPL):\n    result_version = 7\n") == 7


# What a subclass takes over


class Mine(MLRPL):
    def __init__(self, settings, in_channels, num_classes, margin: float = 0.1, **options):
        super().__init__(settings, in_channels, num_classes, **options)
        self.margin = margin
        self.mutual_loss = lambda logits, features, **_: logits[0].mean() * 0 + 3


def test_options_that_are_handed_on_are_options():
    assert Mine.options() == {"margin": 0.1, **MLRPL.options()}


def test_compiled_a_subclass_keeps_its_own_mutual_loss():
    method = Mine(run_of("mlrpl").settings, 1, 2)
    method.compile_parts(backend="eager")
    logits = [torch.zeros(1, 2, 4, 4, 4)] * 2
    assert float(method.mutual_loss(logits, logits, **method.reliability)) == 3


def test_a_method_is_titled_as_its_class_where_it_says_nothing_else():
    assert (MLRPL.title, METHODS["vnet"].title, Mine.title) == ("MLRPL", "V-Net", "Mine")


def test_what_a_method_says_of_replay_holds_for_no_other():
    assert MLRPL.replayable
    assert not Mine.replayable
    assert all(method.replayable for method in METHODS.values())


# What is said of what is wrong


@pytest.mark.parametrize(("text", "said"), [
    ("class Mine(\n", "method 'mine:Mine': SyntaxError: "),
    ("class Mine(Missing):\n    pass\n", "method 'mine:Mine': NameError: name 'Missing' is not defined"),
    (HEAD + "class Mine(MLRPL):\n    outputs = ('mean',)\n", "outputs of mine:Mine are mean: decoder1 must be among"),
    (HEAD + "class Mine(MLRPL):\n    outputs = ('decoder1', 'teacher')\n", "none but decoder1, mean"),
    (HEAD + "class Mine(MLRPL):\n    def __init__(self, *a):\n        self.absent\n", "mine:Mine: AttributeError: "),
    ("from mlrpl.methods import Method\nclass Mine(Method):\n    pass\n", "mine:Mine sets no self.network"),
    (HEAD + "class Mine(MLRPL):\n    terms = ('masked')\n", "terms of mine:Mine must be a tuple of names, as in"),
    (HEAD + "class Mine(MLRPL):\n    def __init__(self, *a):\n        super().__init__(*a)\n"
     "        self.more = [self.make_network(('deconv',))]\n", "self.more holds networks or parameters that nothing"),
    ("class Mine:\n    pass\n", "method 'mine:Mine': Mine is no class that extends mlrpl.methods.Method"),
    (HEAD + "class Mine(MLRPL):\n    def __init__(self, *a):\n        super().__init__(*a)\n        self.beta = 1\n",
     "mine:Mine sets self.beta, which hides Method.beta: give the attribute another name"),
    ("from mlrpl.methods import Method\nclass Mine(Method):\n    def __init__(self, *a):\n"
     "        super().__init__(*a)\n        self.network = self.make_network(('deconv',))\n",
     "mine:Mine has no loss(self, batch, step)"),
])  # fmt: skip
def test_a_method_that_cannot_be_built_is_told_in_one_line(folder, text, said):
    write(folder, "mine", text)
    with pytest.raises(StudyError) as error:
        build(run_of("mine:Mine"), 1, 2)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


class Wrong(Method):
    def __init__(self, settings, in_channels, num_classes, returned):
        super().__init__(settings, in_channels, num_classes)
        self.network = self.make_network(("deconv",))
        self.returned = returned

    def loss(self, batch, step):
        loss = self.network(batch.image)[0][0].mean()
        return self.returned(loss)


@pytest.mark.parametrize(("returned", "said"), [
    (lambda loss: loss, 'Wrong.loss must return a dict of terms with "total"; it returned Tensor'),
    (lambda loss: {"loss": loss, "dice": loss}, 'with "total"; it returned loss, dice'),
    (lambda loss: {"total": loss, "dice": 0.5}, "Wrong.loss: 'dice' is float, not a scalar tensor"),
    (lambda loss: {"total": loss[None]}, "Wrong.loss: 'total' is a tensor (1,), not a scalar tensor"),
])  # fmt: skip
def test_terms_that_are_none_are_told_in_one_line(returned, said):
    method = Wrong(run_of("vnet").settings, 1, 2, returned)
    batch = Batch(torch.randn(2, 1, *PATCH), torch.zeros(2, *PATCH, dtype=torch.long))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = Step(1, 10, torch.Generator())
    with pytest.raises(StudyError) as error:
        optimise(method, batch, step, make_optimizer(method), scaler, Precision("float32"))
    assert said in str(error.value)


def test_an_error_in_ones_own_file_is_told_with_its_line(folder):
    write(folder, "entropy", "x = 1\n")
    frames = [
        "\x1b[31mRuntimeError\x1b[39m   Traceback (most recent call last)",
        "\x1b[36mFile \x1b[39m\x1b[32m/env/lib/torch/nn/functional.py:7\x1b[39m, in one",
        f"\x1b[36mFile \x1b[39m\x1b[32m{folder}/entropy.py:27\x1b[39m, in loss(self)",
        "\x1b[36mFile \x1b[39m\x1b[32m/env/lib/torch/nn/functional.py:99\x1b[39m, in other",
    ]
    assert own_line(frames) == " (entropy.py, line 27)"
    assert own_line(frames[:2]) == ""


def test_one_title_for_two_variants_is_told_before_anything_is_trained(tmp_path):
    line = {"method": "vnet", "title": "Mine", "labelled": 1}
    study = {
        "name": "s", "title": "S", "dataset": {"name": "d", "source": "phantom"},
        "settings": {"patch": [16, 16, 16], "stride": [8, 8, 8]},
        "runs": [{"variant": "a", **line}, {"variant": "b", **line}],
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(json.dumps(study))
    with pytest.raises(StudyError, match="study s: b and a have one title, 'Mine'"):
        load_study(str(tmp_path / "s.yaml"))


# A network of one's own


def test_a_network_without_our_parts_has_its_precision_checked():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Conv3d(4, 2, 1), nn.Conv3d(2, 4, 3, padding=1)
            self.only_in_training = nn.Conv3d(4, 2, 1)

        def forward(self, image):
            return self.last(self.first(image))

    network = Plain()
    network.first.requires_grad_(False)
    error, _ = worst_layer(network, (16, 16, 16), 2, CPU, torch.bfloat16, channels=2)
    assert 1e-4 < error < 0.05
    assert not network.first.weight.requires_grad
    assert worst_layer(nn.Sequential(nn.PReLU()), (16, 16, 16), 2, CPU, torch.bfloat16) == (0.0, "")
