"""A dense network on one target, and every cut of it, ready to be timed against each other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from chipdeploy.copying import copied, in_mode
from chipdeploy.engines.base import Engine, Images, open_engine
from chipdeploy.engines.build import BuildOptions, build_engine
from chipdeploy.engines.cuda import this_gpu
from chipdeploy.engines.target import Target
from chipdeploy.errors import ExportError, MissingError, RunError, UsageError
from chipdeploy.export.memory import Footprint, footprint
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.precision import convert
from chipdeploy.export.shrink import Shrinker
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.latency.apart import time_apart
from chipdeploy.latency.gpu import environment_of
from chipdeploy.latency.layers import layer_names, layer_seconds
from chipdeploy.latency.measure import Comparison
from chipdeploy.latency.timing import time_engines

AGREEMENT = 1e-3  # of the largest logit: between a cut ONNX file and the cut network
CALIBRATION = 64  # random images for int8: a latency does not depend on what they show


@dataclass(frozen=True)
class Setting:
    """What a latency depends on besides the network."""

    target: Target
    batch: int
    input_shape: tuple[int, ...]  # of one image
    threads: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"the batch must be 1 or more, got {self.batch}; try 1")
        if self.threads < 1:
            raise UsageError(f"the threads must be 1 or more, got {self.threads}; try 1")
        self.target.check_threads(self.threads)

    @property
    def name(self) -> str:
        """`ort-cpu, batch 1, 3x32x32, 1 thread`."""
        threads = "" if self.target.on_gpu else f", {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.target.name}, batch {self.batch}, {'x'.join(map(str, self.input_shape))}{threads}"


class Rig:
    """Makes, checks and times engines of one network's cuts. A context: its files vanish at the end.

    Args:
        model: the dense network; it stays as it is.
        graph: its channels.

    Raises:
        MissingError: the target's package or device is not here.
        ExportError: the network cannot be exported.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, setting: Setting) -> None:
        self.graph, self.setting = graph, setting
        if setting.target.builds and not this_gpu()[0]:
            raise MissingError(
                f"no GPU is here to measure {setting.target.name} on; use a machine with one, or ort-cpu"
            )
        self._model = in_mode(copied(model).to("cpu")).to(memory_format=torch.contiguous_format)
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="chipdeploy-")))
        draw = np.random.default_rng(0)
        self.images: Images = draw.standard_normal((setting.batch, *setting.input_shape), dtype=np.float32)
        self._few = torch.from_numpy(draw.standard_normal((2, *setting.input_shape), dtype=np.float32))
        self._shrinker: Shrinker | None = None
        self._made = 0
        self._dense: Path | nn.Module = self._model
        if setting.target.runtime != "torch":
            self._dense_path = self._folder / "dense.onnx"
            export_onnx(self._model, self._few, self._dense_path, max_batch=max(2, setting.batch))
            self._shrinker = self._try_shrinker()
            self._names = layer_names(self._dense_path)
            self._dense = self._finished(self._dense_path)
        self.renew()
        self._kept = set(self._folder.iterdir())

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stack.close()

    def renew(self) -> None:
        """Open the dense network and its control anew: where an engine lies in memory moves its time a little."""
        self.dense, self.control = self._opened(self._dense), self._opened(self._dense)

    @property
    def quick(self) -> bool:
        """Whether cuts are made in the ONNX file, not by an export each."""
        return self._shrinker is not None

    def engine(self, mask: Mask) -> Engine:
        """The network cut by a mask [channels], as an engine that gives what the cut network gives.

        Raises:
            ExportError: the cut network cannot be exported.
        """
        small = self._cut(mask)
        if self.setting.target.runtime == "torch":
            return self._opened(small)
        return self._opened(self._finished(self._file(small, mask)))

    def footprint(self, mask: Mask) -> Footprint:
        """Memory of the network cut by a mask [channels], as its ONNX file plans it.

        Raises:
            ExportError: the cut network cannot be exported, or its sizes are not known before it runs.
        """
        found = footprint(self._file(self._cut(mask), mask), self.setting.batch)
        self.forget()
        return found

    def time(
        self,
        engines: Sequence[Engine],
        *,
        seconds: float,
        blocks: int = 12,
        on_block: Callable[[int, int], None] | None = None,
    ) -> list[Comparison]:
        """Every engine against the dense network, in the same blocks; see `compare_many`."""
        found = time_engines(
            self.setting.target,
            self.dense,
            self.control,
            engines,
            self.images,
            seconds=seconds,
            blocks=blocks,
            on_block=on_block,
        )
        return self._described(found)

    def time_anew(self, mask: Mask, openings: int, *, seconds: float, blocks: int) -> list[Comparison]:
        """The network cut by a mask [channels] against the dense one, both opened anew for each of `openings`.

        Each in a process of its own where engines come from files. A module of torch stays in this one, and so does
        what a second process cannot open, such as an engine on a GPU that is lent to one process only; `own_process` in
        the environment says which.

        Raises:
            ExportError: the cut network cannot be exported.
        """
        if isinstance(self._dense, Path):
            with suppress(RunError):
                return self._timed_apart(self._dense, mask, openings, seconds, blocks)
        found = []
        for _ in range(openings):
            self.renew()
            found += self.time([self.engine(mask)], seconds=seconds, blocks=blocks)
            self.forget()
        return found

    def _timed_apart(self, dense: Path, mask: Mask, openings: int, seconds: float, blocks: int) -> list[Comparison]:
        pruned, setting = self._finished(self._file(self._cut(mask), mask)), self.setting
        once = partial(time_apart, setting.target, dense, pruned, self.images, threads=setting.threads)
        found = [once(seconds=seconds, blocks=blocks) for _ in range(openings)]
        self.forget()
        return self._described(found, own_process=True)

    def _described(self, found: Sequence[Comparison], *, own_process: bool = False) -> list[Comparison]:
        own = self.describe()
        last = {"machine": own["machine"], "own_process": own_process}
        return [replace(one, environment={**own, **one.environment, **last}) for one in found]

    def describe(self) -> dict[str, Any]:
        """The machine and the engine, as JSON values."""
        return environment_of(self.setting.target) | {"engine": self.dense.describe(), "quick_cuts": self.quick}

    def layers(self, engine: Engine, runs: int = 10) -> dict[str, float]:
        """Seconds of the layers of the channel graph, by name; what belongs to none is under "". Empty where the
        runtime does not tell."""
        if self.setting.target.runtime == "torch":
            return {}
        return layer_seconds(engine.layer_times(self.images, runs), self._names)

    def _cut(self, mask: Mask) -> nn.Module:
        return in_mode(hard_prune(self._model, self.graph, PrunePlan.from_mask(self.graph, mask)))

    def _file(self, small: nn.Module, mask: Mask) -> Path:
        """The ONNX file of a cut network, in fp32."""
        self._made += 1
        path = self._folder / f"{self._made}.onnx"
        if not (self._shrinker and self._shrunk(self._shrinker, small, mask, path)):
            export_onnx(small, self._few, path, max_batch=max(2, self.setting.batch))
        return path

    def _opened(self, artifact: Path | nn.Module) -> Engine:
        target = self.setting.target
        return open_engine(target, artifact, **({} if target.on_gpu else {"threads": self.setting.threads}))

    def _try_shrinker(self) -> Shrinker | None:
        shrinker = Shrinker(self._dense_path, self.graph)
        try:
            shrinker.shrink(np.ones(self.graph.channels, dtype=np.bool_))
        except ExportError:
            return None
        return shrinker

    def _shrunk(self, shrinker: Shrinker, small: nn.Module, mask: Mask, path: Path) -> bool:
        """Cut the dense file; False where the result does not give what the cut network gives."""
        try:
            path.write_bytes(shrinker.shrink(mask).SerializeToString())
            got = open_engine("ort-cpu", path).run(self._few.numpy())
        except ExportError:
            return False
        except Exception:  # ONNX Runtime's errors share no base class
            return False
        with torch.inference_mode():
            expected = small(self._few).numpy()
        limit = AGREEMENT * max(float(np.abs(expected).max()), 1e-6)
        return bool(got.shape == expected.shape and np.abs(got - expected).max() <= limit)

    def _finished(self, path: Path) -> Path:
        """The file in the target's precision, built where it must be."""
        target, batch = self.setting.target, self.setting.batch
        if target.precision != "fp32":
            other = path.with_suffix(f".{target.precision}.onnx")
            shape = (CALIBRATION, *self.setting.input_shape)
            convert(path, other, target.precision, np.random.default_rng(1).standard_normal(shape, dtype=np.float32))
            path = other
        if target.builds:
            engine = path.with_suffix(".engine")
            build_engine(path, engine, target, BuildOptions(batches=(1, batch, batch)))
            path = engine
        return path

    def forget(self) -> None:
        """Delete the files of cuts; open engines stay as they are."""
        for path in self._folder.iterdir():
            if path not in self._kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
