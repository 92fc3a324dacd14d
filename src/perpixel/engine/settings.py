"""What a training run may be told. No torch here: reading a recipe must stay cheap."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from perpixel.config import Config

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

DEFAULT_EPOCHS = 12.0


class TrainConfig(Config):
    """Length, optimizer, schedule and housekeeping of a run.

    Length: exactly one of `steps`, `epochs` and `minutes`; with none of them, 12 epochs. Minutes are minutes of
    training: validation and saving do not count, and a resumed run goes on from the time that it had used.

    Args:
        steps: optimizer steps.
        epochs: passes over the training pictures.
        minutes: of training time.
        batch_size: pictures an optimizer step, over all processes and all micro-batches.
        accumulate: micro-batches that a process splits its part of the batch into, to save memory.
        optimizer: "sgd" (with `momentum`) or "adamw".
        lr: learning rate at the end of the warm-up.
        momentum: of SGD.
        weight_decay: of weights; of norms and biases only where `decay_norm` and `decay_bias` say so.
        decay_norm: whether the weights and biases of normalisation layers decay.
        decay_bias: whether other biases decay.
        backbone_lr_factor: learning rate of the backbone in multiples of `lr`.
        warmup_steps: steps in which the rate rises linearly; never more than a tenth of the run.
        warmup_factor: share of `lr` that the warm-up starts from.
        schedule: "step" (times `gamma` at each milestone), "linear" or "cosine" (both down to 0).
        milestones: fractions of the run.
        gamma: see `schedule`.
        clip_norm: largest norm of all gradients together; null: not clipped.
        precision: of convolutions; losses and everything in pixels is float32 in all of them.
        ema: decay of the running mean of the weights that is validated and kept; null: the weights themselves.
        seed: of initial weights, sampling, augmentation and dropout.
        evaluate_every: steps between validations; 0: only at the end; null: five times in a run. The end always is one.
        early_stop: validations without a better score after which the run ends; null: never.
        save_every: steps between saves of the whole state; null: every five minutes. Validations save, too.
        log_every: steps that a row of metrics.csv is the mean of.
        metric: validation score that decides what is best, as "bbox.AP"; null: the AP of the task at hand.
        device: "auto" takes the GPU where there is one.
        profile: measure where the time of a step goes, and print it.
        tensorboard: write event files to the run folder (needs `pip install perpixel[tensorboard]`).
        channels_last: memory layout of activations; the faster one for convolutions on most hardware.
    """

    steps: Count | None = None
    epochs: Positive | None = None
    minutes: Positive | None = None
    batch_size: Count = 16
    accumulate: Count = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay_norm: bool = False
    decay_bias: bool = True
    backbone_lr_factor: Annotated[float, Field(ge=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    warmup_factor: Fraction = 0.001
    schedule: Literal["step", "linear", "cosine"] = "step"
    milestones: tuple[Fraction, ...] = (2 / 3, 8 / 9)
    gamma: Fraction = 0.1
    clip_norm: Positive | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: int = 0
    evaluate_every: Annotated[int, Field(ge=0)] | None = None
    early_stop: Count | None = None
    save_every: Count | None = None
    log_every: Count = 10
    metric: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    profile: bool = False
    tensorboard: bool = False
    channels_last: bool = True

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in ("steps", "epochs", "minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"expected one of steps, epochs and minutes, got {' and '.join(given)}; remove all but one"
            )
        return self
