"""What a study file may say, and what is said about one that is wrong: file, key, way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.errors import StudyFileError
from tuner.metrics import METRICS
from tuner.sections import Floor
from tuner.study import LARGEST_GRID, StudyFile, load

SHIPPED = sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))
SECTIONS = {
    "top": 'name = "small"',
    "data": '[data]\nname = "digits"',
    "budget": "[budget]\ntrials = 4\nepochs = 2",
    "objective": "",
    "search": "",
    "ladder": "",
    "model": '[model]\nname = "mlp"',
    "parts": "",
    "loss": "[space.loss.cross_entropy]",
    "space": "[space.optimizer.sgd]\nlr = { low = 0.01, high = 0.1, log = true }",
}


def text_of(**sections: str) -> str:
    return "\n".join((SECTIONS | sections).values()) + "\n"


def read(folder: Path, **sections: str) -> StudyFile:
    path = folder / "mine.toml"
    path.write_text(text_of(**sections), encoding="utf-8")
    return load(path)


def complaint(folder: Path, **sections: str) -> str:
    """What is said about a wrong study file; every line begins with the file."""
    with pytest.raises(StudyFileError) as caught:
        read(folder, **sections)
    text = str(caught.value)
    for line in text.splitlines():
        assert line.startswith(f"{folder / 'mine.toml'}: ")
    assert "dictionary or an instance" not in text
    assert "value error" not in text.lower()
    return text.replace(f"{folder / 'mine.toml'}: ", "")


def searched(folder: Path, component: str, entry: str) -> str:
    """What is said about one entry of [space.<component>]."""
    part = component.partition(".")[0]
    dropped = {part: ""} if part in ("loss", "model") else {}
    return complaint(folder, **dropped, space=f"[space.{component}]\n{entry}")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_file_is_right(path: Path) -> None:
    study = load(path)
    assert study.trials() >= 2
    assert study.space.rows()


def test_study_file_is_read_with_all_its_sections(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        objective='[objective]\nmetric = "macro_f1"\nadjusted = false\nfloor = { drop = 0.1 }',
        search='[search]\nalgorithm = "random"\nseed = 3\ncontrol = 0.2',
        parts='[training]\nbatch_size = 16\n[augment]\nname = "standard"\nflip = false',
    )
    assert (study.name, study.trials(), study.budget.epochs) == ("small", 4, 2)
    assert study.objective.metric == "macro_f1"
    assert not study.objective.adjusted
    assert study.objective.floor is not None
    assert (study.objective.floor.metric, study.objective.floor.drop) == ("accuracy", 0.1)
    assert (study.search.algorithm, study.search.seed, study.search.control) == ("random", 3, 0.2)
    assert study.space.parts["training"]["single_stage"]["batch_size"].size() == 1


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_be_the_objective(tmp_path: Path, metric: str) -> None:
    assert read(tmp_path, objective=f'[objective]\nmetric = "{metric}"').objective.metric == metric


def test_a_part_may_be_fixed_to_any_component(tmp_path: Path) -> None:
    study = read(tmp_path, loss='[loss]\nname = "focal"\ngamma = 1')
    assert list(study.space.parts["loss"]) == ["focal"]
    assert dict(study.space.rows()) == {"optimizer.sgd.lr": "0.01 to 0.1, log"}


def test_floor_can_be_switched_off(tmp_path: Path) -> None:
    assert read(tmp_path, objective="[objective]\nfloor = false").objective.floor is None


@pytest.mark.parametrize(
    ("drop", "plain", "bound"),
    [
        (0.02, 0.8, 0.78),
        (0.02, 0.1, 0.08),
        (0.02, 0.05, 0.04),
        (0.02, 0.01, 0.008),
        (0.0, 0.05, 0.05),
        (0.5, 0.8, 0.4),
        (0.5, 0.04, 0.02),
        (1.0, 0.8, 0.0),
    ],
)
def test_floor_leaves_most_of_what_the_baseline_has(
    drop: float, plain: float, bound: float
) -> None:
    assert Floor(drop=drop).bound(plain) == pytest.approx(bound)


def test_floor_of_a_metric_to_minimise_lies_above_the_baseline() -> None:
    assert Floor(metric="ece", drop=0.02).bound(0.01) == pytest.approx(0.03)


def test_windows_line_ends_and_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    plain = read(tmp_path)
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + text_of().replace("\n", "\r\n").encode())
    assert load(path).digest() == plain.digest()
    assert load(path).text == plain.text


@pytest.mark.parametrize("name", ["Schwanzklassen-µ", "尾部类别", "with spaces", "x" * 100])
def test_names_may_be_in_any_script(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, top=f'name = "{name}"').name == name


def test_digest_follows_everything_but_the_number_of_trials(tmp_path: Path) -> None:
    study = read(tmp_path)
    more = read(tmp_path, budget="[budget]\ntrials = 99\nepochs = 2")
    commented = read(tmp_path, top='# a remark\nname="small"')
    longer = read(tmp_path, budget="[budget]\ntrials = 4\nepochs = 3")
    assert study.digest() == more.digest() == commented.digest() != longer.digest()


def test_files_that_are_no_study_file_say_so(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes('name = "café"'.encode("latin-1"))
    (tmp_path / "wide.toml").write_bytes(text_of().encode("utf-16"))
    (tmp_path / "broken.toml").write_text('name = "a"\n[data\n')
    (tmp_path / "deep.toml").write_text("x = " + "[" * 3000)
    (tmp_path / "digits.toml").write_text("x = 1" + "0" * 5000)
    (tmp_path / "empty.toml").write_text("")
    said = {
        "missing.toml": "no such file",
        "folder.toml": "is a folder",
        "latin.toml": "not a text file in UTF-8 (byte 11); save it as UTF-8",
        "wide.toml": "not a text file in UTF-8",
        "broken.toml": "not valid TOML: Expected ']' at the end of a table declaration (at line 2",
        "deep.toml": "nested too deeply",
        "digits.toml": "not valid TOML",
        "empty.toml": 'name is missing; add name = "..."',
    }
    for name, words in said.items():
        with pytest.raises(StudyFileError) as caught:
            load(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": ""}, "[data] is missing; add [data] with a name, one of: cifar10"),
        ({"model": ""}, "[model] is missing; add [model] with a name"),
        ({"budget": ""}, "budget.epochs is missing"),
        ({"budget": "[budget]\ntrials = 3"}, "budget.epochs is missing"),
        ({"budget": "[budget]\nepochs = 3"}, "budget.trials is missing; only a grid"),
        ({"top": ""}, "name is missing"),
        ({"data": '[data]\nname = "image_folder"'}, "data.root is missing"),
        ({"data": "[data]\nseed = 3"}, "[data] has no name; give one name in quotes, of: cifar10"),
        ({"space": ""}, "[space] searches nothing"),
        ({"space": "[space.optimizer.sgd]\nlr = 0.1"}, "[space] searches nothing"),
    ],
)
def test_study_file_without_a_needed_part_says_what_to_add(
    tmp_path: Path, sections: dict[str, str], said: str
) -> None:
    assert said in complaint(tmp_path, **sections)


@pytest.mark.parametrize(
    ("sections", "wrong", "meant"),
    [
        ({"budget": "[bugdet]\nepochs = 3"}, "unknown key 'bugdet'", "budget"),
        ({"budget": "[budget]\ntrial = 3\nepochs = 3"}, "budget.trial", "trials"),
        ({"objective": '[objective]\nmetrik = "ece"'}, "objective.metrik", "metric"),
        (
            {"objective": '[objective]\nmetric = "tail_acuracy"'},
            "objective.metric",
            "tail_accuracy",
        ),
        ({"objective": '[objective]\nfloor = {metric = "acuracy"}'}, "floor.metric", "accuracy"),
        ({"objective": "[objective]\nfloor = {dropp = 0.1}"}, "objective.floor.dropp", "drop"),
        ({"search": '[search]\nalgoritm = "tpe"'}, "search.algoritm", "algorithm"),
        ({"ladder": '[ladder]\nrung = ["full"]'}, "ladder.rung", "rungs"),
        ({"data": '[data]\nname = "digit"'}, "data: unknown dataset 'digit'", "digits"),
        ({"data": '[data]\nname = "digits"\nsed = 1'}, "data.sed", "seed"),
        ({"data": '[data]\nname = "digits"\ntail = {botom = 0.3}'}, "data.tail.botom", "bottom"),
        (
            {"data": '[data]\nname = "digits"\nprofile = {name = "exponent"}'},
            "data: unknown profile 'exponent'",
            "exponential",
        ),
        (
            {"data": '[data]\nname = "digits"\nprofile = {name = "exponential", ratioo = 3}'},
            "data.profile.ratioo",
            "ratio",
        ),
        ({"model": '[model]\nname = "ML P"'}, "model: unknown model 'ML P'", "mlp"),
        ({"model": '[model]\nname = "mlp"\nwidht = 9'}, "model.widht", "width"),
        ({"space": "[space.los.focal]"}, "unknown part 'los'", "loss"),
        ({"space": "[space.losses.focal]"}, "unknown part 'losses'", "loss"),
        ({"space": "[space.loss.fokal]"}, "space.loss: unknown loss 'fokal'", "focal"),
        ({"space": "[space.optimizer.SGD]"}, "unknown optimizer 'SGD'", "sgd"),
        ({"space": "[space.loss.focal]\ngama = 1"}, "space.loss.focal.gama", "gamma"),
        ({"space": "[space.loss.focal]\ngamma = {lo = 0, high = 1}"}, "focal.gamma.lo", "low"),
    ],
)
def test_study_file_with_a_wrong_name_says_which_was_meant(
    tmp_path: Path, sections: dict[str, str], wrong: str, meant: str
) -> None:
    text = complaint(tmp_path, **sections)
    assert wrong in text
    assert f"did you mean '{meant}'?" in text
    assert "Known: " in text


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"budget": '[budget]\ntrials = "4"\nepochs = 2'}, 'budget.trials = "4": must be a number'),
        ({"budget": "[budget]\ntrials = true\nepochs = 2"}, "budget.trials = true: must be a num"),
        ({"budget": "[budget]\ntrials = 1.5\nepochs = 2"}, "trials = 1.5: must be a whole number"),
        ({"budget": "[budget]\ntrials = 0\nepochs = 2"}, "budget.trials = 0: must be at least 1"),
        ({"budget": "[budget]\ntrials = -1\nepochs = 2"}, "trials = -1: must be at least 1"),
        ({"budget": "[budget]\ntrials = nan\nepochs = 2"}, "trials = nan: must be a finite number"),
        ({"budget": f"[budget]\ntrials = {10**20}\nepochs = 2"}, "must be at most 100000"),
        ({"budget": "[budget]\ntrials = 4\nepochs = [2]"}, "budget.epochs = [2]: must be a whole"),
        ({"objective": "[objective]\nadjusted = 1"}, "objective.adjusted = 1: must be true or fa"),
        ({"objective": '[objective]\nadjusted = "no"'}, 'adjusted = "no": must be true or false'),
        ({"objective": "[objective]\nmetric = 3"}, "objective.metric = 3: must be a text"),
        (
            {"objective": "[objective]\nfloor = 0.02"},
            "floor = 0.02: must be a table with metric an",
        ),
        ({"objective": "[objective]\nfloor = true"}, "or false for no floor"),
        ({"objective": "[objective]\nfloor = 0"}, "objective.floor = 0: must be a table"),
        ({"objective": "[objective]\nfloor = {drop = 2}"}, "floor.drop = 2: must be at most 1"),
        ({"search": '[search]\nalgorithm = "TPE"'}, "search.algorithm = \"TPE\": must be 'tpe'"),
        ({"search": "[search]\nseed = true"}, "search.seed = true: must be a number"),
        ({"search": "[search]\ngate = 60"}, "search.gate = 60: must be at most 1"),
        (
            {"ladder": '[ladder]\nrungs = ["warp"]'},
            "rungs[0] = \"warp\": must be 'head',",
        ),
        ({"ladder": "[ladder]\nrungs = []"}, "ladder.rungs = []: must hold at least 1"),
        ({"top": 'name = "small"\nobjective = "ece"'}, 'objective = "ece": must be a table, [obj'),
        ({"top": 'name = "small"\nspace = 3', "loss": "", "space": ""}, "space = 3: must hold tab"),
        (
            {"top": 'name = "small"\ndata = "digits"', "data": ""},
            'data = "digits": must be a table',
        ),
        ({"data": "[data]\nname = 3"}, "data.name = 3; give one name in quotes, of: cifar10"),
        ({"data": '[data]\nname = ["digits"]'}, 'data.name = ["digits"]; give one name'),
        ({"data": '[data]\nname = "digits"\ntail = 3'}, "data.tail = 3: must be a table"),
        ({"data": '[data]\nname = "digits"\npermute = "yes"'}, 'data.permute = "yes": must be tr'),
        (
            {"data": '[data]\nname = "digits"\ntail = {classes = [0.5]}'},
            "data.tail.classes[0] = 0.5: must be a whole number or a text",
        ),
        (
            {"data": '[data]\nname = "digits"\nprofile = {name = "exponential", ratio = inf}'},
            "data.profile.ratio = inf: must be a finite number",
        ),
        (
            {"data": '[data]\nname = "digits"\nprofile = {name = "step", groups = [{classes=1}]}'},
            "data.profile.groups[0]: give either count, or low and high",
        ),
        (
            {"data": '[data]\nname = "digits"\nprofile = {name = "exponential", ratio = "10"}'},
            'data.profile.ratio = "10": must be a number, without quotes',
        ),
        ({"parts": "[loss]\ngamma = 2.0", "loss": ""}, "has no name, so it is cross_entropy"),
        ({"model": '[model]\nname = "mlp"\nwidth = [8, 9]'}, "write [space.model.<name>] instead"),
        ({"space": '[space]\noptimizer = "sgd"'}, 'space.optimizer = "sgd": must hold a table'),
        ({"space": "[space.optimizer]\nlr = [0.1]"}, "space.optimizer.lr = [0.1]: must be a table"),
        ({"space": "[space.data.digits]\nseed = [0, 1]"}, "all trials of a study share [data]"),
        ({"parts": '[optimizer]\nname = "sgd"'}, "[optimizer] and [space.optimizer] are both"),
    ],
)
def test_study_file_with_a_wrong_value_says_where_and_what_is_right(
    tmp_path: Path, sections: dict[str, str], said: str
) -> None:
    text = complaint(tmp_path, **sections)
    assert said in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "a\\\\b", "..", ".hidden", "-v", "a\\nb", " lead", "x" * 101, "a.toml"]
)
def test_study_file_with_a_name_that_is_no_folder_name_says_so(tmp_path: Path, name: str) -> None:
    assert "name = " in complaint(tmp_path, top=f'name = "{name}"')


@pytest.mark.parametrize(
    ("component", "entry", "said"),
    [
        ("loss.focal", "gamma = {low = 2, high = 1}", "gamma: low = 2 is above high = 1"),
        ("loss.focal", "gamma = {low = 0}", "a range needs low and high; high is missing"),
        ("loss.focal", "gamma = {}", "a range needs low and high; low is missing"),
        ("loss.focal", "gamma = {min = 0, max = 1}", "gamma.min: unknown key. Known: high, log"),
        ("loss.focal", "gamma = {low = 0, high = 1, log = true}", "gamma.low = 0: must be above 0"),
        ("loss.focal", "gamma = {low = 0, high = 1, log = 1}", "gamma.log = 1: must be true or fa"),
        ("loss.focal", "gamma = {low = 1, high = 9, log = true, step = 1}", "exclude each other"),
        ("loss.focal", "gamma = {low = 0, high = 1, step = 2}", "gamma.step = 2: must be above 0"),
        ("loss.focal", "gamma = {low = 0, high = 1, step = 0}", "gamma.step = 0: must be above 0"),
        ("loss.focal", "gamma = {low = 0, high = 1, step = nan}", "step = nan: must be a finite"),
        ("loss.focal", "gamma = {low = 0, high = 1, step = 1e-300}", "is too small"),
        ("loss.focal", "gamma = {low = 0, high = 1, step = 0.3}", "write high = 0.9, or take"),
        ("loss.focal", 'gamma = {low = "0", high = 1}', 'gamma.low = "0": must be a number'),
        ("loss.focal", "gamma = {low = true, high = 2}", "gamma.low = true: must be a number"),
        ("loss.focal", "gamma = {low = 0, high = 1e400}", "gamma.high = inf: must be a finite"),
        ("loss.focal", f"gamma = {{low = 0, high = 1{'0' * 400}}}", "gamma.high = 1000"),
        ("loss.focal", "gamma = {low = -1, high = 1}", "gamma.low = -1: must be at least 0"),
        ("loss.focal", "gamma = nan", "gamma = nan: must be a finite number"),
        ("loss.focal", "gamma = true", "gamma = true: must be a number"),
        ("loss.focal", "gamma = 2024-01-01", "gamma = 2024-01-01: must be a number"),
        ("loss.focal", "gamma = []", "gamma = []: an empty list offers no choice"),
        ("loss.focal", "gamma = [1, 1.0]", "gamma = [1, 1.0]: 1.0 stands twice"),
        ("loss.focal", "gamma = [1.0, [2.0]]", "gamma[1] = [2.0]: must be a number"),
        ("loss.focal", "gamma = [0.0, false]", "gamma[1] = false: must be a number"),
        ("loss.focal", "gamma = [{low = 0, high = 1}]", "gamma[0] = { low = 0, high = 1 }"),
        (
            "loss.class_balanced",
            "beta = {low = 0.9, high = 1.0}",
            "beta.high = 1.0: must be below 1",
        ),
        ("loss.class_balanced", "base = {low = 0, high = 1}", "only numbers have ranges"),
        ("loss.class_balanced", 'base = ["softmax", "soft"]', 'base[1] = "soft": must be \'softm'),
        (
            "loss.class_balanced",
            "beta = [0.9, 0.99]\neffective_samples = [10.0, 100.0]",
            "space.loss.class_balanced: give beta or effective_samples",
        ),
        ("schedule.step", "per_epoch = {low = 0, high = 1}", "only numbers have ranges"),
        ("schedule.step", "per_epoch = [0, 1]", "per_epoch[0] = 0: must be true or false"),
        ("schedule.step", "milestones = [0.5, 2]", "milestones[1] = 2: must be below 1"),
        ("schedule.step", "milestones = [[0.5], [0.7, 2]]", "milestones[1][1] = 2: must be below"),
        ("schedule.step", "milestones = {low = 0, high = 1}", "only numbers have ranges"),
        ("optimizer.adamw", "betas = [0.9, 0.99, 0.999]", "must hold at most 2"),
        ("model.mlp", "width = {low = 8, high = 9.5}", "width.high = 9.5: must be a whole number"),
        (
            "model.mlp",
            "width = {low = 8, high = 64, step = 0.5}",
            "width.step = 0.5: must be a who",
        ),
        (
            "model.mlp",
            "width = {low = 8, high = 64, step = 10}",
            "write high = 58, or take another",
        ),
        (
            "model.mlp",
            f"width = {{low = 8, high = {2**53 + 1}}}",
            "must be at most 9007199254740992",
        ),
        ("model.mlp", "width = [16, 16.0]", "16 stands twice"),
    ],
)
def test_study_file_with_a_wrong_range_or_list_says_where_and_what_is_right(
    tmp_path: Path, component: str, entry: str, said: str
) -> None:
    text = searched(tmp_path, component, entry)
    assert f"space.{component}" in text
    assert said in text


@pytest.mark.parametrize(
    "sections",
    [
        {"top": 'name = "small"\nsmote = 1'},
        {"space": "[space.sampler.smote]\nk = [3, 5]"},
        {"space": "[space.smote]\nk = [3, 5]"},
        {"parts": '[sampler]\nname = "SMOTE"'},
        {"parts": '[augment]\nname = "borderline_smote"'},
    ],
)
def test_study_file_with_smote_says_why_not_and_what_instead(
    tmp_path: Path, sections: dict[str, str]
) -> None:
    text = complaint(tmp_path, **sections)
    assert "ghost image" in text
    assert "class_aware" in text


def test_study_file_with_several_mistakes_names_each(tmp_path: Path) -> None:
    text = complaint(tmp_path, model='[model]\nname = "mlp"\nwidth = 0\ndepth = "two"\ncolour = 1')
    for key in ("model.width = 0", 'model.depth = "two"', "model.colour: unknown key"):
        assert key in text


def test_long_values_are_shortened(tmp_path: Path) -> None:
    text = complaint(tmp_path, model=f'[model]\nname = "mlp"\nwidth = "{"9x" * 500}"')
    assert len(text) < 200


def test_grid_knows_its_own_size(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        search='[search]\nalgorithm = "grid"',
        budget="[budget]\nepochs = 2",
        space="[space.loss.focal]\ngamma = [1.0, 2.0]\n"
        "[space.optimizer.sgd]\nlr = {low = 0.1, high = 0.3, step = 0.1}",
    )
    assert study.trials() == 3 * (1 + 2) + 1


@pytest.mark.parametrize(
    ("budget", "entry", "said"),
    [
        ("epochs = 2", "{low = 0.1, high = 0.3}", "space.optimizer.sgd.lr: a grid needs a list"),
        ("epochs = 2", "{low = 0.1, high = 0.3, step = 1e-9}", f"more than {LARGEST_GRID}"),
        ("epochs = 2\ntrials = 2", "[0.1, 0.2]", "leave it out or give at least 3"),
    ],
)
def test_grid_that_cannot_be_run_says_why(
    tmp_path: Path, budget: str, entry: str, said: str
) -> None:
    grid = '[search]\nalgorithm = "grid"'
    space = f"[space.optimizer.sgd]\nlr = {entry}"
    assert said in complaint(tmp_path, search=grid, budget=f"[budget]\n{budget}", space=space)


def test_progressive_strategy_names_what_it_misses(tmp_path: Path) -> None:
    losses = ("cross_entropy", "weighted_cross_entropy", "asymmetric", "weighted_asymmetric")
    loss = "\n".join(f"[space.loss.{name}]" for name in losses)
    search = '[search]\nstrategy = "progressive"'
    assert "add [space.loss.weighted_cross_entropy]" in complaint(tmp_path, search=search)
    assert "add [space.sampler.class_aware]" in complaint(tmp_path, search=search, loss=loss)
    samplers = "[space.sampler.natural]\n[space.sampler.class_aware]"
    assert read(tmp_path, search=search, loss=loss, space=samplers).trials() == 4


def test_command_line_prints_one_message_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text_of(budget="[budget]\nepochs = 0\ntrials = 3"))
    done = subprocess.run(
        [sys.executable, "-m", "tuner", "check", "mine.toml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "tuner: mine.toml: budget.epochs = 0: must be at least 1\n"
