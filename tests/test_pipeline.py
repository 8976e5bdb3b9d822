"""The main job as a library: what is trained, kept, cut, resumed and loaded again."""

import fcntl
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import chipdeploy as cd
from chipdeploy import checkpoint
from chipdeploy.config import PruneConfig, TrainConfig, build
from chipdeploy.dense import train_dense
from chipdeploy.errors import BudgetError, MissingError, ModelError, RunError, UsageError, WeightsError
from chipdeploy.files import digest
from chipdeploy.graph.loud import randomize
from chipdeploy.job import pick_device, prepare
from chipdeploy.pipeline import check_budget, prune
from chipdeploy.result import load
from chipdeploy.run import Run
from chipdeploy.training.loop import Silent, evaluate
from chipdeploy.training.orthogonal import OrthogonalSGD
from chipdeploy.training.weights import load_weights, save_weights

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.outer(self.inner(x))).mean((2, 3)))


def build(num_classes):
    return Net(num_classes)
"""


class Recorder(Silent):
    """Notes the epochs that really ran; may stop where a phase begins, or an epoch ends that is not saved yet."""

    def __init__(self, stop=None):
        self.epochs = []
        self.stop = stop

    def epoch(self, row):
        self.epochs.append(f"{row['phase']} {row['epoch']}")
        self._stop_at(self.epochs[-1])

    def phase(self, name, epochs, steps):
        self._stop_at(name)

    def _stop_at(self, place):
        if place == self.stop:
            raise KeyboardInterrupt


def write_data(path, train=128, test=32, shift=0, random=False):
    """Noise with one bright channel, the number of the class; `random`: labels that cannot be learnt."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        labels = (np.arange(count) + shift) % 3
        pixels = generator.integers(0, 60, (count, 8, 8, 3))
        pixels[np.arange(count), :, :, labels] += 120
        if random:
            labels = generator.permutation(labels)
        arrays |= {f"x_{part}": pixels.astype(np.uint8), f"y_{part}": labels}
    np.savez(path, **arrays)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    write_data(tmp_path / "data.npz")
    return tmp_path


@pytest.fixture
def configure(folder):
    def make(**changed):
        short = {"batch": 32, "lr": 0.2, "train_epochs": 2, "soft_epochs": 2, "finetune_epochs": 2, "align": 1}
        names = {"model": f"{folder / 'net.py'}:build", "data": f"npz:{folder / 'data.npz'}", "device": "cpu"}
        return PruneConfig(**names | short | {"keep": 0.5} | changed)

    return make


@pytest.fixture
def go(folder):
    """Run or resume, as the command line does."""

    def run(config, name="run", watcher=None):
        job = prepare(config)
        check_budget(config, job)
        run = Run.create(folder / "runs", "prune", config.model_dump(), path=folder / name)
        watcher = watcher or Recorder()
        dense = Path(config.weights) if config.weights else train_dense(job, folder / "dense", watcher)
        return run, prune(config, job, run, dense, watcher), watcher

    return run


@pytest.mark.parametrize("kind", ["flops", "params", "channels", "volume"])
def test_every_budget_is_kept_by_the_network_that_is_loaded(configure, go, kind):
    run, result, _ = go(configure(kind=kind, keep=0.6))
    small, dense = load(run.path), load(run.path, dense=True)
    assert result["budget"]["achieved"] <= 0.6
    for name, network in (("pruned", small), ("dense", dense)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, 8, 8))
        assert result["costs"][name]["macs"] == counter.get_total_flops() / 2
        assert result["costs"][name]["params"] == sum(p.numel() for p in network.parameters())
    widths = {layer["name"]: layer["kept"] for layer in result["layers"]}
    for name, module in small.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            assert widths[name] == module.out_channels


# 128 images, of which 13 are for validation: 115 // 32 = 3 steps an epoch, and fewer in the last case.
@pytest.mark.parametrize(("batch", "epochs"), [(32, 1), (16, 1), (8, 1), (1000, 1), (16, 3)])
def test_no_soft_phase_is_too_short_for_the_budget(configure, go, batch, epochs):
    config = configure(batch=batch, soft_epochs=epochs, finetune_epochs=0, train_epochs=1)
    _, result, _ = go(config)
    assert 0 < result["budget"]["achieved"] <= 0.5


