"""Settings on the command line: the run folder says who won."""

import json

import pytest

SHORT = ("--train-epochs", "1", "--soft-epochs", "1", "--finetune-epochs", "0")


def test_flags_over_environment_over_file(tmp_path, data, call, monkeypatch):
    (tmp_path / "small.toml").write_text(f'data = "{data}"\nseed = 1\nbatch = 11\nkind = "params"\nkeep = 0.9\n')
    monkeypatch.setenv("CHIPDEPLOY_SEED", "2")
    monkeypatch.setenv("CHIPDEPLOY_BATCH", "22")
    monkeypatch.setenv("CHIPDEPLOY_DEVICE", "cpu")
    line = ("prune", "resnet20", "--config", "small.toml", "--batch", "64", "--flops", "0.7", *SHORT)
    assert call(*line, "--run", "run", cwd=tmp_path).code == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"], config["seed"], config["batch"]) == (data, 2, 64)
    assert (config["kind"], config["keep"], config["align"], config["device"]) == ("flops", 0.7, 16, "cpu")


def test_a_budget_may_stand_in_the_environment(tmp_path, data, call, monkeypatch):
    monkeypatch.setenv("CHIPDEPLOY_KEEP", "70%")
    monkeypatch.setenv("CHIPDEPLOY_KIND", "params")
    monkeypatch.setenv("CHIPDEPLOY_DEVICE", "toaster")
    assert "toaster" in call("prune", "--data", data, cwd=tmp_path).error  # the budget was understood
    monkeypatch.setenv("CHIPDEPLOY_KEEP", "170%")
    monkeypatch.setenv("CHIPDEPLOY_DEVICE", "cpu")
    outcome = call("prune", "resnet20", "--data", data, cwd=tmp_path)
    assert outcome.code == 2 and "between 0 and 1" in outcome.error


@pytest.mark.parametrize("step", ["prune", "train"])
def test_an_unknown_setting_gets_a_guess(tmp_path, call, monkeypatch, step):
    (tmp_path / "bad.toml").write_text("soft_epoch = 3\n")
    line = (step, "--config", "bad.toml", *(("--flops", "0.5") if step == "prune" else ()))
    outcome = call(*line, cwd=tmp_path)
    assert outcome.code == 2 and "did you mean 'soft_epochs'?" in outcome.error
    monkeypatch.setenv("CHIPDEPLOY_MODELS", "resnet20")
    outcome = call(*line[:1], *line[3:], cwd=tmp_path)
    assert outcome.code == 2 and "did you mean 'model'?" in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"]


def test_a_flag_replaces_a_goal_of_the_file_and_of_the_environment(tmp_path, data, call, monkeypatch):
    (tmp_path / "goal.toml").write_text("latency = 0.5\n")
    monkeypatch.setenv("CHIPDEPLOY_FPS", "100")
    monkeypatch.setenv("CHIPDEPLOY_RUNS", "mine")
    monkeypatch.setenv("CHIPDEPLOY_CONFIG", "goal.toml")
    outcome = call("prune", "resnet20", "--data", data, "--flops", "0.0001", cwd=tmp_path)
    assert outcome.code == 5 and "a budget of 0.01% is out of reach" in outcome.error
    assert "no finished run in mine/" in call("report", cwd=tmp_path).error
    monkeypatch.setenv("CHIPDEPLOY_CONFIG", "gone.toml")
    assert "no settings file gone.toml" in call("prune", "--flops", "0.5", cwd=tmp_path).error
