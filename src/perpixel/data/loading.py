"""From a data set to batches: what to read, in which order, and how pictures of unlike sizes share a batch.

The training batch of step s is a pure function of (seed, s, global batch size): every random number is drawn from a
generator seeded with the position of the sample in the endless stream of pictures. So a resumed run sees the same
batches as one that was never stopped, W processes see together what one process would have seen, and the number of
loader processes changes nothing.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, Dataset

from perpixel.config import Config
from perpixel.data.coco import CocoDataset, find_in_folder
from perpixel.data.images import fit_size
from perpixel.data.transforms import View, jitter_colors, pad_to, plan_view
from perpixel.errors import DataError, PerpixelError
from perpixel.structures import Batch, Sample, Size

DIVISOR = 32  # padded sides are multiples of this, px
GRACE = 20  # seconds that a loader process lives on after SIGTERM
ORDER, SAMPLE = 0, 1  # first words of the seeds of the two kinds of random numbers

Split = Literal["train", "val", "test"]
Item = TypeVar("Item")
Pixels = Annotated[int, Field(ge=1)]
Part = Annotated[float, Field(ge=0, le=1)]


class DataConfig(Config):
    """Which pictures, and how they are shown to the network.

    Args:
        root: folder with both splits, in one of the layouts of `find_in_folder`.
        train_images, train_annotations, val_images, val_annotations: explicit paths of a split, instead of `root`.
        short_side: length of the shorter side in training, px; of several one is drawn for each picture.
        max_size: largest length of the longer side in training, px.
        test_short_side, test_max_size: the same for evaluation.
        flip: probability of a mirror image.
        crop: smallest part of each side that a random cut keeps; 1 cuts nothing.
        scale_jitter: range of a random factor on the size (large-scale jitter, for example [0.5, 2.0]).
        color_jitter: brightness, contrast and saturation change by up to this part.
        crowd: "ignore" regions neither reward nor punish; "background" leaves them out, as in the release.
        drop_degenerate: leave out broken annotations instead of stopping.
        mask_stride: masks are sampled every so many px.
        aspect_grouping: batches of upright or of lying pictures, which need less padding.
        workers: loader processes; 0 loads in the training process.
    """

    root: str | None = None
    train_images: str | None = None
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    short_side: tuple[Pixels, ...] = (800,)
    max_size: Pixels = 1333
    test_short_side: Pixels = 800
    test_max_size: Pixels = 1333
    flip: Part = 0.5
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    scale_jitter: tuple[float, float] | None = None
    color_jitter: Part = 0.0
    crowd: Literal["ignore", "background"] = "ignore"
    drop_degenerate: bool = False
    mask_stride: Pixels = 4
    aspect_grouping: bool = True
    workers: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.short_side:
            raise ValueError("short_side: expected at least one length in px, got none")
        if self.scale_jitter is not None and not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"scale_jitter: expected 0 < low <= high, got {list(self.scale_jitter)}")
        return self


def find_split(where: DataConfig | str | Path, split: Split, needs: frozenset[str] = frozenset()) -> tuple[Path, Path]:
    """The folder of pictures and the annotation file of a split, from a config or a folder.

    Raises:
        DataError: the config names no data, half a pair, or a path that is not there.
    """
    if not isinstance(where, DataConfig):
        return find_in_folder(where, split, needs)
    pairs = {
        "train": (where.train_images, where.train_annotations),
        "val": (where.val_images, where.val_annotations),
    }
    pair = pairs.get(split, (None, None))
    if any(pair):
        if not all(pair):
            raise DataError(f"data: expected data.{split}_images and data.{split}_annotations, got one; give both")
        images, annotations = Path(str(pair[0])), Path(str(pair[1]))
        if not images.is_dir():
            raise DataError(f"{images}: no such folder; data.{split}_images names the folder of the pictures")
        if not annotations.is_file():
            raise DataError(f"{annotations}: no such file; data.{split}_annotations names a COCO JSON file")
        return images, annotations
    if where.root is None:
        raise DataError(f"data: nothing to read for the split {split!r}; set data.root=DIR, a folder with COCO labels")
    return find_in_folder(where.root, split, needs)


def open_dataset(config: DataConfig, split: Split, needs: frozenset[str] = frozenset()) -> CocoDataset:
    """The data set of a split, checked.

    Args:
        config: where it is, and what to do with crowds and broken annotations.
        split: "train", "val" or "test".
        needs: "masks" and "keypoints", where samples should have them.

    Raises:
        DataError: see `find_split` and `CocoDataset`.
    """
    images, annotations = find_split(config, split, needs)
    return CocoDataset(images, annotations, needs=needs, crowd=config.crowd, drop_degenerate=config.drop_degenerate)


def batches_per_epoch(dataset: CocoDataset, global_batch_size: int) -> int:
    """Steps after which every picture has been seen at least once."""
    return -(-len(dataset) // global_batch_size)


def train_batches(
    dataset: CocoDataset,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    needs: frozenset[str] = frozenset(),
) -> Iterator[Batch]:
    """Training batches without end, from step `start_step` on.

    Args:
        dataset: of the training split; targets have what it was opened for.
        config: transforms and number of loader processes.
        batch_size: pictures a step on this rank.
        seed: of order and transforms.
        start_step: the step of the first batch.
        rank, world_size: this process gets the `rank`-th part of every global batch of batch_size * world_size, padded
            to the size of the whole global batch, so that losses do not depend on how it was split up.
        needs: what the recipe learns from; the data set must have been opened with it.

    Raises:
        DataError: a picture cannot be read, or the data set was opened without something of `needs`.
    """
    if lacking := sorted(needs - dataset.needs):
        raise DataError(f"{dataset.annotation_file}: opened without {', '.join(lacking)}; pass needs to open_dataset")
    steps = TrainSteps(dataset, config, batch_size, seed, rank, world_size)
    return _load(steps, count(start_step), config.workers)


class EvalBatches(Iterable[Batch]):
    """Batches of every picture once, in its whole, resized as the predictor does; `len` is their number.

    Args:
        dataset: of the split to evaluate on.
        config: test sizes and number of loader processes.
        batch_size: pictures a batch.
        rank, world_size: this process gets every `world_size`-th batch.
    """

    def __init__(
        self, dataset: CocoDataset, config: DataConfig, *, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        order = np.arange(len(dataset))
        if config.aspect_grouping and batch_size > 1:
            order = np.argsort(dataset.sizes[:, 0] / dataset.sizes[:, 1], kind="stable")
        parts = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
        self._steps = _EvalSteps(dataset, config, parts[rank::world_size])
        self._workers = config.workers

    def __len__(self) -> int:
        return len(self._steps.parts)

    def __iter__(self) -> Iterator[Batch]:
        return _load(self._steps, range(len(self)), self._workers)


def eval_batches(
    dataset: CocoDataset, config: DataConfig, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> EvalBatches:
    """See `EvalBatches`."""
    return EvalBatches(dataset, config, batch_size=batch_size, rank=rank, world_size=world_size)


class TrainSteps(Dataset[Batch]):
    """`steps[s]` is the batch of step s of one rank; see `train_batches` for the arguments."""

    def __init__(
        self, dataset: CocoDataset, config: DataConfig, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.dataset, self.config = dataset, config
        self.seed = seed
        self.first, self.batch_size = rank * batch_size, batch_size
        self.global_size = batch_size * world_size
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.zeros((0, 0), np.int64))

    def __getitem__(self, step: int) -> Batch:
        chosen = self._indices(step)
        generators = [
            np.random.default_rng([SAMPLE, self.seed, step * self.global_size + i]) for i in range(len(chosen))
        ]
        views = [self._plan(int(index), rng) for index, rng in zip(chosen, generators, strict=True)]
        mine = range(self.first, self.first + self.batch_size)
        samples = [self._sample(int(chosen[i]), views[i], generators[i]) for i in mine]
        return collate(samples, [view.size for view in views])

    def _plan(self, index: int, rng: np.random.Generator) -> View:
        c = self.config
        return plan_view(
            self.dataset.size(index),
            rng,
            short_side=c.short_side,
            max_size=c.max_size,
            flip=c.flip,
            crop=c.crop,
            scale_jitter=c.scale_jitter,
        )

    def _sample(self, index: int, view: View, rng: np.random.Generator) -> Sample:
        sample = self.dataset.sample(index, view, mask_stride=self.config.mask_stride, reduced=True)
        image = jitter_colors(sample.image, self.config.color_jitter, rng)
        return Sample(
            image=image, instances=sample.instances, image_id=sample.image_id, original_size=sample.original_size
        )

    def _indices(self, step: int) -> npt.NDArray[np.int64]:
        """Pictures of the global batch of a step. The order of a round (the steps in which every picture comes at
        least once) is computed once and kept."""
        rounds = batches_per_epoch(self.dataset, self.global_size)
        number, position = divmod(step, rounds)
        if self._order[0] != number:
            self._order = (number, self._round(number, rounds))
        return self._order[1][position]

    def _round(self, number: int, steps: int) -> npt.NDArray[np.int64]:
        """int64 [steps, global batch]. The stream of pictures is one random permutation after the other, so over a
        run all pictures come equally often; a round is the next `steps` batches of it, rearranged by shape."""
        n, length = len(self.dataset), steps * self.global_size
        epochs = range(number * length // n, ((number + 1) * length - 1) // n + 1)
        stream = np.concatenate([np.random.default_rng([ORDER, self.seed, e]).permutation(n) for e in epochs])
        start = number * length - epochs[0] * n
        stream = stream[start : start + length]
        if self.config.aspect_grouping:
            upright = self.dataset.sizes[stream, 0] > self.dataset.sizes[stream, 1]
            stream = stream[np.argsort(upright, kind="stable")]
            batches = stream.reshape(steps, self.global_size)
            return np.random.default_rng([ORDER, self.seed, number, 1]).permutation(batches, axis=0)
        return stream.reshape(steps, self.global_size)


class _EvalSteps(Dataset[Batch]):
    """`steps[i]` is the batch of the pictures `parts[i]`."""

    def __init__(self, dataset: CocoDataset, config: DataConfig, parts: list[list[int]]) -> None:
        self.dataset, self.config, self.parts = dataset, config, parts

    def __getitem__(self, step: int) -> Batch:
        samples = []
        for index in self.parts[step]:
            size = self.dataset.size(index)
            shown = fit_size(size, self.config.test_short_side, self.config.test_max_size)
            samples.append(self.dataset.sample(index, View.whole(size, shown), mask_stride=self.config.mask_stride))
        return collate(samples)


def collate(samples: Sequence[Sample], sizes: Sequence[Size] = ()) -> Batch:
    """One batch, padded at right and bottom to a multiple of 32 px that also has room for pictures of `sizes`."""
    shown = [sample.instances.size for sample in samples]
    height, width = (-(-max(size[axis] for size in [*shown, *sizes]) // DIVISOR) * DIVISOR for axis in (0, 1))
    return Batch(
        images=pad_to([sample.image for sample in samples], (height, width)),
        sizes=shown,
        original_sizes=[sample.original_size for sample in samples],
        targets=[sample.instances for sample in samples],
        image_ids=[sample.image_id for sample in samples],
    )


class _Guarded(Dataset[object]):
    """Items of a data set, with errors as values: a loader process would wrap them in its own traceback."""

    def __init__(self, items: Dataset[Batch]) -> None:
        self.items = items

    def __getitem__(self, step: int) -> Batch | PerpixelError:
        try:
            return self.items[step]
        except PerpixelError as error:
            return error


def _load(items: Dataset[Batch], steps: Iterable[int], workers: int) -> Iterator[Batch]:
    """Items of the steps in order, made ahead of time by loader processes."""
    loader = DataLoader(
        _Guarded(items),
        batch_size=None,  # an item is a whole batch
        sampler=steps,
        num_workers=workers,
        worker_init_fn=_start_worker,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # its base seed must not come from the run's own random numbers
        pin_memory=torch.cuda.is_available(),
    )
    for item in loader:
        if isinstance(item, PerpixelError):
            raise item
        yield item


def _start_worker(_: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the training process alone answers, and ends its workers.

    A worker that is told to terminate outlives the step at hand, and no more than that: at exit Python terminates
    workers that are left over, and waits for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