def test_the_result_is_of_the_networks_that_were_written(configure, go):
    run, result, _ = go(configure())
    test = prepare(configure()).data.test
    images, labels = next(test.batches(len(test)))
    for name, network in (("pruned", cd.load(run.path)), ("dense", cd.load(str(run.path), dense=True))):
        assert not network.training
        with torch.no_grad():
            right = (network(images).argmax(1) == labels).float().mean()
        assert result["accuracy"][name] == pytest.approx(float(right))
    assert result["accuracy"]["test_images"] == 32
    assert result["plan_digest"] == cd.PrunePlan.from_dict(run.read("plan.json")).digest


def test_every_epoch_is_in_the_metrics_once(configure, go):
    run, _, watcher = go(configure())
    assert watcher.epochs == ["dense 1", "dense 2", "soft 1", "soft 2", "finetune 1", "finetune 2"]
    assert [f"{row['phase']} {row['epoch']}" for row in run.metrics()] == watcher.epochs[2:]
    assert run.finished and not run.file(checkpoint.NAME).exists()


def test_the_finetuned_weights_are_those_of_the_best_epoch(configure, go, folder):
    write_data(folder / "data.npz", random=True)
    for seed in range(8):  # until the last epoch is not the best one
        config = configure(finetune_epochs=6, lr=0.5, seed=seed)
        run, _, _ = go(config, f"run{seed}")
        accuracies = [row["val"] for row in run.metrics() if row["phase"] == "finetune"]
        if accuracies[-1] < max(accuracies):
            break
    assert accuracies[-1] < max(accuracies)
    val = prepare(config).data.val
    images, labels = next(val.batches(len(val)))
    with torch.no_grad():
        right = (load(run.path)(images).argmax(1) == labels).float().mean()
    assert float(right) == pytest.approx(max(accuracies))


def test_without_finetuning_the_cut_is_what_is_kept(configure, go):
    run, result, watcher = go(configure(finetune_epochs=0))
    assert not [epoch for epoch in watcher.epochs if epoch.startswith("finetune")]
    val = prepare(configure()).data.val
    images, labels = next(val.batches(len(val)))
    with torch.no_grad():
        right = (load(run.path)(images).argmax(1) == labels).float().mean()
    assert float(right) == pytest.approx(result["validation"]["cut"])


@pytest.mark.parametrize("recipe", ["default", "paper"])
@pytest.mark.parametrize("stop", ["dense", "dense 2", "soft pruning", "soft 2", "finetune", "finetune 2"])
def test_a_stop_anywhere_changes_nothing(configure, go, folder, recipe, stop):
    config = configure(recipe=recipe)
    whole, _, _ = go(config, "whole")
    for path in (folder / "dense").iterdir():
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        go(config, "stopped", Recorder(stop=stop))
    stopped, _, watcher = go(config, "stopped")
    assert watcher.epochs[-1] == "finetune 2"
    for name in ("plan.json", "pruned.safetensors", "dense.safetensors", "result.json", "metrics.jsonl"):
        assert stopped.file(name).read_bytes() == whole.file(name).read_bytes(), name


