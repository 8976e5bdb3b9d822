"""Settings: who wins, what is refused, and by which name."""

import re
from pathlib import Path

import pytest

from chipdeploy.config import PruneConfig, TrainConfig, build, settings
from chipdeploy.errors import UsageError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "chipdeploy.toml"
    path.write_text('model = "resnet56"\nseed = 1\nbatch = 11\nsoft-epochs = 2\n')
    return path


def test_flags_over_environment_over_file_over_defaults(file):
    environment = {"CHIPDEPLOY_SEED": "2", "CHIPDEPLOY_BATCH": "22", "PATH": "/bin"}
    values = settings(PruneConfig, {"batch": 33, "lr": None, "keep": 0.5}, file, environment)
    config = build(PruneConfig, values)
    assert (config.model, config.seed, config.batch, config.soft_epochs) == ("resnet56", 2, 33, 2)
    assert (config.lr, config.keep, config.align, config.device) == (None, 0.5, 16, "auto")


def test_each_source_alone(file):
    assert settings(TrainConfig, {}, None, {}) == {}
    assert settings(TrainConfig, {"seed": 3}, None, {}) == {"seed": 3}
    assert settings(TrainConfig, {}, None, {"CHIPDEPLOY_SEED": "4"}) == {"seed": "4"}
    assert build(TrainConfig, {"seed": "4"}).seed == 4
    assert settings(TrainConfig, {}, file, {})["seed"] == 1


def test_settings_of_another_command_are_left_out(file):
    assert "soft_epochs" not in settings(TrainConfig, {}, file, {"CHIPDEPLOY_ALIGN": "8"})
    assert settings(PruneConfig, {}, file, {"CHIPDEPLOY_ALIGN": "8"})["align"] == "8"


@pytest.mark.parametrize("name", ["DEBUG", "RUNS", "CONFIG"])
def test_switches_of_the_program_are_no_settings(name):
    assert settings(TrainConfig, {}, None, {f"CHIPDEPLOY_{name}": "1"}) == {}


@pytest.mark.parametrize(
    ("content", "variables", "flags", "expected"),
    [
        ("latency = 0.5", {}, {"kind": "flops", "keep": 0.5}, {"kind": "flops", "keep": 0.5}),
        ("latency = 0.5", {"KEEP": "0.4"}, {}, {"keep": "0.4"}),
        ("", {"LATENCY_MS": "3"}, {"latency": 0.95}, {"latency": 0.95}),
        ("keep = 0.5\nkind = 'params'", {"FPS": "100"}, {}, {"fps": "100"}),
        ("kind = 'params'", {"KEEP": "0.4"}, {}, {"kind": "params", "keep": "0.4"}),
        ("latency = 0.5\nseed = 1", {"SEED": "2"}, {}, {"latency": 0.5, "seed": "2"}),
    ],
)
def test_a_goal_replaces_the_goals_below_it(tmp_path, content, variables, flags, expected):
    path = tmp_path / "some.toml"
    path.write_text(content)
    environment = {f"CHIPDEPLOY_{name}": value for name, value in variables.items()}
    assert settings(PruneConfig, flags, path, environment) == expected
    build(PruneConfig, expected)