def test_of_two_processes_one_trains_and_the_other_waits_for_it(configure, folder):
    config, told = configure(), threading.Event()
    whole = train_dense(prepare(config), folder / "dense", Silent()).read_bytes()
    (path,) = (folder / "other").parent.glob("dense/*.safetensors")
    elsewhere, watcher = folder / "other" / path.name, Recorder()
    elsewhere.parent.mkdir()
    with ThreadPoolExecutor(1) as pool, elsewhere.with_suffix(".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(train_dense, prepare(config), elsewhere.parent, watcher, lambda _: told.set())
        assert told.wait(60)
        for suffix in (".safetensors", ".json"):
            elsewhere.with_suffix(suffix).write_bytes(path.with_suffix(suffix).read_bytes())
        fcntl.flock(held, fcntl.LOCK_UN)
        assert waiting.result(60).read_bytes() == whole
    assert watcher.epochs == []
    assert not list(elsewhere.parent.glob("*.lock"))


def test_a_dense_network_is_trained_once(configure, go, folder):
    config = configure()
    job = prepare(config)
    first, second = Recorder(), Recorder()
    path = train_dense(job, folder / "dense", first)
    assert train_dense(job, folder / "dense", second) == path
    assert (first.epochs, second.epochs) == (["dense 1", "dense 2"], [])
    assert not list((folder / "dense").glob("*.partial"))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert [row["epoch"] for row in facts["metrics"]] == [1, 2]
    # Pruning settings do not matter to it, training settings do.
    assert train_dense(prepare(configure(keep=0.3, align=4)), folder / "dense", second) == path
    plain = TrainConfig(**config.model_dump(include=set(TrainConfig.model_fields)))
    assert train_dense(prepare(plain), folder / "dense", second) == path
    assert second.epochs == []
    assert train_dense(prepare(configure(seed=1)), folder / "dense", second) != path
    assert second.epochs == ["dense 1", "dense 2"]


def test_a_dense_network_of_other_pixels_is_not_taken(configure, folder):
    first = train_dense(prepare(configure()), folder / "dense", Silent())
    arrays = dict(np.load(folder / "data.npz"))
    arrays["x_train"][5, 2, 2] ^= 1
    np.savez(folder / "data.npz", **arrays)
    second = Recorder()
    # The moments stay: they are given.
    given = {"mean": (0.3, 0.3, 0.3), "std": (0.2, 0.2, 0.2)}
    assert train_dense(prepare(configure()), folder / "dense", second) != first
    third = train_dense(prepare(configure(**given)), folder / "dense", second)
    arrays["x_train"][5, 2, 2] ^= 1
    np.savez(folder / "data.npz", **arrays)
    assert train_dense(prepare(configure(**given)), folder / "dense", second) != third
    assert second.epochs == 3 * ["dense 1", "dense 2"]


def test_a_dense_network_is_found_again_where_the_data_were_moved(configure, folder):
    first = train_dense(prepare(configure()), folder / "dense", Silent())
    (folder / "data.npz").rename(folder / "moved.npz")
    job = prepare(configure(data=f"npz:{folder / 'moved.npz'}", device="auto"))
    again = Recorder()
    assert train_dense(job, folder / "dense", again) == first and not again.epochs
    own = prepare(configure(data=f"npz:{folder / 'moved.npz'}", mean=job.data.mean, std=job.data.std))
    assert train_dense(own, folder / "dense", again) == first


def test_an_edited_dense_network_is_trained_again(configure, folder):
    job = prepare(configure())
    path = train_dense(job, folder / "dense", Silent())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = Recorder()
    assert train_dense(job, folder / "dense", again) == path
    assert again.epochs == ["dense 1", "dense 2"]
    assert path.read_bytes() == whole


def test_another_model_of_the_same_name_is_not_taken_for_the_first(configure, folder):
    first = train_dense(prepare(configure()), folder / "dense", Silent())
    (folder / "net.py").write_text(NET.replace("12", "16"))
    job = prepare(configure())
    second = train_dense(job, folder / "dense", Silent())
    assert second != first
    load_weights(job.model(), second)
    with pytest.raises(WeightsError, match="of another model"):
        load_weights(job.model(), first)


def test_a_run_is_not_resumed_on_other_inputs(configure, go, folder):
    config = configure()
    with pytest.raises(KeyboardInterrupt):
        go(config, watcher=Recorder(stop="finetune"))
    write_data(folder / "data.npz", shift=1)
    with pytest.raises(RunError, match=r"the data of .* changed"):
        go(config)
    write_data(folder / "data.npz")
    arrays = dict(np.load(folder / "data.npz"))
    np.savez(folder / "data.npz", **arrays | {"x_test": 255 - arrays["x_test"]})
    with pytest.raises(RunError, match=r"the images of .* changed"):
        go(config)
    write_data(folder / "data.npz")
    (folder / "net.py").write_text(NET + "# changed\n")
    with pytest.raises(RunError, match=r"the model of .* changed"):
        go(config)
    (folder / "net.py").write_text(NET)
    run, _, _ = go(config)
    assert run.finished


def test_a_run_of_a_version_that_knew_no_pixels_goes_on(configure, go, folder):
    config = configure()
    with pytest.raises(KeyboardInterrupt):
        go(config, watcher=Recorder(stop="finetune"))
    saved = folder / "run" / checkpoint.NAME
    tensors, facts = checkpoint.load(saved)
    del facts["inputs"]["images"]
    checkpoint.save(saved, tensors, facts)
    run, result, watcher = go(config)
    assert watcher.epochs == ["finetune 1", "finetune 2"]
    del result["inputs"]["images"]
    run.write("result.json", result)
    run.seal(["result.json"])
    load(run.path)


def test_given_weights_are_the_dense_network(configure, go, folder):
    trained = train_dense(prepare(configure()), folder / "dense", Silent())
    given = configure(weights=str(trained))
    with pytest.raises(KeyboardInterrupt):
        go(given, watcher=Recorder(stop="finetune"))
    whole = trained.read_bytes()
    trained.write_bytes(train_dense(prepare(configure(seed=5)), folder / "dense", Silent()).read_bytes())
    with pytest.raises(RunError, match=r"the weights of .* changed"):
        go(given)
    trained.write_bytes(whole)
    run, _, watcher = go(given)
    assert not [epoch for epoch in watcher.epochs if epoch.startswith("dense")]
    assert run.file("dense.safetensors").read_bytes() == whole


def test_a_changed_run_is_not_loaded(configure, go):
    run, _, _ = go(configure(train_epochs=1, soft_epochs=1, finetune_epochs=0))
    for name in ("pruned.safetensors", "plan.json", "data.json", "config.json", "result.json", "manifest.json"):
        before = run.file(name).read_bytes()
        content = bytearray(before)
        content[-3] ^= 1
        run.file(name).write_bytes(content)
        with pytest.raises(RunError, match=name):
            load(run.path)
        run.file(name).write_bytes(before)
    load(run.path)


DRAWN = NET.replace(
    "        self.head =",
    """        mix = torch.from_numpy(1 + np.random.rand(8)).float()
        self.register_buffer("mix", mix.view(1, 8, 1, 1), persistent=False)
        self.head =""",
).replace("x = self.stem(x)", "x = self.stem(x) * self.mix * (1 + self.training * random.random())")


def test_a_network_that_draws_for_itself_is_loaded_as_it_was_tested(configure, go, folder):
    (folder / "net.py").write_text("import random\n\nimport numpy as np\n" + DRAWN)
    run, result, _ = go(configure(train_epochs=1, soft_epochs=1, finetune_epochs=0))
    weights = {name: digest(run.file(f"{name}.safetensors")) for name in ("dense", "pruned")}
    before = np.random.rand(), torch.rand(1).item()
    small, again = load(run.path), load(run.path)
    assert torch.equal(small.mix, again.mix)
    assert (np.random.rand(), torch.rand(1).item()) != before
    job = prepare(configure())
    for name in weights:
        accuracy = evaluate(load(run.path, dense=name == "dense"), job.data.test, job.device)
        assert accuracy == result["accuracy"][name]
    shutil.rmtree(folder / "run")
    shutil.rmtree(folder / "dense")
    other, _, _ = go(configure(train_epochs=1, soft_epochs=1, finetune_epochs=0))
    assert {name: digest(other.file(f"{name}.safetensors")) for name in weights} == weights


def test_a_network_that_answers_otherwise_is_not_handed_out(configure, go):
    run, result, _ = go(configure(train_epochs=1, soft_epochs=1, finetune_epochs=0))
    result["answers"]["pruned"][1] += 0.1 * max(map(abs, result["answers"]["pruned"]))
    run.write("result.json", result)
    run.seal(["result.json"])
    load(run.path, dense=True)
    with pytest.raises(RunError, match="answers otherwise than when it was made"):
        load(run.path)


def test_what_the_models_file_imports_is_part_of_the_model(configure, go, folder):
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("from .bend import bend\n")
    (folder / "parts" / "bend.py").write_text("from torch import relu as bend\n")
    (folder / "net.py").write_text(
        NET.replace("torch.relu(", "parts.bend(").replace("import nn", "import nn\nimport parts")
    )
    (folder / "unread.py").write_text("import nothing\n")
    config = configure(train_epochs=1, soft_epochs=1, finetune_epochs=0)
    run, _, _ = go(config)
    (folder / "unread.py").write_text("changed = True\n")
    load(run.path)
    (folder / "parts" / "bend.py").write_text("from torch import tanh as bend\n")
    with pytest.raises(RunError, match="or a file that it imports, was changed"):
        load(run.path)
    before = set((folder / "dense").glob("*.safetensors"))
    train_dense(prepare(config), folder / "dense", Silent())
    assert len(set((folder / "dense").glob("*.safetensors")) - before) == 1


def test_a_run_is_not_loaded_into_a_changed_model(configure, go, folder):
    run, _, _ = go(configure(train_epochs=1, soft_epochs=1, finetune_epochs=0))
    (folder / "net.py").write_text(NET.replace("nn.ReLU", "nn.SiLU"))
    with pytest.raises(RunError, match=r"net\.py, or a file that it imports, was changed"):
        load(run.path)
    (folder / "net.py").unlink()
    with pytest.raises(ModelError, match="does not exist"):
        load(run.path)


def test_an_unfinished_run_is_not_loaded(configure, go, folder):
    with pytest.raises(KeyboardInterrupt):
        go(configure(), watcher=Recorder(stop="finetune"))
    with pytest.raises(RunError, match="no finished"):
        load(folder / "run")
    with pytest.raises(RunError, match="no run directory"):
        load(folder / "nowhere")


def test_a_budget_is_checked_before_anything_is_trained(configure):
    config = configure(keep=0.5)
    # Per pixel: 3·8·9 in the stem, 8·12·9 and 12·8·9 in the branch; once 8·3 in the head.
    macs = 64 * 9 * (3 * 8 + 8 * 12 + 12 * 8) + 8 * 3
    assert check_budget(config, prepare(config))[0] == f"keep at most 0.5 of the MACs: {macs / 2:,.0f} of {macs:,.0f}"
    small = configure(keep=1e-6)
    with pytest.raises(BudgetError):
        check_budget(small, prepare(small))
    for wrong, words in (
        ({"keep": 0.0}, "between 0 and 1"),
        ({"keep": 1.0}, "between"),
        ({"kind": "flop"}, "one of flops"),
    ):
        with pytest.raises(UsageError, match=words):
            build(PruneConfig, config.model_dump() | wrong)


def test_the_size_before_the_training_is_the_size_after_it(configure, folder):
    # The file of a fresh network is smaller: its equal biases are stored once.
    config = configure(model="resnet20", max_size_mb=1)
    path = folder / "trained.safetensors"
    save_weights(randomize(prepare(config).model()), path)
    trained = configure(model="resnet20", max_size_mb=1, weights=str(path))
    assert check_budget(config, prepare(config))[0] == check_budget(trained, prepare(trained))[0]


@pytest.mark.parametrize("head", ["(x, x)", "x[:, :2]"])
def test_what_gives_no_logits_is_refused_before_anything_is_trained(configure, folder, head):
    text = NET.replace("return self.head(", "x = self.head(").replace(
        "mean((2, 3)))", f"mean((2, 3)))\n        return {head}"
    )
    (folder / "net.py").write_text(text)
    config = configure()
    with pytest.raises(ModelError, match=r"the model returns (a tuple|\[2, 2\])"):
        check_budget(config, prepare(config))


def test_excluded_layers_and_least_widths_hold_through_a_run(configure, go, folder):
    run, _, _ = go(configure(exclude=("stem*",), min_width=5))
    small = load(run.path)
    assert small.stem[0].out_channels == 8
    assert small.inner[0].out_channels in range(5, 12)
    with pytest.raises(UsageError, match="--exclude body matches no layer"):
        config = configure(exclude=("body",))
        check_budget(config, prepare(config))


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("meta", "cuda:63", "toaster", "hpu", ""):
        with pytest.raises(MissingError, match="no device"):
            pick_device(name)


def test_a_gpu_by_number_becomes_the_current_one(monkeypatch):
    """Streams and capabilities are asked of the current one. No GPU is needed here: what is called is looked at."""
    chosen, empty = [], torch.empty
    monkeypatch.setattr("torch.empty", lambda *sizes, device: empty(*sizes))
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert [pick_device(name).index for name in ("cuda:1", "cuda", "cpu")] == [1, None, None]
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("changed", "weight"),
    [
        ({}, None),
        ({"train_epochs": 30}, 0.7),
        ({"weights": "given.safetensors"}, 0.7),
        ({"distill": 0.4}, 0.4),
        ({"weights": "given.safetensors", "distill": 0.0}, None),
        ({"train_epochs": 30, "recipe": "paper"}, None),
    ],
)
def test_a_dense_network_teaches_what_it_has_learnt(configure, changed, weight):
    job = prepare(configure(**changed))
    teacher = job.teacher(job.model())
    assert (teacher and teacher.weight) == weight
    assert teacher is None or not teacher.network.training


def test_a_trained_network_is_moved_by_smaller_steps_than_a_fresh_one(configure, go, monkeypatch):
    paces = []

    def noted(*given, **rest):
        paces.append(rest["pace"])
        return OrthogonalSGD(*given, **rest)

    monkeypatch.setattr("chipdeploy.job.OrthogonalSGD", noted)
    config = configure(keep=0.5)
    go(config)
    rules = prepare(config).recipe
    assert paces == [rules.pace, rules.pace_after(0.5), rules.pace_after(0.5)]  # dense, soft, finetune


def test_a_taught_finetune_goes_on_to_the_same_weights(configure, go, folder):
    config = configure(distill=0.5)
    go(config, "whole")
    with pytest.raises(KeyboardInterrupt):
        go(config, "cut", Recorder(stop="finetune"))
    run, result, _ = go(config, "cut")
    assert run.finished and result["distill"] == 0.5
    assert digest(folder / "whole" / "pruned.safetensors") == digest(folder / "cut" / "pruned.safetensors")
    go(configure(), "untaught")
    assert digest(folder / "whole" / "pruned.safetensors") != digest(folder / "untaught" / "pruned.safetensors")