def test_two_goals_in_one_place_are_refused(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("kind = 'params'\nkeep = 0.5\nlatency-ms = 3\n")
    with pytest.raises(UsageError, match="got kind and latency_ms in the file; leave all but one out"):
        settings(PruneConfig, {}, path, {})
    assert settings(TrainConfig, {}, path, {}) == {}
    with pytest.raises(UsageError, match="got keep and fps in the environment"):
        settings(PruneConfig, {"latency": 0.5}, None, {"CHIPDEPLOY_KEEP": "0.3", "CHIPDEPLOY_FPS": "9"})


def test_a_kind_is_one_of_the_budgets():
    with pytest.raises(UsageError, match=r"kind = 'latency' in the environment .* give latency"):
        settings(PruneConfig, {}, None, {"CHIPDEPLOY_KIND": "latency", "CHIPDEPLOY_KEEP": "0.5"})
    with pytest.raises(UsageError, match=r"CHIPDEPLOY_KIND: input should be one of flops, .*, got 'size'"):
        settings(PruneConfig, {}, None, {"CHIPDEPLOY_KIND": "size"})


def test_values_below_the_flags_are_named_where_they_stand(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text('soft-epochs = 0\nbatch = "x"\n')
    with pytest.raises(UsageError, match=r"^CHIPDEPLOY_SEED: .*, got ''$"):
        settings(PruneConfig, {}, None, {"CHIPDEPLOY_SEED": ""})
    with pytest.raises(UsageError, match=rf"^soft_epochs in {path}: .*, got 0$"):
        settings(PruneConfig, {"batch": 3}, path, {})
    # What a flag replaces is not looked at.
    assert settings(TrainConfig, {"batch": 3}, path, {}) == {"batch": 3}


@pytest.mark.parametrize("key", ["sead", "Seed", "seed_"])
def test_an_unknown_key_gets_a_guess(tmp_path, key):
    path = tmp_path / "some.toml"
    path.write_text(f"{key} = 1\n")
    with pytest.raises(UsageError, match=rf"unknown setting '{key}' in the file; did you mean 'seed'\?"):
        settings(TrainConfig, {}, path, {})


def test_an_unknown_variable_gets_a_guess():
    with pytest.raises(UsageError, match=r"unknown setting 'sede' in the environment; did you mean 'seed'\?"):
        settings(PruneConfig, {}, None, {"CHIPDEPLOY_SEDE": "1"})


def test_a_budget_flag_is_translated(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("flops = 0.5\n")
    with pytest.raises(UsageError, match=r"write kind = 'flops' and keep = 0\.3"):
        settings(PruneConfig, {}, path, {})


def test_a_key_like_no_other_gets_the_list(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("[prune]\nzzz = 1\n")
    with pytest.raises(UsageError, match="known: model, data"):
        settings(PruneConfig, {}, path, {"CHIPDEPLOY_QQQQ": "1"})


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe", b"seed 1"])
def test_no_toml_is_one_line(tmp_path, content):
    path = tmp_path / "some.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no TOML file"):
        settings(TrainConfig, {}, path, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 2**31),
        ("seed", "one"),
        ("batch", 0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("align", 0),
        ("train_epochs", 0),
        ("finetune_epochs", -1),
        ("image_size", 1.5),
        ("mean", "a,b"),
        ("keep", "half"),
        ("keep", "x%"),
        ("keep", "170%"),
        ("keep", float("nan")),
        ("kind", "flop"),
        ("latency", 1),
        ("model", 3),
    ],
)
def test_values_out_of_range_name_their_key(key, value):
    with pytest.raises(UsageError, match=f"^--{key.replace('_', '-')}: .*, got ") as caught:
        build(PruneConfig, {key: value})
    assert "\n" not in str(caught.value)


def test_text_as_it_stands_in_the_environment():
    config = build(PruneConfig, {"mean": "0.5,0.25", "std": " 1, 2 ", "keep": "30%", "seed": "7", "lr": "1e-2"})
    assert (config.mean, config.std, config.keep) == ((0.5, 0.25), (1.0, 2.0), 0.3)
    assert (config.seed, config.lr) == (7, 0.01)
    config = build(PruneConfig, {"latency": "50%", "exclude": "head, a.0,"})
    assert (config.latency, config.exclude, config.kind, config.align) == (0.5, ("head", "a.0"), "latency", "auto")


def test_a_configuration_is_a_value():
    config = build(PruneConfig, {"mean": [0.5], "keep": 0.5})
    assert build(PruneConfig, config.model_dump()) == config
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3


PAGE = (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")


def test_the_page_on_settings_holds(tmp_path):
    """Its file is read, its variables are settings, and it names every setting."""
    path = tmp_path / "birds.toml"
    path.write_text(re.search(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1])
    variables = dict(re.findall(r"(CHIPDEPLOY_[A-Z_]+)=([^\s`]+)", PAGE))
    config = build(PruneConfig, settings(PruneConfig, {}, path, variables))
    assert (config.model, config.exclude, config.kind, config.keep) == (
        "my_net.py:build",
        ("stem.*", "head"),
        "params",
        0.4,
    )
    assert (config.seed, config.latency) == (3, None)
    assert [name for name in PruneConfig.model_fields if f"`{name}`" not in PAGE] == []
